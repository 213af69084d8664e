// Choosing the next token as mxcompile/sample.py does: with a seed, the same tokens.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace mx {

// numpy's default generator: SeedSequence and PCG64 (O'Neill 2014, XSL-RR of 128 bits of state).
class Random {
public:
    explicit Random(uint64_t seed);
    uint64_t next();
    double uniform();  // in [0, 1), 53 bits

private:
    unsigned __int128 state_ = 0, increment_ = 0;
};

struct Sampling {
    double temperature = 0;  // 0: the likeliest
    double top_p = 1;        // choose among the likeliest of this mass
};

// The next token, given `size` logits.
uint32_t choose(const float* logits, size_t size, const Sampling& how, Random& random);

}  // namespace mx
