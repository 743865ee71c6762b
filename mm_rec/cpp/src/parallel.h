// Loops in several threads. parallel.cpp, which is compiled once, decides which threads these are: those of OpenMP or
// our own. Which part of the work a thread has does not depend on it.
#pragma once

#include <stdint.h>

namespace mm_rec {

using ThreadBody = void (*)(const void* context, int thread, int threads);

// Calls body(context, thread, n) for every thread < n at once, and returns when all are through. n is `threads`, or less
// where so many cannot be had: 1 inside of another call.
void run_threads(int threads, ThreadBody body, const void* context);

// Offers the processor to other threads; and tells it that this one is only waiting.
void yield_thread();
static inline void pause_thread() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

template <class F>
static void in_threads(int threads, F body) {
    const ThreadBody call = [](const void* context, int thread, int count) {
        const F own = *static_cast<const F*>(context);  // a copy that no store of the body can change, for registers
        own(thread, count);
    };
    run_threads(threads, call, &body);
}

// Calls body(begin, end) for parts of 0 ... n - 1 in order, one for each thread, the first ones longer by one.
template <class F>
static void parallel_ranges(int64_t n, int threads, F body) {
    in_threads(n < threads ? int(n) : threads, [=](int thread, int count) {
        const int64_t size = n / count, longer = n % count;
        const int64_t begin = thread * size + (thread < longer ? thread : longer);
        body(begin, begin + size + (thread < longer));
    });
}

// Calls body(i) for every i < n.
template <class F>
static void parallel_for(int64_t n, int threads, F body) {
    parallel_ranges(n, threads, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i);
    });
}

}  // namespace mm_rec
