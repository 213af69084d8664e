#include "npz.h"

#include <array>
#include <cstring>
#include <string_view>

#include "error.h"
#include "file.h"
#include "inflate.h"

namespace mx {
namespace {

constexpr uint32_t kLocal = 0x04034b50, kCentral = 0x02014b50, kEnd = 0x06054b50;
constexpr uint16_t kStored = 0, kDeflated = 8;
constexpr size_t kLocalSize = 30, kCentralSize = 46, kEndSize = 22;

uint32_t crc32(std::string_view bytes) {
    static const std::array<uint32_t, 256> table = [] {
        std::array<uint32_t, 256> found{};
        for (uint32_t i = 0; i < 256; ++i) {
            uint32_t value = i;
            for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) * 0xEDB88320u);
            found[i] = value;
        }
        return found;
    }();
    uint32_t crc = ~0u;
    for (const char c : bytes) crc = table[(crc ^ static_cast<unsigned char>(c)) & 255] ^ crc >> 8;
    return ~crc;
}

// Reads little-endian numbers at places of a file, and complains outside it.
class Reader {
public:
    Reader(std::string_view bytes, const std::string& name) : bytes_(bytes), name_(name) {}

    template <typename T>
    T get(size_t at) const {
        T value;
        std::memcpy(&value, slice(at, sizeof value).data(), sizeof value);
        return value;
    }

    std::string_view slice(size_t at, size_t size) const {
        if (at > bytes_.size() || size > bytes_.size() - at) complain("it is cut");
        return bytes_.substr(at, size);
    }

    size_t size() const { return bytes_.size(); }

    [[noreturn]] void complain(const std::string& what) const {
        fail(name_ + " is not an .npz of arrays: " + what);
    }

private:
    std::string_view bytes_;
    const std::string& name_;
};

// The value behind `key` in the header of an array, a Python dictionary that numpy writes.
std::string_view field(std::string_view header, const std::string& key, const Reader& reader) {
    const size_t at = header.find("'" + key + "':");
    if (at == std::string_view::npos) reader.complain("an array without " + key);
    header.remove_prefix(at + key.size() + 3);
    while (!header.empty() && header[0] == ' ') header.remove_prefix(1);
    return header;
}

// numpy's "<f4" as a name.
std::string dtype_of(std::string_view descr, const Reader& reader) {
    const std::string_view code = descr.substr(0, std::min(descr.find('\'', 1), descr.size()));
    constexpr std::pair<std::string_view, const char*> kKnown[] = {
        {"'<f4", "float32"}, {"'<f2", "float16"}, {"'<f8", "float64"}, {"'|i1", "int8"},
        {"'<i2", "int16"},   {"'<i4", "int32"},   {"'<i8", "int64"},   {"'|u1", "uint8"},
        {"'<u2", "uint16"},  {"'<u4", "uint32"},  {"'<u8", "uint64"},  {"'|b1", "bool"}};
    for (const auto& [theirs, ours] : kKnown) {
        if (code == theirs) return ours;
    }
    reader.complain("an array of type " + std::string(code.substr(0, 20)));
}

std::string code_of(const std::string& dtype) {
    const DType type = *find_dtype(dtype);
    return std::string(type.bits == 8 ? "|" : "<") + type.kind + std::to_string(type.bytes());
}

std::vector<int64_t> shape_of(std::string_view text, const Reader& reader) {
    std::vector<int64_t> shape;
    if (text.empty() || text[0] != '(') reader.complain("an array without shape");
    int64_t value = -1;
    for (const char c : text.substr(1)) {
        if (c >= '0' && c <= '9') {
            if (value > (int64_t{1} << 55)) reader.complain("an array of impossible shape");
            value = (value < 0 ? 0 : value * 10) + (c - '0');
        } else if (c == ',' || c == ')') {
            if (value >= 0) shape.push_back(value);
            value = -1;
            if (c == ')') return shape;
        } else if (c != ' ') {
            break;
        }
    }
    reader.complain("an array without shape");
}

