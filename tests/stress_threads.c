// Holds the threads of programs against what they promise; see test_threads.py.

#include "../targets/threads.c"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

// What the threads ask of TVM.
static __thread int64_t threads_of_caller = 2;
static int errors;

int TVMFFIFunctionGetGlobal(const TVMFFIByteArray* name, TVMFFIObjectHandle* out) {
    if (strncmp(name->data, "runtime.NumThreads", name->size) != 0) abort();
    *out = &errors;
    return 0;
}

int TVMFFIFunctionCall(TVMFFIObjectHandle function, TVMFFIAny* args, int32_t count,
                       TVMFFIAny* result) {
    (void)args;
    if (function != &errors || count != 0) abort();
    result->v_int64 = threads_of_caller;
    return 0;
}

void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message) {
    (void)kind;
    (void)message;
    ++errors;
}

static void check(int holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "wrong: %s\n", what);
    exit(1);
}

enum { EXTENT = 37 };

typedef struct {
    int seen[EXTENT];   // no atomics: a piece that is done twice at once is a race
    int others;         // pieces that other threads than the caller did
    int bad;            // a piece that fails
    int nap_us;         // how long other threads sleep in a piece
    pthread_t caller;
} Work;

// As TVM compiles a parallel loop: each piece is a part of its range.
static int body_of_loop(int piece, Group* group, void* data) {
    Work* const work_data = data;
    const int step = (EXTENT + group->pieces - 1) / group->pieces;
    for (int i = piece * step; i < (piece + 1) * step && i < EXTENT; ++i) ++work_data->seen[i];
    if (!pthread_equal(pthread_self(), work_data->caller)) {
        __atomic_add_fetch(&work_data->others, 1, __ATOMIC_RELAXED);
        if (work_data->nap_us) usleep((useconds_t)work_data->nap_us);
    }
    return work_data->bad && piece == 1 ? -1 : 0;
}

static int run(Work* work_data, int32_t pieces) {
    return __TVMBackendParallelLaunch(body_of_loop, work_data, pieces);
}

static void* many_loops(void* seed) {
    Work work_data = {.caller = pthread_self()};
    unsigned random = (unsigned)(intptr_t)seed;
    for (int loops = 1; loops <= 20000; ++loops) {
        if (loops % 1000 == 1) threads_of_caller = 1 + rand_r(&random) % 5;
        if (loops % 5000 == 0) usleep(3000);  // longer than threads wait awake
        check(run(&work_data, rand_r(&random) % 3 ? 0 : 50) == 0, "a loop fails");
        for (int i = 0; i < EXTENT; ++i) check(work_data.seen[i] == loops, "not once each");
    }
    return NULL;
}

static void stress(void) {
    pthread_t callers[2];
    for (intptr_t i = 0; i < 2; ++i) pthread_create(&callers[i], NULL, many_loops, (void*)(i + 1));
    for (int i = 0; i < 2; ++i) pthread_join(callers[i], NULL);
}

static void child(void) {
    Work work_data = {.caller = pthread_self()};
    check(run(&work_data, 0) == 0, "before");
    const pid_t id = fork();
    if (id == 0) {
        work_data.caller = pthread_self();
        work_data.others = 0;
        const int64_t start = now();
        while (work_data.others == 0) {
            check(now() - start < INT64_C(20000000000), "the child has threads of its own");
            check(run(&work_data, 0) == 0, "in the child");
        }
        exit(0);  // what ends the threads must not wait for those of the parent
    }
    int status;
    check(waitpid(id, &status, 0) == id && status == 0, "the child");
    check(run(&work_data, 0) == 0, "after");
}

static void failure(void) {
    Work work_data = {.caller = pthread_self(), .bad = 1};
    for (threads_of_caller = 1; threads_of_caller < 4; ++threads_of_caller) {
        errors = 0;
        check(run(&work_data, 4) == -1 && errors == 1, "a failure is told");
    }
    work_data.bad = 0;
    check(run(&work_data, 4) == 0, "and forgotten");
}

// A thread that was long waited for takes no piece for long, and takes part again in the end.
static void late(void) {
    Work work_data = {.caller = pthread_self(), .nap_us = 20000};
    while (work_data.others == 0) run(&work_data, 0);
    work_data.nap_us = work_data.others = 0;
    const int64_t start = now();
    while (now() - start < REST * INT64_C(20000000) / 2) run(&work_data, 0);
    check(work_data.others == 0, "it rests");
    while (work_data.others == 0) {
        check(now() - start < INT64_C(20000000000), "it comes back");
        run(&work_data, 0);
    }
}

int main(int count, char** names) {
    check(count == 2, "one test");
    if (strcmp(names[1], "stress") == 0) stress();
    else if (strcmp(names[1], "child") == 0) child();
    else if (strcmp(names[1], "failure") == 0) failure();
    else if (strcmp(names[1], "late") == 0) late();
    else check(0, "a known test");
    return 0;
}
