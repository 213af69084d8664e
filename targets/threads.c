// The threads that run a program's parallel loops; linked into every program.
//
// TVM's own pool gives each thread its share of a loop beforehand and waits for all of them, so that
// a thread whose core does something else holds up every loop. Here threads take one piece of a loop
// after the other until none is left: one that comes late takes fewer, and one that does not come is
// not waited for. A thread that loses its core with a piece in its hands is, and one that has to share
// the core of the thread that runs the loop only takes time from it. So that little is lost by either,
// such threads rest for many times as long, while the others go on.
//
// TVM fills a pointer of this name in each library that it loads with its own function. Here it is
// defined, and hidden, so that it keeps what is said below.

#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

enum {
    EACH = 2,               // pieces for each thread: more of them break up streams of memory
    MOST = 256,             // threads
    CHECK = 32,             // turns of waiting between two looks at the clock
    SPIN_NS = 1000000,      // before a worker sleeps that waits: longer than between two tokens
    LATE = 4,               // times what a piece takes, and LATE_NS: then its thread has lost its core
    LATE_NS = 200000,
    CROWDED = 8,            // loops in a row after which a thread that shares a core rests
    CROWDED_NS = 500000,    // what these cost
    REST = 8,               // times as long as it was waited for, a thread rests the first time
    REST_MOST = 32          // and in the end, if it is late again and again
};

#define APART __attribute__((aligned(64)))  // words that different threads write: a cache line each

// What TVM hands to a loop's body: the number of pieces, and nothing that ours needs.
typedef struct {
    void* unused;
    int32_t pieces;
} Group;

typedef int (*Body)(int piece, Group* group, void* data);

typedef struct {
    pthread_t thread;
    uint32_t resting;  // whether it is to take no pieces
    uint32_t busy;     // whether it has taken one that is not done
    uint32_t crowded;  // loops since it last did a piece after which it was on the core that runs them
    uint32_t late;     // whether the loop waits for it
    int64_t until;     // when its rest ends
    int64_t length;    // of its rest
    int64_t times;     // so many times as long as it was waited for
} APART Worker;

static struct {  // the current loop; it changes only while no piece can be taken
    Body body;
    void* data;
    int32_t pieces;
    int32_t core;  // that runs it
} APART loop;

static APART uint64_t untaken;  // loops so far << 32 | pieces of the last one that none has taken
static APART int32_t undone;    // pieces of it that are not done
static APART uint32_t begun;    // loops, for threads that sleep
static APART int32_t asleep;    // threads that do
static int32_t waiting;         // whether the thread that runs the loop sleeps
static int32_t failed;          // whether a piece of it has
static int32_t running;         // whether a loop is run
static int32_t working;         // workers that there are
static int32_t wanted;          // workers that are not to end
static int32_t resting;         // workers that rest
static Worker workers[MOST];

#define GET(word) __atomic_load_n(&(word), __ATOMIC_RELAXED)
#define SET(word, value) __atomic_store_n(&(word), value, __ATOMIC_RELAXED)

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");  // takes about as long as x86's pause; yield takes no time
#endif
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void sleep_while(void* word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(void* word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, MOST, NULL, NULL, 0);
}

// Does pieces of the current loop until there are none, and gives how many it did.
static int32_t work(uint32_t* busy) {
    int32_t done = 0;
    uint64_t seen = __atomic_load_n(&untaken, __ATOMIC_ACQUIRE);
    for (uint32_t rest; (rest = (uint32_t)seen) != 0;) {
        // If this loop ends meanwhile, what is read is of another, and nothing is taken.
        const Body body = GET(loop.body);
        void* const data = GET(loop.data);
        Group group = {NULL, GET(loop.pieces)};
        if (!__atomic_compare_exchange_n(&untaken, &seen, seen - 1, 0, __ATOMIC_ACQ_REL,
                                         __ATOMIC_ACQUIRE)) {
            continue;
        }
        SET(*busy, 1);
        if (body(group.pieces - (int32_t)rest, &group, data)) SET(failed, 1);
        SET(*busy, 0);
        ++done;
        if (__atomic_sub_fetch(&undone, 1, __ATOMIC_SEQ_CST) == 0 &&
            __atomic_load_n(&waiting, __ATOMIC_SEQ_CST)) {
            wake(&undone);
        }
        seen = __atomic_load_n(&untaken, __ATOMIC_ACQUIRE);
    }
    return done;
}

