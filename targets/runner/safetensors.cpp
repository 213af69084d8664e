#include "safetensors.h"

#include <cstring>

#include "artifact.h"
#include "error.h"
#include "json.h"

namespace mx {
namespace {

constexpr std::pair<std::string_view, const char*> kTypes[] = {
    {"U8", "uint8"},   {"I8", "int8"},   {"U16", "uint16"},  {"I16", "int16"},
    {"U32", "uint32"}, {"I32", "int32"}, {"I64", "int64"},   {"F16", "float16"},
    {"F32", "float32"}, {"F64", "float64"}, {"BOOL", "bool"}};

Weight read_entry(const json::Value& entry, std::string_view data) {
    Weight weight;
    const std::string_view type = entry.at("dtype").string();
    for (const auto& [theirs, ours] : kTypes) {
        if (theirs == type) weight.dtype = ours;
    }
    if (weight.dtype.empty()) entry.complain("a tensor of type " + std::string(type));
    uint64_t size = static_cast<uint64_t>(find_dtype(weight.dtype)->bytes());
    entry.at("shape").each([&](json::Value value) {
        const int64_t dimension = value.integer();
        // No product that is compared below can have overflowed.
        if (dimension < 0 || __builtin_mul_overflow(size, static_cast<uint64_t>(dimension), &size)) {
            value.complain("a tensor of impossible shape");
        }
        weight.shape.push_back(dimension);
    });
    const json::Value offsets = entry.at("data_offsets");
    if (offsets.size() != 2) offsets.complain("data_offsets is not a pair");
    const int64_t begin = offsets.at(size_t{0}).integer(), end = offsets.at(1).integer();
    if (begin < 0 || end < begin || static_cast<uint64_t>(end) > data.size() ||
        static_cast<uint64_t>(end - begin) != size) {
        entry.complain("a tensor lies outside");
    }
    weight.bytes = data.substr(static_cast<size_t>(begin), size);
    return weight;
}

}  // namespace

std::map<std::string, Weight> read_safetensors(std::string_view bytes, const std::string& name) {
    uint64_t header = 0;
    if (bytes.size() < sizeof header) fail(name + " is not a weight file: it is too short");
    std::memcpy(&header, bytes.data(), sizeof header);  // little-endian, like all that we run on
    bytes.remove_prefix(sizeof header);
    if (header > bytes.size()) fail(name + " is not a weight file: its header is cut");
    const json::Document document(std::string(bytes.substr(0, header)), name);
    bytes.remove_prefix(header);
    std::map<std::string, Weight> found;
    document.root().each_member([&](std::string_view key, json::Value entry) {
        if (key != "__metadata__") found[std::string(key)] = read_entry(entry, bytes);
    });
    return found;
}

}  // namespace mx
