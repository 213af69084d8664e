// The errors that a user can meet: one line each, and the exit code that goes with it.
#pragma once

#include <stdexcept>
#include <string>

namespace mx {

// The same numbers as mxcompile/errors.py.
enum class Exit : int { kBug = 1, kUsage = 2, kUnsupported = 5 };

class Error : public std::runtime_error {
public:
    Error(Exit code, const std::string& text) : std::runtime_error(text), code(code) {}
    const Exit code;
};

// The request or a file is wrong: missing, damaged, or made for another machine.
[[noreturn]] inline void fail(const std::string& text) { throw Error(Exit::kUsage, text); }

// A file is whole but holds what this program does not implement.
[[noreturn]] inline void unsupported(const std::string& text) {
    throw Error(Exit::kUnsupported, text);
}

}  // namespace mx
