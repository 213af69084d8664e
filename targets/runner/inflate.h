// DEFLATE (RFC 1951), to read compressed .npz files without a library.
#pragma once

#include <string>
#include <string_view>

namespace mx {

// What `compressed` unpacks to, which must be `size` bytes. Throws Error, beginning with `name`,
// when it does not.
std::string inflate(std::string_view compressed, size_t size, const std::string& name);

}  // namespace mx
