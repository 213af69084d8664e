#include "inflate.h"

#include <array>
#include <cstdint>

#include "error.h"

namespace mx {
namespace {

constexpr int kLongest = 15;  // bits of a code

// A canonical Huffman code: how many codes each length has, and their symbols in order.
struct Code {
    std::array<uint16_t, kLongest + 1> count{};
    std::array<uint16_t, 288> symbols{};
};

// Of the lengths 3 + base .. and distances 1 + ..: the least value of a symbol and its extra bits.
struct Extra {
    uint16_t base;
    uint8_t bits;
};
constexpr std::array<Extra, 29> kLengths = {
    {{3, 0},  {4, 0},  {5, 0},  {6, 0},  {7, 0},  {8, 0},  {9, 0},   {10, 0},  {11, 1},  {13, 1},
     {15, 1}, {17, 1}, {19, 2}, {23, 2}, {27, 2}, {31, 2}, {35, 3},  {43, 3},  {51, 3},  {59, 3},
     {67, 4}, {83, 4}, {99, 4}, {115, 4}, {131, 5}, {163, 5}, {195, 5}, {227, 5}, {258, 0}}};
constexpr std::array<Extra, 30> kDistances = {
    {{1, 0},     {2, 0},     {3, 0},      {4, 0},      {5, 1},      {7, 1},
     {9, 2},     {13, 2},    {17, 3},     {25, 3},     {33, 4},     {49, 4},
     {65, 5},    {97, 5},    {129, 6},    {193, 6},    {257, 7},    {385, 7},
     {513, 8},   {769, 8},   {1025, 9},   {1537, 9},   {2049, 10},  {3073, 10},
     {4097, 11}, {6145, 11}, {8193, 12},  {12289, 12}, {16385, 13}, {24577, 13}}};

class Inflater {
public:
    Inflater(std::string_view in, size_t size, const std::string& name)
        : in_(in), size_(size), name_(name) {}

    std::string run() {
        bool last = false;
        while (!last) {
            last = bits(1) != 0;
            switch (bits(2)) {
                case 0: stored(); break;
                case 1: fixed(); break;
                case 2: dynamic(); break;
                default: complain();
            }
        }
        if (out_.size() != size_) complain();
        return std::move(out_);
    }

private:
    [[noreturn]] void complain() const { fail(name_ + " is damaged: it cannot be unpacked"); }

    uint32_t bits(int count) {
        while (held_ < count) {
            if (at_ >= in_.size()) complain();
            buffer_ |= uint32_t{static_cast<unsigned char>(in_[at_++])} << held_;
            held_ += 8;
        }
        const uint32_t found = buffer_ & ((1u << count) - 1);
        buffer_ >>= count;
        held_ -= count;
        return found;
    }

    void put(char byte) {
        if (out_.size() >= size_) complain();
        out_ += byte;
    }

    void stored() {
        buffer_ = 0, held_ = 0;  // to the next whole byte
        const uint32_t length = bits(16), inverse = bits(16);
        if (length != (~inverse & 0xFFFF) || length > in_.size() - at_) complain();
        if (length > size_ - out_.size()) complain();
        out_ += in_.substr(at_, length);
        at_ += length;
    }

    static Code code_of(const uint8_t* lengths, size_t count) {
        Code code;
        for (size_t i = 0; i < count; ++i) ++code.count[lengths[i]];
        code.count[0] = 0;
        std::array<uint16_t, kLongest + 2> next{};
        for (size_t i = 1; i <= kLongest; ++i) {
            next[i + 1] = static_cast<uint16_t>(next[i] + code.count[i]);
        }
        for (size_t i = 0; i < count; ++i) {
            if (lengths[i] != 0) code.symbols[next[lengths[i]]++] = static_cast<uint16_t>(i);
        }
        return code;
    }

    uint32_t symbol(const Code& code) {
        int value = 0, first = 0, index = 0;
        for (size_t length = 1; length <= kLongest; ++length) {
            value |= static_cast<int>(bits(1));
            const int count = code.count[length];
            if (value - first < count) return code.symbols[static_cast<size_t>(index + value - first)];
            index += count;
            first = (first + count) << 1;
            value <<= 1;
        }
        complain();
    }

    void fixed() {
        std::array<uint8_t, 288> lengths{};
        for (size_t i = 0; i < lengths.size(); ++i) {
            lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
        }
        std::array<uint8_t, 30> distances{};
        distances.fill(5);
        codes(code_of(lengths.data(), lengths.size()), code_of(distances.data(), distances.size()));
    }

    void dynamic() {
        const uint32_t literals = bits(5) + 257, distances = bits(5) + 1, used = bits(4) + 4;
        if (literals > 286 || distances > 30) complain();
        constexpr std::array<uint8_t, 19> kOrder = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                                    11, 4,  12, 3, 13, 2, 14, 1, 15};
        std::array<uint8_t, 19> meta{};
        for (size_t i = 0; i < used; ++i) meta[kOrder[i]] = static_cast<uint8_t>(bits(3));
        const Code code = code_of(meta.data(), meta.size());
        std::array<uint8_t, 286 + 30> lengths{};
        for (size_t i = 0; i < literals + distances;) {
            const uint32_t found = symbol(code);
            if (found < 16) {
                lengths[i++] = static_cast<uint8_t>(found);
                continue;
            }
            if (found == 16 && i == 0) complain();
            const uint8_t value = found == 16 ? lengths[i - 1] : 0;
            const size_t times = found == 16 ? 3 + bits(2) : found == 17 ? 3 + bits(3) : 11 + bits(7);
            if (times > literals + distances - i) complain();
            for (size_t n = 0; n < times; ++n) lengths[i++] = value;
        }
        codes(code_of(lengths.data(), literals), code_of(lengths.data() + literals, distances));
    }

    void codes(const Code& literals, const Code& distances) {
        for (;;) {
            const uint32_t found = symbol(literals);
            if (found == 256) return;
            if (found < 256) {
                put(static_cast<char>(found));
                continue;
            }
            if (found - 257 >= kLengths.size()) complain();
            const Extra length = kLengths[found - 257];
            size_t count = length.base + bits(length.bits);
            const uint32_t far = symbol(distances);
            if (far >= kDistances.size()) complain();
            const size_t distance = kDistances[far].base + bits(kDistances[far].bits);
            if (distance > out_.size()) complain();
            for (; count != 0; --count) put(out_[out_.size() - distance]);
        }
    }

    std::string_view in_;
    size_t size_;
    const std::string& name_;
    size_t at_ = 0;
    uint32_t buffer_ = 0;
    int held_ = 0;
    std::string out_;
};

}  // namespace

std::string inflate(std::string_view compressed, size_t size, const std::string& name) {
    return Inflater(compressed, size, name).run();
}

}  // namespace mx
