#include "sample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace mx {
namespace {

// numpy's SeedSequence: entropy words to well mixed state words.
class SeedSequence {
public:
    explicit SeedSequence(uint64_t seed) {
        const uint32_t entropy[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
        constexpr size_t kWords = std::tuple_size<decltype(pool_)>::value;
        for (size_t i = 0; i < kWords; ++i) pool_[i] = scramble(i < 2 ? entropy[i] : 0);
        for (size_t from = 0; from < kWords; ++from) {
            for (size_t to = 0; to < kWords; ++to) {
                if (from != to) pool_[to] = mix(pool_[to], scramble(pool_[from]));
            }
        }
    }

    std::array<uint64_t, 4> state() const {
        std::array<uint64_t, 4> out{};
        uint32_t constant = 0x8b51f9dd;
        for (size_t i = 0; i < 2 * out.size(); ++i) {
            uint32_t word = pool_[i % pool_.size()] ^ constant;
            constant *= 0x58f38ded;
            word *= constant;
            word ^= word >> 16;
            out[i / 2] |= uint64_t{word} << (i % 2 * 32);
        }
        return out;
    }

private:
    uint32_t scramble(uint32_t word) {
        word ^= constant_;
        constant_ *= 0x931e8875;
        word *= constant_;
        return word ^ word >> 16;
    }

    static uint32_t mix(uint32_t x, uint32_t y) {
        const uint32_t word = 0xca01f9dd * x - 0x4973f715 * y;
        return word ^ word >> 16;
    }

    std::array<uint32_t, 4> pool_{};
    uint32_t constant_ = 0x43b0d7e5;
};

unsigned __int128 wide(uint64_t high, uint64_t low) {
    return static_cast<unsigned __int128>(high) << 64 | low;
}

}  // namespace

Random::Random(uint64_t seed) {
    const auto words = SeedSequence(seed).state();
    increment_ = wide(words[2], words[3]) << 1 | 1;
    next();
    state_ += wide(words[0], words[1]);
    next();
}

uint64_t Random::next() {
    state_ = state_ * wide(0x2360ed051fc65da4, 0x4385df649fccf645) + increment_;
    const auto high = static_cast<uint64_t>(state_ >> 64), low = static_cast<uint64_t>(state_);
    const auto turn = static_cast<unsigned>(high >> 58);
    const uint64_t mixed = high ^ low;
    return mixed >> turn | mixed << (-turn & 63);
}

double Random::uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

uint32_t choose(const float* logits, size_t size, const Sampling& how, Random& random) {
    const float* likeliest = std::max_element(logits, logits + size);
    if (how.temperature == 0) return static_cast<uint32_t>(likeliest - logits);
    std::vector<double> mass(size);
    for (size_t i = 0; i < size; ++i) {
        mass[i] = std::exp((static_cast<double>(logits[i]) - *likeliest) / how.temperature);
    }
    std::vector<uint32_t> order(size);
    std::iota(order.begin(), order.end(), 0);
    if (how.top_p < 1) {
        // The fewest likeliest that reach top_p together; a few are nearly always enough to sort.
        constexpr size_t kFirst = 256;
        const double wanted = how.top_p * std::accumulate(mass.begin(), mass.end(), 0.0);
        const auto before = [&](uint32_t a, uint32_t b) {
            return mass[a] != mass[b] ? mass[a] > mass[b] : a < b;
        };
        const auto reach = [&](size_t among) {
            std::partial_sort(order.begin(), order.begin() + static_cast<ptrdiff_t>(among),
                              order.end(), before);
            double sum = 0;
            size_t count = 0;
            while (count < among && sum < wanted) sum += mass[order[count++]];
            return sum < wanted ? size : count;
        };
        size_t count = reach(std::min(kFirst, size));
        if (count == size && size > kFirst) count = reach(size);
        order.resize(std::max<size_t>(count, 1));
    }
    double total = 0;
    for (const uint32_t token : order) total += mass[token];
    const double goal = random.uniform() * total;
    double sum = 0;
    for (const uint32_t token : order) {
        sum += mass[token];
        if (sum > goal) return token;
    }
    return order.back();
}

}  // namespace mx
