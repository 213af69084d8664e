#include "bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "cpu.h"
#include "handles.h"
#include "json.h"
#include "sample.h"

namespace mx {
namespace {

using Clock = std::chrono::steady_clock;

std::vector<uint32_t> random_tokens(int64_t count, uint32_t vocabulary) {
    Random random(0);
    std::vector<uint32_t> tokens(static_cast<size_t>(count));
    for (uint32_t& token : tokens) token = static_cast<uint32_t>(random.next() % vocabulary);
    return tokens;
}

// Tokens a second of each repetition, behind `depth` others: of a prompt at once, or one by one.
std::vector<double> measure(mx_session* session, int depth, const std::vector<uint32_t>& tokens,
                            bool at_once, int64_t repetitions) {
    const float* logits = nullptr;
    const auto once = [&] {
        mx_truncate(session, static_cast<size_t>(depth));
        if (at_once) return check(mx_feed(session, tokens.data(), tokens.size(), &logits));
        for (const uint32_t& token : tokens) check(mx_feed(session, &token, 1, &logits));
    };
    once();  // maps the weights, fills the allocator
    std::vector<double> rates;
    for (int64_t i = 0; i < repetitions; ++i) {
        const auto start = Clock::now();
        once();
        const std::chrono::duration<double> spent = Clock::now() - start;
        rates.push_back(static_cast<double>(tokens.size()) / spent.count());
    }
    return rates;
}

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    const size_t half = values.size() / 2;
    return values.size() % 2 != 0 ? values[half] : (values[half - 1] + values[half]) / 2;
}

double deviation(const std::vector<double>& values) {
    if (values.size() < 2) return 0;
    const auto count = static_cast<double>(values.size());
    const double mean = std::accumulate(values.begin(), values.end(), 0.0) / count;
    double squares = 0;
    for (const double value : values) squares += (value - mean) * (value - mean);
    return std::sqrt(squares / (count - 1));
}

}  // namespace

std::string bench(mx_model* model, const BenchOptions& options) {
    if (options.prompt == 0 && options.generated == 0) {
        fail("-p and -n take the tokens of a test; 0 leaves it out");
    }
    mx_info info;
    mx_describe(model, &info);
    const SessionHandle session = start_session(model, 0);
    std::string out = "[";
    const auto test = [&](int depth, int threads, bool at_once) {
        const int64_t size = at_once ? options.prompt : options.generated;
        if (size == 0) return;
        const auto tokens = random_tokens(size, info.vocabulary);
        const auto rates = measure(session.get(), depth, tokens, at_once, options.repetitions);
        const std::string behind = depth != 0 ? " @ d" + std::to_string(depth) : "";
        out += out.size() > 1 ? ",\n {" : "\n {";
        out += "\"model\": " + json::quoted(info.name) +
               ", \"bits_per_weight\": " + json::number(info.bits_per_weight) +
               ", \"weight_bytes\": " + std::to_string(info.weight_bytes) +
               ", \"parameters\": " + std::to_string(info.parameters) +
               ", \"target\": " + json::quoted(info.target) +
               ", \"threads\": " + std::to_string(threads != 0 ? threads : physical_cores()) +
               ", \"depth\": " + std::to_string(depth) +
               ", \"test\": \"" + (at_once ? "pp" : "tg") + std::to_string(size) + behind +
               "\", \"tokens_per_s\": " + json::number(median(rates)) +
               ", \"stddev\": " + json::number(deviation(rates)) + "}";
    };
    for (const int depth : options.depths) {
        mx_truncate(session.get(), 0);
        const auto before = random_tokens(depth, info.vocabulary);
        const float* logits = nullptr;
        if (depth != 0) check(mx_feed(session.get(), before.data(), before.size(), &logits));
        for (const int threads : options.threads.empty() ? std::vector<int>{0} : options.threads) {
            check(mx_set_threads(threads));
            for (const bool at_once : {true, false}) test(depth, threads, at_once);
        }
    }
    return out + "\n]";
}

}  // namespace mx
