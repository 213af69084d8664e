// SHA-256 (FIPS 180-4).
#pragma once

#include <string>
#include <string_view>

namespace mx {

// The digest of `data` in hexadecimal; `portable` leaves a CPU's instructions for it aside.
std::string sha256(std::string_view data, bool portable = false);

}  // namespace mx
