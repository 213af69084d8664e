/* mxrun: run what mxcompile compiled, from C.
 *
 *     mx_model* model;
 *     mx_session* session;
 *     if (mx_open("tinylm.mxc", &model) != 0 || mx_start(model, 0, &session) != 0) {
 *         fprintf(stderr, "%s\n", mx_error());
 *         return 1;
 *     }
 *     uint32_t tokens[64];
 *     size_t count = 64;
 *     mx_encode(model, "The sea", 7, tokens, &count);
 *     mx_generate(session, tokens, count, 100, NULL, 0, print, NULL);
 *     mx_end(session);
 *     mx_close(model);
 *
 * What gives an int gives 0, or mxcompile's exit code of the error that mx_error() tells: 2 for a
 * wrong request or file, 5 for what is not supported, 1 for a bug. A model and its sessions are for
 * one thread at a time; different models are for different threads.
 */
#ifndef MXRUN_H_
#define MXRUN_H_

#include <stddef.h>
#include <stdint.h>

#define MX_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mx_model mx_model;     /* a loaded artifact */
typedef struct mx_session mx_session; /* a language model with the caches of one text */

typedef struct {
    const char* name;
    const char* target;
    int decoder; /* 1: a language model, 0: another graph */
    int64_t parameters;
    int64_t weight_bytes;
    double bits_per_weight;
    uint32_t vocabulary; /* of a language model, else 0 */
    uint32_t context;    /* the most tokens of a text, likewise */
} mx_info;

typedef struct {
    const char* name;
    const char* dtype; /* as numpy names it: "float32", "int64", ... */
    const int64_t* shape;
    size_t rank;
    const void* data; /* row-major */
} mx_tensor;

typedef struct {
    double temperature; /* 0: always the likeliest token */
    double top_p;       /* choose among the likeliest of this mass; 1: all */
    uint64_t seed;      /* the same seed makes the same choices, here and in mxcompile run */
} mx_sampling;

/* Gets each token with the text that it completes, in UTF-8 and without a NUL at the end; often
 * empty inside a character. Generation ends when it gives something else than 0. */
typedef int (*mx_listener)(void* user, uint32_t token, const char* text, size_t size);

/* One line about the last error of this thread. */
MX_API const char* mx_error(void);

/* Runs the kernels of this process on `count` threads from now on; 0 for one a physical core. */
MX_API int mx_set_threads(int count);

/* Opens an artifact, checks it and maps its weights; mx_close frees it. A tokenizer.json can be
 * opened too: it can encode and decode. */
MX_API int mx_open(const char* path, mx_model** model);
MX_API void mx_close(mx_model* model);
MX_API void mx_describe(const mx_model* model, mx_info* info);

/* Text to tokens with the marks, such as BOS, of the tokenizer; what is not UTF-8 becomes U+FFFD.
 * `count` is the room in `tokens` before and the number of tokens afterwards; if the room does not
 * do, nothing is written and the error says so. */
MX_API int mx_encode(mx_model* model, const char* text, size_t size, uint32_t* tokens, size_t* count);

/* Tokens to text, without marks; `size` as `count` above. */
MX_API int mx_decode(mx_model* model, const uint32_t* tokens, size_t count, char* text, size_t* size);

/* Begins a text of up to `context` tokens, 0 for what the model can. */
MX_API int mx_start(mx_model* model, uint32_t context, mx_session** session);
MX_API void mx_end(mx_session* session);

/* Runs `count` tokens behind those before, and gives the logits of the token that follows, one for
 * each of the vocabulary, valid until the next call. */
MX_API int mx_feed(mx_session* session, const uint32_t* tokens, size_t count, const float** logits);

/* Forgets all but the first `length` tokens. */
MX_API void mx_truncate(mx_session* session, size_t length);

/* Runs `count` tokens, then generates up to `limit`, until one that ends the text, which is not
 * given, unless `ignore_end` is set. `how` may be NULL: greedily. */
MX_API int mx_generate(mx_session* session, const uint32_t* tokens, size_t count, size_t limit,
                const mx_sampling* how, int ignore_end, mx_listener listener, void* user);

/* Runs a model on arrays. The outputs belong to the model and are valid until the next mx_run. */
MX_API int mx_run(mx_model* model, const mx_tensor* inputs, size_t input_count, const mx_tensor** outputs,
           size_t* output_count);

#ifdef __cplusplus
}
#endif

#endif /* MXRUN_H_ */