// Reorders an array whose first index runs fastest.
std::string from_fortran(std::string_view data, const std::vector<int64_t>& shape, size_t item) {
    std::string out(data.size(), '\0');
    std::vector<int64_t> index(shape.size(), 0);
    for (size_t to = 0; to + item <= out.size(); to += item) {
        size_t from = 0;
        for (size_t axis = shape.size(); axis-- != 0;) {
            from = from * static_cast<size_t>(shape[axis]) + static_cast<size_t>(index[axis]);
        }
        std::memcpy(&out[to], &data[from * item], item);
        for (size_t axis = shape.size(); axis-- != 0;) {
            if (++index[axis] < shape[axis]) break;
            index[axis] = 0;
        }
    }
    return out;
}

Tensor read_array(const std::string& npy, const std::string& name) {
    const Reader reader(npy, name);
    if (reader.slice(0, 6) != "\x93NUMPY") reader.complain("a file that is no array");
    const bool long_header = reader.get<uint8_t>(6) >= 2;
    const size_t start = long_header ? 12 : 10;
    const size_t size = long_header ? reader.get<uint32_t>(8) : reader.get<uint16_t>(8);
    const std::string_view header = reader.slice(start, size);
    Tensor tensor;
    tensor.dtype = dtype_of(field(header, "descr", reader), reader);
    tensor.shape = shape_of(field(header, "shape", reader), reader);
    const std::string_view data = reader.slice(start + size, reader.size() - start - size);
    if (tensor.bytes() != data.size()) reader.complain("an array that is cut");
    const bool fortran = field(header, "fortran_order", reader).substr(0, 4) == "True";
    const auto item = static_cast<size_t>(find_dtype(tensor.dtype)->bytes());
    auto block = std::make_shared<Block>(data.size());
    const std::string turned = fortran ? from_fortran(data, tensor.shape, item) : "";
    if (!data.empty()) std::memcpy(block->data(), fortran ? turned.data() : data.data(), data.size());
    tensor.data = block->data();
    tensor.owner = block;
    return tensor;
}

// Where the sizes and places of large files are, if not in the entry itself.
uint64_t large(const Reader& reader, std::string_view extra, uint32_t value, size_t& at) {
    if (value != UINT32_MAX) return value;
    while (extra.size() >= 4) {
        uint16_t kind = 0, size = 0;
        std::memcpy(&kind, extra.data(), 2);
        std::memcpy(&size, extra.data() + 2, 2);
        if (kind == 1 && at + 8 <= size && extra.size() >= 4 + at + 8) {
            uint64_t found = 0;
            std::memcpy(&found, extra.data() + 4 + at, 8);
            at += 8;
            return found;
        }
        extra.remove_prefix(std::min<size_t>(extra.size(), size_t{4} + size));
    }
    reader.complain("an entry without its size");
}

template <typename... T>
void put(std::string& out, T... values) {
    (out.append(reinterpret_cast<const char*>(&values), sizeof values), ...);
}

std::string npy_of(const Tensor& tensor) {
    std::string header = "{'descr': '" + code_of(tensor.dtype) + "', 'fortran_order': False, 'shape': (";
    for (const int64_t size : tensor.shape) header += std::to_string(size) + ", ";
    if (tensor.shape.size() > 1) header.resize(header.size() - 2);
    header += "), }";
    header.append(63 - (header.size() + 10) % 64, ' ');
    header += '\n';
    std::string out = "\x93NUMPY";
    put(out, uint8_t{1}, uint8_t{0}, static_cast<uint16_t>(header.size()));
    out += header;
    return out.append(static_cast<const char*>(tensor.data), tensor.bytes());
}

}  // namespace

