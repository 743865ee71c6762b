// The threads of parallel.h. Where PyTorch uses an OpenMP runtime, as on Linux and macOS, these are its threads, so that
// two pools don't compete for the processors; it is found by its names among what PyTorch was linked with, so that nothing
// has to be linked here. Elsewhere they are a pool of our own, made of what the operating system has.
//
// The pool grows to what a call asks for, and its threads stay: they look for work for a while and then sleep. One call
// has it at a time: another one, from a body or from another thread, runs in its own thread alone. A forked process
// starts a pool of its own. The library stays loaded once it has threads.

#include "parallel.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#endif

#include "export.h"

// glibc 2.34 moved these functions to another of its libraries, under a new version. By the version that they had, which
// it keeps, a library that is built with a new glibc also runs with an old one. Programs, which the tests link with
// sanitizers or as a whole, take what their linker finds.
#if defined(__GLIBC__) && defined(MM_SOURCES)
#if defined(__x86_64__)
#define MM_OLD_VERSION(name) __asm__(".symver " #name "," #name "@GLIBC_2.2.5")
#elif defined(__aarch64__)
#define MM_OLD_VERSION(name) __asm__(".symver " #name "," #name "@GLIBC_2.17")
#endif
#if defined(MM_OLD_VERSION)
MM_OLD_VERSION(dladdr);
MM_OLD_VERSION(dlopen);
MM_OLD_VERSION(dlsym);
MM_OLD_VERSION(pthread_attr_setstacksize);
MM_OLD_VERSION(pthread_create);
#endif
#endif

