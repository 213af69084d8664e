// The command line of mxrun, on its C interface.

#include <sys/random.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "bench.h"
#include "handles.h"
#include "json.h"
#include "npz.h"
#include "serve.h"

namespace {

constexpr const char* kHelp = R"(usage: mxrun MODEL.mxc --prompt TEXT [options]
       mxrun MODEL.mxc --input IN.npz --output OUT.npz [-t N]
       mxrun MODEL.mxc --bench [-p N] [-n N] [-d N,..] [-t N,..] [-r N]
       mxrun MODEL.mxc|tokenizer.json --encode|--decode
       mxrun --serve --tracker HOST:PORT --key KEY [--port N]

--prompt TEXT     continue a text; - reads it from standard input
  -n, --tokens N    at most (default: 128)
  --temperature T   0, the default, is greedy
  --top-p P         choose from this mass (default: 1)
  --seed N          makes random choices repeatable
  --context N       tokens to remember (default: all it can)
  --ignore-eos      go on after the text has ended
  --json            print one JSON document
  -q, --quiet       print the text only
--input, --output arrays to run a model on, and where its results go
--bench           tokens a second, as JSON; -p, -n and -d as for mxcompile bench, -r repetitions
--encode          lines of JSON strings to lines of tokens; --decode is the other way
--serve           let `mxcompile tune` and `bench --rpc` measure here: for a network that is
                  trusted, as whoever reaches it can run anything; --port is the first to try
-t, --threads N   (default: one a physical core)
--version, --help

exit codes: 0 done, 1 bug, 2 usage or a damaged file, 5 not supported
)";

using Clock = std::chrono::steady_clock;
using mx::check, mx::json::number;

double seconds(Clock::time_point from, Clock::time_point to) {
    return std::chrono::duration<double>(to - from).count();
}

struct Options {
    std::string model, prompt, input, output;
    bool has_prompt = false, bench = false, encode = false, decode = false;
    bool ignore_eos = false, json = false, quiet = false, has_seed = false;
    mx_sampling sampling = {0, 1, 0};
    int64_t prompt_tokens = 256, tokens = -1, context = 0, repetitions = 5;
    std::vector<int> threads, depths = {0};
    bool serve = false;
    mx::ServeOptions serving;
};

int64_t whole(const std::string& text, const std::string& option, int64_t least) {
    int64_t found = 0;
    const auto result = std::from_chars(text.data(), text.data() + text.size(), found);
    const bool fits = result.ec == std::errc() && result.ptr == text.data() + text.size();
    if (!fits || found < least || found > INT32_MAX) {
        mx::fail(option + " '" + text + "' is not a whole number of " + std::to_string(least) + " or more");
    }
    return found;
}

double real(const std::string& text, const std::string& option) {
    char* end = nullptr;
    const double found = std::strtod(text.c_str(), &end);
    if (text.empty() || *end != '\0') mx::fail(option + " '" + text + "' is not a number");
    return found;
}

uint64_t seed(const std::string& text) {
    uint64_t found = 0;
    const auto result = std::from_chars(text.data(), text.data() + text.size(), found);
    if (result.ec != std::errc() || result.ptr != text.data() + text.size()) {
        mx::fail("--seed '" + text + "' is not a whole number of 64 bits");
    }
    return found;
}

std::vector<int> counts(const std::string& text, const std::string& option, int64_t least) {
    std::vector<int> found;
    for (size_t at = 0; at <= text.size();) {
        const size_t comma = std::min(text.find(',', at), text.size());
        found.push_back(static_cast<int>(whole(text.substr(at, comma - at), option, least)));
        at = comma + 1;
    }
    return found;
}

