// The artifact folder: its manifest, read and checked as mxcompile/artifact.py does.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "file.h"

namespace mx {

// Types as numpy names them: "float32", "int64".
struct DType {
    std::string name;
    char kind;     // of numpy: f, i, u or b
    int bits;
    int bytes() const { return (bits + 7) / 8; }
};

// The type of that name, or nothing.
std::optional<DType> find_dtype(std::string_view name);

struct TensorSpec {
    std::string name;
    std::string dtype;
    std::vector<std::string> shape;  // a number, or the name of a free dimension
    std::string text() const;
};

// A tensor [batch, kv heads, length, columns] of keys or values, or of their scales.
struct CacheTensor {
    DType dtype;
    int64_t kv_heads, columns;
};

struct Manifest {
    bool decoder = false;
    std::string name, target;
    int64_t parameters = 0;
    std::vector<std::string> target_features;
    std::vector<TensorSpec> inputs, outputs;
    std::vector<std::string> weights;
    // Of a decoder:
    std::vector<CacheTensor> caches;
    int64_t vocabulary = 0, context = 0;
    std::vector<uint32_t> ends;  // tokens that end a text
};

struct Artifact {
    std::string folder;
    Manifest manifest;
    std::map<std::string, std::shared_ptr<Mapping>> files;

    std::string path(const std::string& name) const { return folder + "/" + name; }
    double bits_per_weight() const;
    int64_t weight_bytes() const;
};

constexpr const char* kCode = "model.so";
constexpr const char* kWeights = "weights.safetensors";

// Opens an artifact, checks every file of it, and that this machine can run it.
// Throws Error when one is missing, was changed, or it was made for another machine or version.
Artifact open_artifact(const std::string& folder);

}  // namespace mx
