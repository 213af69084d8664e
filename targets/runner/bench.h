// How fast a language model reads and writes, as mxcompile/bench.py measures it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "mxrun.h"

namespace mx {

struct BenchOptions {
    int64_t prompt, generated;  // tokens of the two tests; 0 leaves one out
    std::vector<int> threads;   // each test runs with each number; none means one a physical core
    std::vector<int> depths;    // and behind each number of tokens
    int64_t repetitions;
};

// The rows of `mxcompile bench --json`, as text.
std::string bench(mx_model* model, const BenchOptions& options);

}  // namespace mx