static void* serve(void* index) {
    Worker* const self = &workers[(intptr_t)index];
    while ((intptr_t)index < __atomic_load_n(&wanted, __ATOMIC_ACQUIRE)) {
        if (GET(self->resting)) {
            sleep_while(&self->resting, 1);
            continue;
        }
        const uint32_t known = __atomic_load_n(&begun, __ATOMIC_ACQUIRE);
        if (work(&self->busy)) SET(self->crowded, 0);
        int64_t end = 0;
        for (int turn = 1; __atomic_load_n(&begun, __ATOMIC_ACQUIRE) == known; ++turn) {
            pause_briefly();
            if (turn % CHECK) continue;
            const int64_t time = now();
            if (end == 0) end = time + SPIN_NS;
            const int crowded = sched_getcpu() == GET(loop.core);
            if (crowded) SET(self->crowded, GET(self->crowded) + 1);
            if (crowded || time >= end) {
                __atomic_add_fetch(&asleep, 1, __ATOMIC_SEQ_CST);
                sleep_while(&begun, known);
                __atomic_sub_fetch(&asleep, 1, __ATOMIC_SEQ_CST);
                break;
            }
        }
    }
    return NULL;
}

// Lets workers see that there is a loop, or that they are to end.
static void announce(void) {
    __atomic_add_fetch(&begun, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&asleep, __ATOMIC_SEQ_CST)) wake(&begun);
}

static void resume(Worker* worker) {
    SET(worker->resting, 0);
    wake(&worker->resting);
    --resting;
}

