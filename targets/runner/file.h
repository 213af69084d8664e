// Files, mapped.
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace mx {

// A file's content, mapped for reading until the object goes.
class Mapping {
public:
    // Throws Error when `path` cannot be opened or is not a file; a link only if it may be `linked`.
    explicit Mapping(const std::string& path, bool linked = false);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    // Lets go of the memory until it is read again.
    void rest() const;

    std::string_view bytes() const { return {static_cast<const char*>(data_), size_}; }

private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

// Writes `path` whole or not at all: to a draft beside it, which is then renamed.
void write_file(const std::string& path, std::string_view content);

bool is_folder(const std::string& path);

}  // namespace mx
