#include "artifact.h"

#include <elf.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <set>

#include "cpu.h"
#include "error.h"
#include "json.h"
#include "sha256.h"

// The versions of TVM that this program was built with; its deployer says.
#ifndef MXRUN_TVM_VERSION
#error "define MXRUN_TVM_VERSION and MXRUN_TVM_FFI_VERSION"
#endif

namespace mx {
namespace {

constexpr int64_t kFormatVersion = 2;
constexpr const char* kManifest = "manifest.json";
constexpr int64_t kLargest = int64_t{1} << 31;  // of what the manifest counts, but parameters

int64_t count(const json::Value& value, int64_t least, int64_t most = kLargest) {
    const int64_t found = value.integer();
    if (found < least || found > most) value.complain(std::to_string(found) + " is out of range");
    return found;
}

std::vector<std::string> names(const json::Value& list) {
    std::vector<std::string> found;
    list.each([&](json::Value name) { found.emplace_back(name.string()); });
    return found;
}

std::vector<TensorSpec> specs(const json::Value& list) {
    std::vector<TensorSpec> found;
    list.each([&](json::Value value) {
        TensorSpec spec = {std::string(value.at("name").string()),
                           std::string(value.at("dtype").string()), {}};
        value.at("shape").each([&](json::Value size) {
            spec.shape.push_back(size.is_string() ? "'" + std::string(size.string())
                                                  : std::to_string(count(size, 0)));
        });
        found.push_back(std::move(spec));
    });
    return found;
}

void read_decoder(const json::Value& root, Manifest& manifest) {
    const auto cache = root.find("kv_cache"), generation = root.find("generation");
    if (!cache || !generation) root.complain("a decoder without kv_cache or generation");
    cache->at("tensors").each([&](json::Value tensor) {
        const auto dtype = find_dtype(tensor.at("dtype").string());
        std::vector<json::Value> shape;
        tensor.at("shape").each([&](json::Value size) { shape.push_back(size); });
        if (!dtype || shape.size() != 4) tensor.complain("not a cache");
        manifest.caches.push_back(
            {*dtype, count(shape[1], 1, 1 << 20), count(shape[3], 1, 1 << 20)});
    });
    manifest.vocabulary = count(generation->at("vocabulary"), 1);
    manifest.context = count(generation->at("max_position_embeddings"), 1);
    generation->at("eos_token_id").each([&](json::Value token) {
        manifest.ends.push_back(token.token());
    });
    // A wrong vocabulary would let tokens through that the program has no row for.
    const bool agree = manifest.outputs.size() == 1 && manifest.outputs[0].shape.size() == 3 &&
                       manifest.outputs[0].shape[2] == std::to_string(manifest.vocabulary);
    if (!agree) root.complain("a decoder whose output is not [batch, seq, vocabulary]");
}

Manifest read_manifest(const json::Document& document) {
    const json::Value root = document.root();
    if (root.kind() != json::Kind::kObject) fail(document.name() + " is not a JSON object");
    const auto version = root.find("format_version");
    const bool known = version && version->kind() == json::Kind::kNumber &&
                       version->number() == std::to_string(kFormatVersion);
    if (!known) {
        fail(document.name() + " is of a format version that this program does not read (" +
             std::to_string(kFormatVersion) + "): compile the model again");
    }
    const auto digest = root.find("digest");
    if (!digest || digest->string() != sha256(json::canonical(root, "digest"))) {
        fail(document.name() + " was changed after it was written: its digest differs");
    }
    Manifest manifest;
    const std::string_view kind = root.at("kind").string();
    if (kind != "decoder" && kind != "graph") {
        root.complain("kind " + std::string(kind) + " is not decoder or graph");
    }
    manifest.decoder = kind == "decoder";
    manifest.name = root.at("name").string();
    manifest.target = root.at("target").string();
    manifest.parameters = count(root.at("parameters"), 1, int64_t{1} << 50);
    manifest.target_features = names(root.at("target_features"));
    manifest.inputs = specs(root.at("inputs"));
    manifest.outputs = specs(root.at("outputs"));
    manifest.weights = names(root.at("weights"));
    if (manifest.decoder) read_decoder(root, manifest);
    return manifest;
}

void check_versions(const json::Document& document, const std::string& folder) {
    const json::Value versions = document.root().at("versions");
    const std::pair<const char*, const char*> ours[] = {{"tvm", MXRUN_TVM_VERSION},
                                                        {"tvm_ffi", MXRUN_TVM_FFI_VERSION}};
    for (const auto& [name, version] : ours) {
        const auto made = versions.find(name);
        const std::string text = made ? std::string(made->string()) : "none";
        if (text != version) {
            fail(folder + " was made with " + name + " " + text + ", here is " + version +
                 ": deploy it again");
        }
    }
}

void check_cpu(const Manifest& manifest, const std::string& folder) {
    const std::set<std::string> features = cpu_features();
    std::string lacking;
    for (const auto& name : std::set<std::string>(manifest.target_features.begin(),
                                                  manifest.target_features.end())) {
        if (features.count(name) == 0) lacking += (lacking.empty() ? "" : ", ") + name;
    }
    if (!lacking.empty()) {
        fail(folder + " was compiled for " + manifest.target + "; this CPU lacks " + lacking +
             ": compile the model for another target");
    }
}

// The loader would say that a library is "not found" when it is of another machine.
void check_code(const Mapping& code, const Artifact& artifact) {
    const std::string_view bytes = code.bytes();
    Elf64_Ehdr header{};
    if (bytes.size() < sizeof header || bytes.substr(0, SELFMAG) != ELFMAG) {
        fail(artifact.path(kCode) + " is not a shared library");
    }
    std::memcpy(&header, bytes.data(), sizeof header);
    constexpr auto kNone = "another kind of machine";
    const auto name = [&](int machine) {
        return machine == EM_X86_64 ? "x86-64" : machine == EM_AARCH64 ? "aarch64" : kNone;
    };
    if (header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_machine != kElfMachine) {
        fail(artifact.folder + " was compiled for " + artifact.manifest.target + ", code for " +
             name(header.e_machine) + "; this machine is " + name(kElfMachine));
    }
}

std::shared_ptr<Mapping> open_file(const Artifact& artifact, const std::string& name,
                                   const json::Value& record) {
    const bool outside = name.empty() || name == "." || name == ".." ||
                         name.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos;
    if (outside) {
        fail(artifact.path(kManifest) + " names a file outside the artifact: " + json::quoted(name));
    }
    const std::string path = artifact.path(name);
    auto mapping = std::make_shared<Mapping>(path);
    const std::string_view bytes = mapping->bytes();
    const int64_t expected = record.at("bytes").integer();
    if (static_cast<int64_t>(bytes.size()) != expected) {
        fail(path + " has " + std::to_string(bytes.size()) + " bytes, not " +
             std::to_string(expected) + ": copy it again");
    }
    if (sha256(bytes) != record.at("sha256").string()) {
        fail(path + " was changed: its sha256 is not the one in " + kManifest);
    }
    mapping->rest();
    return mapping;
}

}  // namespace

std::optional<DType> find_dtype(std::string_view name) {
    static const std::array<DType, 12> known = {{{"float32", 'f', 32}, {"float16", 'f', 16},
                                                 {"float64", 'f', 64}, {"int8", 'i', 8},
                                                 {"int16", 'i', 16}, {"int32", 'i', 32},
                                                 {"int64", 'i', 64}, {"uint8", 'u', 8},
                                                 {"uint16", 'u', 16}, {"uint32", 'u', 32},
                                                 {"uint64", 'u', 64}, {"bool", 'b', 8}}};
    for (const DType& found : known) {
        if (found.name == name) return found;
    }
    return std::nullopt;
}

std::string TensorSpec::text() const {
    std::string out = name + ": " + dtype + "[";
    for (size_t i = 0; i < shape.size(); ++i) {
        out += (i != 0 ? ", " : "") + (shape[i][0] == '\'' ? shape[i].substr(1) : shape[i]);
    }
    return out + "]";
}

int64_t Artifact::weight_bytes() const {
    return static_cast<int64_t>(files.at(kWeights)->bytes().size());
}

double Artifact::bits_per_weight() const {
    return 8 * static_cast<double>(weight_bytes()) / static_cast<double>(manifest.parameters);
}

Artifact open_artifact(const std::string& folder) {
    Artifact artifact;
    artifact.folder = folder;
    std::string text;
    try {
        text = Mapping(artifact.path(kManifest)).bytes();
    } catch (const Error&) {
        const char* what = is_folder(folder) ? "has no manifest.json that can be read" : "does not exist";
        fail(folder + " is not an artifact: it " + what);
    }
    const json::Document document(std::move(text), artifact.path(kManifest));
    artifact.manifest = read_manifest(document);
    const json::Value files = document.root().at("files");
    for (const char* name : {kCode, kWeights}) {
        if (!files.find(name)) fail(document.name() + " does not name " + name);
    }
    files.each_member([&](std::string_view key, json::Value record) {
        const std::string name(key);
        artifact.files[name] = open_file(artifact, name, record);
    });
    check_versions(document, folder);
    check_code(*artifact.files.at(kCode), artifact);
    check_cpu(artifact.manifest, folder);
    return artifact;
}

}  // namespace mx
