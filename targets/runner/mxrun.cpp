#include "mxrun.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <optional>

#include "error.h"
#include "json.h"
#include "program.h"
#include "sample.h"
#include "tokenizer.h"
#include "unicode.h"

struct mx_model {
    std::optional<mx::Program> program;         // not of a bare tokenizer
    std::optional<mx::Tokenizer> tokenizer;     // read when it is first needed
    std::string tokenizer_path;
    std::map<std::string, mx::Tensor> outputs;  // of the last mx_run
    std::vector<mx_tensor> views;
};

struct mx_session {
    mx_session(mx_model* model, int64_t context) : model(model), session(*model->program, context) {}
    mx_model* model;
    mx::Session session;
};

namespace {

thread_local std::string last_error;

template <typename Action>
int guarded(Action action) {
    int code = static_cast<int>(mx::Exit::kBug);
    try {
        action();
        return 0;
    } catch (const mx::Error& error) {
        last_error = error.what();
        code = static_cast<int>(error.code);
    } catch (const std::bad_alloc&) {
        last_error = "out of memory";
        code = static_cast<int>(mx::Exit::kUsage);
    } catch (const std::exception& error) {
        last_error = error.what();
    }
    std::replace(last_error.begin(), last_error.end(), '\n', ' ');
    return code;
}

mx::Tokenizer& tokenizer_of(mx_model& model) {
    if (!model.tokenizer) {
        std::string text;
        if (model.program) {
            const auto& files = model.program->artifact().files;
            const auto found = files.find("tokenizer.json");
            if (found == files.end()) {
                mx::fail(model.program->artifact().folder +
                         " has no tokenizer.json: it cannot be run on text");
            }
            text = found->second->bytes();
            found->second->rest();
        } else {
            text = mx::Mapping(model.tokenizer_path, true).bytes();
        }
        const mx::json::Document document(std::move(text), model.tokenizer_path);
        model.tokenizer.emplace(document);
    }
    return *model.tokenizer;
}

mx::Program& program_of(mx_model& model) {
    if (!model.program) mx::fail(model.tokenizer_path + " is a tokenizer, not a model");
    return *model.program;
}

// Copies a result out, if there is room; `size` becomes its size.
template <typename Found, typename T>
void give(const Found& found, T* out, size_t* size) {
    const size_t room = *size;
    *size = found.size();
    if (found.size() > room) {
        mx::fail("no room for " + std::to_string(found.size()) + ", only for " + std::to_string(room));
    }
    std::copy(found.begin(), found.end(), out);
}

void check(const mx_sampling& how) {
    if (!(how.temperature >= 0 && std::isfinite(how.temperature))) {
        mx::fail("temperature " + std::to_string(how.temperature) + " is not 0 or more");
    }
    if (!(how.top_p > 0 && how.top_p <= 1)) {
        mx::fail("top-p " + std::to_string(how.top_p) + " is not above 0 and at most 1");
    }
}

}  // namespace

const char* mx_error(void) { return last_error.c_str(); }

int mx_set_threads(int count) {
    return guarded([&] { mx::set_threads(count); });
}

int mx_open(const char* path, mx_model** model) {
    return guarded([&] {
        auto opened = std::make_unique<mx_model>();
        std::string name = path;
        while (name.size() > 1 && name.back() == '/') name.pop_back();
        if (name.size() > 5 && name.substr(name.size() - 5) == ".json") {
            opened->tokenizer_path = name;
            tokenizer_of(*opened);
        } else {
            opened->program.emplace(name);
            opened->tokenizer_path = name + "/tokenizer.json";
        }
        *model = opened.release();
    });
}

void mx_close(mx_model* model) { delete model; }

void mx_describe(const mx_model* model, mx_info* info) {
    *info = {};
    info->name = info->target = "";
    if (!model->program) return;
    const mx::Artifact& artifact = model->program->artifact();
    *info = {artifact.manifest.name.c_str(), artifact.manifest.target.c_str(),
             artifact.manifest.decoder, artifact.manifest.parameters, artifact.weight_bytes(),
             artifact.bits_per_weight(), static_cast<uint32_t>(artifact.manifest.vocabulary),
             static_cast<uint32_t>(artifact.manifest.context)};
}

int mx_encode(mx_model* model, const char* text, size_t size, uint32_t* tokens, size_t* count) {
    return guarded([&] {
        give(tokenizer_of(*model).encode(mx::lossy({text, size})), tokens, count);
    });
}

int mx_decode(mx_model* model, const uint32_t* tokens, size_t count, char* text, size_t* size) {
    return guarded([&] {
        give(tokenizer_of(*model).decode({tokens, tokens + count}), text, size);
    });
}

int mx_start(mx_model* model, uint32_t context, mx_session** session) {
    return guarded([&] {
        program_of(*model);
        *session = new mx_session(model, context);
    });
}

void mx_end(mx_session* session) { delete session; }

int mx_feed(mx_session* session, const uint32_t* tokens, size_t count, const float** logits) {
    return guarded([&] { *logits = session->session.feed(tokens, count); });
}

void mx_truncate(mx_session* session, size_t length) {
    session->session.truncate(static_cast<int64_t>(std::min<size_t>(length, INT64_MAX)));
}

int mx_generate(mx_session* session, const uint32_t* tokens, size_t count, size_t limit,
                const mx_sampling* how, int ignore_end, mx_listener listener, void* user) {
    return guarded([&] {
        const mx_sampling greedy = {0, 1, 0};
        if (how == nullptr) how = &greedy;
        check(*how);
        mx::Random random(how->seed);
        mx::TextStream stream(tokenizer_of(*session->model), {tokens, tokens + count});
        const auto& ends = session->model->program->manifest().ends;
        uint32_t token = 0;
        for (size_t i = 0; i < limit; ++i) {
            const float* logits = i == 0 ? session->session.feed(tokens, count)
                                         : session->session.feed(&token, 1);
            token = mx::choose(logits, static_cast<size_t>(session->session.vocabulary()),
                               {how->temperature, how->top_p}, random);
            const bool end = std::find(ends.begin(), ends.end(), token) != ends.end();
            if (end && ignore_end == 0) return;
            const std::string text = stream.push(token);
            if (listener(user, token, text.data(), text.size()) != 0) return;
        }
    });
}

int mx_run(mx_model* model, const mx_tensor* inputs, size_t input_count, const mx_tensor** outputs,
           size_t* output_count) {
    return guarded([&] {
        std::map<std::string, mx::Tensor> feeds;
        for (size_t i = 0; i < input_count; ++i) {
            const mx_tensor& input = inputs[i];
            feeds[input.name] = {
                input.dtype, {input.shape, input.shape + input.rank}, input.data, nullptr};
        }
        model->outputs = program_of(*model).run(feeds);
        model->views.clear();
        for (const auto& [name, tensor] : model->outputs) {
            model->views.push_back({name.c_str(), tensor.dtype.c_str(), tensor.shape.data(),
                                    tensor.shape.size(), tensor.data});
        }
        *outputs = model->views.data();
        *output_count = model->views.size();
    });
}