Options parse(int argc, char** argv) {
    Options options;
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        const auto value = [&]() -> std::string {
            if (++i == argc) mx::fail(word + " needs a value; see mxrun --help");
            return argv[i];
        };
        if (word == "--prompt") {
            options.prompt = value();
            options.has_prompt = true;
        } else if (word == "-n" || word == "--tokens" || word == "--generate") {
            options.tokens = whole(value(), word, 0);
        } else if (word == "--temperature") {
            options.sampling.temperature = real(value(), word);
        } else if (word == "--top-p") {
            options.sampling.top_p = real(value(), word);
        } else if (word == "--seed") {
            options.sampling.seed = seed(value());
            options.has_seed = true;
        } else if (word == "--context") {
            options.context = whole(value(), word, 1);
        } else if (word == "-p") {
            options.prompt_tokens = whole(value(), word, 0);
        } else if (word == "-d" || word == "--depth") {
            options.depths = counts(value(), word, 0);
        } else if (word == "-r" || word == "--repetitions") {
            options.repetitions = whole(value(), word, 1);
        } else if (word == "-t" || word == "--threads") {
            options.threads = counts(value(), word, 1);
        } else if (word == "--input") {
            options.input = value();
        } else if (word == "--output") {
            options.output = value();
        } else if (word == "--bench") {
            options.bench = true;
        } else if (word == "--serve") {
            options.serve = true;
        } else if (word == "--tracker") {
            options.serving.tracker = value();
        } else if (word == "--key") {
            options.serving.key = value();
        } else if (word == "--port") {
            options.serving.port = static_cast<int>(whole(value(), word, 1));
        } else if (word == "--encode") {
            options.encode = true;
        } else if (word == "--decode") {
            options.decode = true;
        } else if (word == "--ignore-eos") {
            options.ignore_eos = true;
        } else if (word == "--json") {
            options.json = true;
        } else if (word == "-q" || word == "--quiet") {
            options.quiet = true;
        } else if (word[0] == '-') {
            mx::fail("no option " + word + "; see mxrun --help");
        } else if (options.model.empty()) {
            options.model = word;
        } else {
            mx::fail("more than one model: " + word + "; see mxrun --help");
        }
    }
    if (options.serve) {
        if (options.serving.tracker.empty() || options.serving.key.empty()) {
            mx::fail("--serve needs --tracker HOST:PORT and --key KEY");
        }
        return options;
    }
    if (options.model.empty()) mx::fail("no model; see mxrun --help");
    if (options.input.empty() != options.output.empty()) mx::fail("--input and --output go together");
    const int actions = options.has_prompt + !options.input.empty() + options.bench +
                        options.encode + options.decode;
    if (actions != 1) mx::fail("one of --prompt, --input, --bench, --encode and --decode is needed");
    if (!options.bench && options.threads.size() > 1) mx::fail("several --threads are for --bench");
    return options;
}

std::vector<uint32_t> encode(mx_model* model, const std::string& text) {
    std::vector<uint32_t> tokens(text.size() + 16);
    size_t count = tokens.size();
    if (mx_encode(model, text.data(), text.size(), tokens.data(), &count) != 0) {
        if (count <= tokens.size()) check(mx_encode(model, text.data(), text.size(), tokens.data(), &count));
        tokens.resize(count);
        check(mx_encode(model, text.data(), text.size(), tokens.data(), &count));
    }
    tokens.resize(count);
    return tokens;
}

std::string decode(mx_model* model, const std::vector<uint32_t>& tokens) {
    std::string text;
    size_t size = 0;
    mx_decode(model, tokens.data(), tokens.size(), text.data(), &size);  // asks for the size
    text.resize(size);
    check(mx_decode(model, tokens.data(), tokens.size(), text.data(), &size));
    return text;
}

struct Heard {
    std::vector<uint32_t> tokens;
    std::vector<Clock::time_point> times;
    bool print;
};

int hear(void* user, uint32_t token, const char* text, size_t size) {
    auto& heard = *static_cast<Heard*>(user);
    heard.times.push_back(Clock::now());
    heard.tokens.push_back(token);
    if (!heard.print) return 0;
    std::fwrite(text, 1, size, stdout);
    return std::fflush(stdout);
}

std::string listed(const std::vector<uint32_t>& tokens) {
    std::string out = "[";
    for (const uint32_t token : tokens) {
        if (out.size() > 1) out += ", ";
        out += std::to_string(token);
    }
    return out + "]";
}

void generate(const Options& options, mx_model* model) {
    const mx::SessionHandle session = mx::start_session(model, options.context);
    std::string text = options.prompt;
    if (text == "-") text.assign(std::istreambuf_iterator<char>(std::cin), {});
    mx_sampling sampling = options.sampling;
    if (!options.has_seed && getrandom(&sampling.seed, sizeof sampling.seed, 0) < 0) {
        mx::fail("no random numbers; give --seed");
    }
    const std::vector<uint32_t> prompt = encode(model, text);
    const auto limit = static_cast<size_t>(options.tokens < 0 ? 128 : options.tokens);
    Heard heard = {{}, {Clock::now()}, !options.json};
    check(mx_generate(session.get(), prompt.data(), prompt.size(), limit, &sampling,
                      options.ignore_eos, hear, &heard));
    const auto& times = heard.times;
    const double before = times.size() < 3 ? 0 : seconds(times[0], times[1]);
    const double after = times.size() < 3 ? 0 : seconds(times[1], times.back());
    const double prefill = static_cast<double>(prompt.size()) / before;
    const double rate = static_cast<double>(times.size() - 2) / after;
    if (options.json) {
        std::string out = "{\"text\": " + mx::json::quoted(decode(model, heard.tokens)) +
                          ", \"tokens\": " + listed(heard.tokens) +
                          ", \"prompt_tokens\": " + std::to_string(prompt.size());
        if (times.size() >= 3) {
            out += ", \"prefill_tokens_per_s\": " + number(prefill) +
                   ", \"decode_tokens_per_s\": " + number(rate);
        }
        std::printf("%s}\n", out.c_str());
        return;
    }
    std::printf("\n");
    std::fflush(stdout);
    if (options.quiet) return;
    std::fprintf(stderr, "\n%zu + %zu tokens", prompt.size(), heard.tokens.size());
    if (times.size() >= 3) {
        std::fprintf(stderr, ", prefill %.1f tokens/s, decode %.1f tokens/s", prefill, rate);
    }
    std::fprintf(stderr, "\n");
}

