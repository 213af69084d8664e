#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "error.h"

namespace mx {
namespace {

struct Descriptor {
    int number;
    ~Descriptor() {
        if (number >= 0) close(number);
    }
};

}  // namespace

Mapping::Mapping(const std::string& path, bool linked) {
    const Descriptor file{
        open(path.c_str(), O_RDONLY | O_CLOEXEC | (linked ? 0 : O_NOFOLLOW))};
    if (file.number < 0) {
        if (errno == ENOENT) fail(path + " is missing");
        if (errno == ELOOP) fail(path + " is a link, not a file of the artifact");
        fail(path + " cannot be read: " + std::strerror(errno));
    }
    struct stat found {};
    if (fstat(file.number, &found) != 0 || !S_ISREG(found.st_mode)) fail(path + " is not a file");
    size_ = static_cast<size_t>(found.st_size);
    if (size_ == 0) return;  // cannot be mapped
    void* data = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.number, 0);
    if (data == MAP_FAILED) fail(path + " cannot be mapped: " + std::strerror(errno));
    data_ = data;
}

Mapping::~Mapping() {
    if (data_ != nullptr) munmap(data_, size_);
}

void Mapping::rest() const {
    if (data_ != nullptr) madvise(data_, size_, MADV_DONTNEED);
}

void write_file(const std::string& path, std::string_view content) {
    const size_t slash = path.rfind('/');
    const size_t name = slash == std::string::npos ? 0 : slash + 1;
    const std::string draft =
        path.substr(0, name) + "." + path.substr(name) + "." + std::to_string(getpid());
    std::FILE* file = std::fopen(draft.c_str(), "wbx");
    if (file == nullptr) fail(path + " cannot be written: " + std::strerror(errno));
    const bool written = std::fwrite(content.data(), 1, content.size(), file) == content.size();
    const bool closed = std::fclose(file) == 0;
    if (!written || !closed || std::rename(draft.c_str(), path.c_str()) != 0) {
        const std::string reason = std::strerror(errno);
        std::remove(draft.c_str());
        fail(path + " cannot be written: " + reason);
    }
}

bool is_folder(const std::string& path) {
    struct stat found {};
    return stat(path.c_str(), &found) == 0 && S_ISDIR(found.st_mode);
}

}  // namespace mx
