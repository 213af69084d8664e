// SHA-256 (FIPS 180-4).
#pragma once

#include <string>
#include <string_view>

namespace mx {

// The digest of `data` in hexadecimal.
std::string sha256(std::string_view data);

}  // namespace mx