std::map<std::string, Tensor> read_npz(const std::string& path) {
    const Mapping file(path, true);
    const Reader reader(file.bytes(), path);
    if (reader.size() < kEndSize) reader.complain("it is too short");
    size_t end = reader.size() - kEndSize;
    const size_t least = end - std::min<size_t>(end, UINT16_MAX);  // a comment may follow
    while (reader.get<uint32_t>(end) != kEnd) {
        if (end-- == least) reader.complain("no end of a zip archive");
    }
    const auto entries = reader.get<uint16_t>(end + 10);
    size_t at = reader.get<uint32_t>(end + 16);
    std::map<std::string, Tensor> arrays;
    for (int i = 0; i < entries; ++i) {
        if (reader.get<uint32_t>(at) != kCentral) reader.complain("a damaged directory");
        const auto method = reader.get<uint16_t>(at + 10);
        const auto name_size = reader.get<uint16_t>(at + 28), extra_size = reader.get<uint16_t>(at + 30);
        std::string name(reader.slice(at + kCentralSize, name_size));
        const std::string_view extra = reader.slice(at + kCentralSize + name_size, extra_size);
        size_t used = 0;
        const uint64_t size = large(reader, extra, reader.get<uint32_t>(at + 24), used);
        const uint64_t packed = large(reader, extra, reader.get<uint32_t>(at + 20), used);
        const uint64_t place = large(reader, extra, reader.get<uint32_t>(at + 42), used);
        if (reader.get<uint32_t>(place) != kLocal) reader.complain("a damaged entry");
        const size_t skip = kLocalSize + reader.get<uint16_t>(place + 26) + reader.get<uint16_t>(place + 28);
        const std::string_view data = reader.slice(place + skip, packed);
        // No more than 1032 bytes come of one (RFC 1951): a larger claim is a lie.
        if (size > 1032 * (packed + 1)) reader.complain("an entry that claims an impossible size");
        std::string content;
        if (method == kDeflated) {
            content = inflate(data, size, path);
        } else if (method == kStored && size == packed) {
            content = data;
        } else {
            reader.complain("an entry compressed by method " + std::to_string(method) +
                            "; numpy.savez and savez_compressed write what can be read");
        }
        if (crc32(content) != reader.get<uint32_t>(at + 16)) reader.complain("a wrong checksum");
        const size_t dot = name.rfind(".npy");
        if (dot != std::string::npos && dot + 4 == name.size()) name.resize(dot);
        arrays[name] = read_array(content, path);
        at += kCentralSize + name_size + extra_size + reader.get<uint16_t>(at + 32);
    }
    return arrays;
}

void write_npz(const std::string& path, const std::map<std::string, Tensor>& arrays) {
    std::string out, directory;
    for (const auto& [array, tensor] : arrays) {
        const std::string name = array + ".npy", content = npy_of(tensor);
        if (out.size() + content.size() + name.size() > UINT32_MAX - 4096) {
            fail(path + ": results of more than 4 GB cannot be written");
        }
        const auto place = static_cast<uint32_t>(out.size());
        const auto size = static_cast<uint32_t>(content.size());
        const uint16_t version = 20, flags = 0, time = 0, date = 0x21;  // 1980-01-01
        std::string shared;
        put(shared, version, flags, kStored, time, date, crc32(content), size, size,
            static_cast<uint16_t>(name.size()), uint16_t{0});
        put(out, kLocal);
        out += shared + name + content;
        put(directory, kCentral, version);
        directory += shared;
        put(directory, uint16_t{0}, uint16_t{0}, uint16_t{0}, uint32_t{0}, place);
        directory += name;
    }
    const auto count = static_cast<uint16_t>(arrays.size());
    const auto place = static_cast<uint32_t>(out.size());
    out += directory;
    put(out, kEnd, uint16_t{0}, uint16_t{0}, count, count, static_cast<uint32_t>(directory.size()),
        place, uint16_t{0});
    write_file(path, out);
}

}  // namespace mx
