/* Reads paths of artifacts, does all that mxrun.h offers with each, and answers with the exit code
 * that it came to and the error. Built with sanitizers by fuzz_runner.py. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mxrun.h"

static const char kText[] = "The sea I'LL \xc3\xa9t\xc3\xa9 12345\n\n  \xe4\xb8\xad\xe6\x96\x87 <|eos|> \xf0\x9f\x98\x80\xff";

static int listen_to(void* user, uint32_t token, const char* text, size_t size) {
    size_t* heard = user;
    (void)token;
    for (size_t i = 0; i < size; ++i) *heard += (unsigned char)text[i];
    return 0;
}

static int use_text(mx_model* model) {
    uint32_t tokens[256];
    char text[4096];
    size_t count = sizeof tokens / sizeof *tokens, size = sizeof text;
    const int code = mx_encode(model, kText, sizeof kText - 1, tokens, &count);
    return code != 0 ? code : mx_decode(model, tokens, count, text, &size);
}

static int use_session(mx_model* model) {
    const uint32_t tokens[] = {2, 3, 5};
    const mx_sampling how = {1, 0.9, 7};
    mx_session* session = NULL;
    const float* logits = NULL;
    size_t heard = 0;
    int code = mx_start(model, 0, &session);
    if (code != 0) return code;
    code = mx_feed(session, tokens, 3, &logits);
    if (code == 0) {
        mx_info info;
        float sum = 0;
        mx_describe(model, &info);
        for (uint32_t i = 0; i < info.vocabulary; ++i) sum += logits[i];
        heard += sum > 0;
        mx_truncate(session, 1);
        code = mx_generate(session, tokens, 3, 6, &how, 1, listen_to, &heard);
    }
    mx_end(session);
    return code;
}

static int use_arrays(mx_model* model) {
    const int64_t shape[] = {3, 4}, tokens[] = {1, 3};
    const float x[12] = {1, 2, 3};
    const int64_t ids[3] = {2, 3, 4};
    const mx_tensor arrays[] = {{"x", "float32", shape, 2, x}, {"y", "float32", shape, 2, x}};
    const mx_tensor text = {"input_ids", "int64", tokens, 2, ids};
    const mx_tensor* outputs = NULL;
    size_t count = 0;
    mx_info info;
    mx_describe(model, &info);
    return info.decoder ? mx_run(model, &text, 1, &outputs, &count)
                        : mx_run(model, arrays, 2, &outputs, &count);
}

int main(void) {
    char path[4096];
    while (fgets(path, sizeof path, stdin) != NULL) {
        path[strcspn(path, "\n")] = '\0';
        mx_model* model = NULL;
        int code = mx_open(path, &model);
        if (code == 0) {
            mx_info info;
            mx_describe(model, &info);
            int (*const uses[])(mx_model*) = {use_text, use_session, use_arrays};
            for (int i = info.decoder ? 0 : 2; i < 3; ++i) {
                const int found = uses[i](model);
                if (found != 0) code = found;
            }
        }
        mx_close(model);
        printf("%d %s\n", code, code == 0 ? "" : mx_error());
        fflush(stdout);
    }
    _Exit(0); /* without waiting for TVM's idle workers */
}
