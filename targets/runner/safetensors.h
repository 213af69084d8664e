// The weight file: safetensors, mapped.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace mx {

struct Weight {
    std::string dtype;  // as numpy names it
    std::vector<int64_t> shape;
    std::string_view bytes;  // in the file
};

// The tensors of a file whose content is `bytes`; Throws Error, which begins with `name`, when it is
// not what its header says.
std::map<std::string, Weight> read_safetensors(std::string_view bytes, const std::string& name);

}  // namespace mx