// Has as many workers; fewer where the system gives no more threads.
static void employ(int32_t count) {
    __atomic_store_n(&wanted, count, __ATOMIC_RELEASE);
    if (count < working) {
        for (int32_t i = count; i < working; ++i) {
            if (workers[i].resting) resume(&workers[i]);
        }
        announce();
        while (working > count) pthread_join(workers[--working].thread, NULL);
    }
    sigset_t all, before;  // signals are for the threads that the process has by itself
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    while (working < count) {
        Worker* const worker = &workers[working];
        *worker = (Worker){0};
        if (pthread_create(&worker->thread, NULL, serve, (void*)(intptr_t)working)) break;
        ++working;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void rest(Worker* worker, int64_t time, int64_t cost) {
    const int again = time - worker->until < 8 * worker->length;
    worker->times = !again ? REST : worker->times < REST_MOST ? 2 * worker->times : REST_MOST;
    worker->length = worker->times * cost;
    worker->until = time + worker->length;
    SET(worker->crowded, 0);
    SET(worker->resting, 1);
    ++resting;
}

// Sends workers to rest, or back to work.
static void arrange(int64_t time) {
    for (int32_t i = 0; i < working; ++i) {
        Worker* const worker = &workers[i];
        if (worker->resting && time >= worker->until) resume(worker);
        if (!worker->resting && GET(worker->crowded) >= CROWDED) rest(worker, time, CROWDED_NS);
    }
}

// Waits for the pieces that workers do; each is taken to need so long.
static void await(int64_t piece_ns) {
    int64_t start = 0, late = 0;
    int32_t left;
    for (int turn = 1; (left = __atomic_load_n(&undone, __ATOMIC_ACQUIRE)) != 0; ++turn) {
        pause_briefly();
        if (turn % CHECK) continue;
        const int64_t time = now();
        if (start == 0) start = time;
        if (!late && time - start >= LATE * piece_ns + LATE_NS) {
            late = time;
            for (int32_t i = 0; i < working; ++i) workers[i].late = GET(workers[i].busy);
        }
        if (late) {
            // The system may let the thread go on on this core.
            __atomic_store_n(&waiting, 1, __ATOMIC_SEQ_CST);
            sleep_while(&undone, (uint32_t)left);
            __atomic_store_n(&waiting, 0, __ATOMIC_SEQ_CST);
        }
    }
    if (!late) return;
    const int64_t time = now();
    for (int32_t i = 0; i < working; ++i) {
        if (workers[i].late && !workers[i].resting) rest(&workers[i], time, time - start);
        workers[i].late = 0;
    }
}

// How many threads TVM was told to use (runtime.config_threadpool); -1 with an error set.
static int32_t allowed(void) {
    static TVMFFIObjectHandle found;
    TVMFFIAny result = {0};
    TVMFFIObjectHandle count = __atomic_load_n(&found, __ATOMIC_ACQUIRE);
    if (count == NULL) {
        const TVMFFIByteArray name = {"runtime.NumThreads", sizeof "runtime.NumThreads" - 1};
        if (TVMFFIFunctionGetGlobal(&name, &count)) return -1;
        __atomic_store_n(&found, count, __ATOMIC_RELEASE);
    }
    if (TVMFFIFunctionCall(count, NULL, 0, &result)) return -1;
    return result.v_int64 < MOST ? (int32_t)result.v_int64 : MOST;
}

static int run_alone(Body body, void* data, int32_t pieces) {
    Group group = {NULL, pieces};
    int wrong = 0;
    for (int piece = 0; piece < pieces; ++piece) wrong |= body(piece, &group, data);
    return wrong;
}

static int run_together(Body body, void* data, int32_t pieces, int64_t start) {
    SET(loop.body, body);
    SET(loop.data, data);
    SET(loop.pieces, pieces);
    SET(loop.core, sched_getcpu());
    SET(undone, pieces);
    const uint64_t number = (GET(untaken) >> 32) + 1;
    __atomic_store_n(&untaken, number << 32 | (uint32_t)pieces, __ATOMIC_RELEASE);
    announce();
    uint32_t busy;
    const int32_t done = work(&busy);
    await((now() - start) / (done ? done : 1));
    const int wrong = failed;
    failed = 0;
    return wrong;
}

// Runs a loop in so many pieces, 0 for as many as are good; gives 0, or -1 with an error set.
static int launch(Body body, void* data, int32_t pieces) {
    int32_t threads = allowed();
    if (threads < 0) return -1;
    int wrong;
    // One loop at a time has the workers: others, of other threads of the process, run alone.
    if (threads == 1 || __atomic_exchange_n(&running, 1, __ATOMIC_ACQUIRE)) {
        wrong = run_alone(body, data, pieces ? pieces : 1);
    } else {
        if (threads - 1 != working) employ(threads - 1);
        const int64_t time = now();
        arrange(time);
        threads = working - resting + 1;
        wrong = threads == 1 ? run_alone(body, data, pieces ? pieces : 1)
                             : run_together(body, data, pieces ? pieces : EACH * threads, time);
        __atomic_store_n(&running, 0, __ATOMIC_RELEASE);
    }
    if (wrong) TVMFFIErrorSetRaisedFromCStr("RuntimeError", "a kernel failed on one of its threads");
    return wrong ? -1 : 0;
}

// Workers do not come along into a child of the process.
static void forget(void) {
    working = wanted = resting = asleep = running = waiting = 0;
}

__attribute__((constructor)) static void start(void) { pthread_atfork(NULL, NULL, forget); }

__attribute__((destructor)) static void stop(void) { employ(0); }

__attribute__((visibility("hidden"))) int (*__TVMBackendParallelLaunch)(Body, void*, int32_t) =
    launch;