namespace mm_rec {
namespace {

constexpr int MOST_THREADS = 1 << 10;
constexpr int STACK_BYTES = 4 << 20;  // macOS would give half a megabyte
constexpr int SPINS = 1 << 12;        // looks for work, or for its end, before a thread gives the processor away

struct Worker {
    int index;
    uint64_t seen;  // the job before its first
};
void work(const Worker& self);

#if defined(_WIN32)

SRWLOCK lock = SRWLOCK_INIT;
CONDITION_VARIABLE woken = CONDITION_VARIABLE_INIT;

void acquire() { AcquireSRWLockExclusive(&lock); }
void release() { ReleaseSRWLockExclusive(&lock); }
void sleep_until_woken() { SleepConditionVariableSRW(&woken, &lock, INFINITE, 0); }
void wake_all() { WakeAllConditionVariable(&woken); }

DWORD WINAPI thread_main(void* worker) {
    work(*static_cast<Worker*>(worker));
    return 0;
}
bool start_thread(Worker* worker) {
    HANDLE thread = CreateThread(nullptr, STACK_BYTES, thread_main, worker, STACK_SIZE_PARAM_IS_A_RESERVATION, nullptr);
    return thread && CloseHandle(thread);
}
void stay_loaded() {
    HMODULE self;
    const DWORD how = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_PIN;
    GetModuleHandleExA(how, reinterpret_cast<const char*>(&stay_loaded), &self);
}
void prepare_for_forks() {}

#else

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t woken = PTHREAD_COND_INITIALIZER;

void acquire() { pthread_mutex_lock(&lock); }
void release() { pthread_mutex_unlock(&lock); }
void sleep_until_woken() { pthread_cond_wait(&woken, &lock); }
void wake_all() { pthread_cond_broadcast(&woken); }

void* thread_main(void* worker) {
    work(*static_cast<Worker*>(worker));
    return nullptr;
}
bool start_thread(Worker* worker) {
    pthread_attr_t how;
    pthread_attr_init(&how);
    pthread_attr_setdetachstate(&how, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&how, STACK_BYTES);
    pthread_t thread;
    const bool started = pthread_create(&thread, &how, thread_main, worker) == 0;
    pthread_attr_destroy(&how);
    return started;
}
void stay_loaded() {  // by a handle that is never given back
    Dl_info self;
    if (dladdr(reinterpret_cast<void*>(&stay_loaded), &self)) dlopen(self.dli_fname, RTLD_NOW);
}
void forget_workers();
void prepare_for_forks() { pthread_atfork(nullptr, nullptr, forget_workers); }

#endif

Worker workers[MOST_THREADS];
int busy;      // whether a call has the pool
int started;   // threads of the pool; the caller is one more
int sleeping;  // of these
uint64_t job;  // its number and, in the lowest bits, its threads: what workers wait for
int running;   // workers that are not through with it
ThreadBody job_body;
const void* job_context;

uint64_t next_job(uint64_t seen) {
    uint64_t now;
    for (int spins = 0; spins < SPINS; ++spins) {
        if ((now = __atomic_load_n(&job, __ATOMIC_ACQUIRE)) != seen) return now;
        pause_thread();
    }
    acquire();
    __atomic_fetch_add(&sleeping, 1, __ATOMIC_SEQ_CST);  // before the last look: who brings a job looks here after it
    while ((now = __atomic_load_n(&job, __ATOMIC_SEQ_CST)) == seen) sleep_until_woken();
    __atomic_fetch_sub(&sleeping, 1, __ATOMIC_SEQ_CST);
    release();
    return now;
}

void work(const Worker& self) {
    for (uint64_t now = self.seen;;) {
        now = next_job(now);
        const int threads = int(now % (2 * MOST_THREADS));
        if (self.index >= threads) continue;
        job_body(job_context, self.index, threads);
        __atomic_fetch_sub(&running, 1, __ATOMIC_RELEASE);
    }
}

// Returns how many threads there are for a job: all that were asked for, or those that the system lets us have.
int grow_pool(int threads) {
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    static bool prepared = false;
    if (!prepared) {
        prepared = true;
        stay_loaded();
        prepare_for_forks();
    }
    for (; started < threads - 1; ++started) {
        workers[started] = {started + 1, job};
        if (!start_thread(&workers[started])) break;
    }
    return threads <= started + 1 ? threads : started + 1;
}

void run_in_pool(int threads, ThreadBody body, const void* context) {
    if (__atomic_exchange_n(&busy, 1, __ATOMIC_ACQUIRE)) return body(context, 0, 1);
    threads = grow_pool(threads);
    job_body = body;
    job_context = context;
    __atomic_store_n(&running, threads - 1, __ATOMIC_RELAXED);
    const uint64_t number = job / (2 * MOST_THREADS) + 1;
    __atomic_store_n(&job, number * (2 * MOST_THREADS) + uint64_t(threads), __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&sleeping, __ATOMIC_SEQ_CST)) {
        acquire();
        wake_all();
        release();
    }
    body(context, 0, threads);
    for (int spins = 0; __atomic_load_n(&running, __ATOMIC_ACQUIRE); ++spins)
        spins < SPINS ? pause_thread() : yield_thread();
    __atomic_store_n(&busy, 0, __ATOMIC_RELEASE);
}

#if !defined(_WIN32)
void forget_workers() {  // in a forked process, which has the one thread that forked
    pthread_mutex_init(&lock, nullptr);
    pthread_cond_init(&woken, nullptr);
    busy = started = sleeping = running = 0;
}

// What GCC's compiler calls for `#pragma omp parallel`; the runtimes of Clang and Intel have it, too.
struct OpenMP {
    void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
    int (*thread)();
    int (*threads)();
} openmp;

struct OpenMPJob {
    ThreadBody body;
    const void* context;
};
void run_openmp_job(void* data) {
    const OpenMPJob& own = *static_cast<const OpenMPJob*>(data);
    own.body(own.context, openmp.thread(), openmp.threads());
}

template <class F>
bool find(void* library, F*& function, const char* name) {
    return (function = reinterpret_cast<F*>(dlsym(library, name)));
}

// Among the names that everybody sees (RTLD_DEFAULT) it would not do to look: PyTorch's runtime is there on Linux x86-64
// alone, and that of another package may be.
bool find_openmp(const char* user) {
    void* const library = dlopen(user, RTLD_LAZY | RTLD_NOLOAD);
    return library && find(library, openmp.parallel, "GOMP_parallel") &&
           find(library, openmp.thread, "omp_get_thread_num") && find(library, openmp.threads, "omp_get_num_threads");
}
#else
bool find_openmp(const char*) { return false; }
#endif

int use_openmp;

}  // namespace

void yield_thread() {
#if defined(_WIN32)
    SwitchToThread();
#else
    sched_yield();
#endif
}

void run_threads(int threads, ThreadBody body, const void* context) {
    if (threads <= 1) return body(context, 0, 1);
#if !defined(_WIN32)
    if (use_openmp) {
        OpenMPJob data{body, context};
        return openmp.parallel(run_openmp_job, &data, unsigned(threads), 0);
    }
#endif
    run_in_pool(threads, body, context);
}

}  // namespace mm_rec

// Whether the threads are those of OpenMP from now on: if a library is named, it is loaded, and it or one of those that it
// was linked with is an OpenMP runtime.
MM_PUBLIC int mm_rec_use_openmp(const char* user) {
    return mm_rec::use_openmp = user && mm_rec::find_openmp(user);
}