void run_arrays(const Options& options, mx_model* model) {
    const auto feeds = mx::read_npz(options.input);
    std::vector<mx_tensor> inputs;
    for (const auto& [name, tensor] : feeds) {
        inputs.push_back({name.c_str(), tensor.dtype.c_str(), tensor.shape.data(),
                          tensor.shape.size(), tensor.data});
    }
    const mx_tensor* outputs = nullptr;
    size_t count = 0;
    const auto start = Clock::now();
    check(mx_run(model, inputs.data(), inputs.size(), &outputs, &count));
    const double spent = seconds(start, Clock::now());
    std::map<std::string, mx::Tensor> results;
    for (size_t i = 0; i < count; ++i) {
        const mx_tensor& output = outputs[i];
        results[output.name] = {
            output.dtype, {output.shape, output.shape + output.rank}, output.data, nullptr};
    }
    mx::write_npz(options.output, results);
    if (!options.quiet) std::fprintf(stderr, "%s written in %.3f s\n", options.output.c_str(), spent);
}

// For each line: a JSON string to a list of tokens, or the other way.
void translate(const Options& options, mx_model* model) {
    for (std::string line; std::getline(std::cin, line);) {
        const mx::json::Document document(line, "a line");
        if (options.encode) {
            const auto tokens = encode(model, std::string(document.root().string()));
            std::printf("%s\n", listed(tokens).c_str());
        } else {
            std::vector<uint32_t> tokens;
            document.root().each([&](mx::json::Value value) { tokens.push_back(value.token()); });
            std::printf("%s\n", mx::json::quoted(decode(model, tokens)).c_str());
        }
    }
}

void run(const Options& options) {
    if (options.serve) mx::serve(options.serving);
    check(mx_set_threads(options.threads.empty() ? 0 : options.threads[0]));
    const mx::ModelHandle model = mx::open_model(options.model);
    mx_model* opened = model.get();
    if (options.has_prompt) {
        generate(options, opened);
    } else if (options.bench) {
        const int64_t generated = options.tokens < 0 ? 64 : options.tokens;
        const mx::BenchOptions how = {options.prompt_tokens, generated, options.threads,
                                      options.depths, options.repetitions};
        std::printf("%s\n", mx::bench(opened, how).c_str());
    } else if (options.encode || options.decode) {
        translate(options, opened);
    } else {
        run_arrays(options, opened);
    }
    if (std::fflush(stdout) != 0) mx::fail("standard output cannot be written");
}

int complain(int code, std::string text) {
    std::replace(text.begin(), text.end(), '\n', ' ');
    std::fprintf(stderr, "mxrun: error: %s\n", text.c_str());
    return code;
}

}  // namespace

int main(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        if (word == "-h" || word == "--help") return std::fputs(kHelp, stdout) < 0;
        if (word == "--version") {
            return std::printf("mxrun for TVM %s\n", MXRUN_TVM_VERSION) < 0;
        }
    }
    int code = 0;
    try {
        run(parse(argc, argv));
    } catch (const mx::Error& error) {
        code = complain(static_cast<int>(error.code), error.what());
    } catch (const std::bad_alloc&) {
        code = complain(static_cast<int>(mx::Exit::kUsage), "out of memory");
    } catch (const std::exception& error) {
        code = complain(static_cast<int>(mx::Exit::kBug), error.what());
    }
    // TVM's idle workers look for work 300,000 times before they see that the process ends: 0.1 s,
    // or minutes on a busy machine. Nobody waits for them.
    std::fflush(stdout);
    std::_Exit(code);
}
