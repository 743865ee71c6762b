// The threads of parallel.h by themselves: every part of the work is done once, whoever asks, and from where. Prints
// "done" and the number of loops that ran.

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

static int threads_left = 1 << 20;  // that the system gives
static int give_thread(pthread_t* thread, const pthread_attr_t* how, void* (*body)(void*), void* data) {
    return threads_left-- > 0 ? pthread_create(thread, how, body, data) : EAGAIN;
}
#define pthread_create give_thread
#endif
#include "parallel.cpp"
#undef pthread_create

using namespace mm_rec;

static int loops;

static void check(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

// Returns how many threads had a part.
static int count_up(int64_t n, int threads) {
    std::vector<int> visits(size_t(n), 0);
    std::vector<char> seen(size_t(threads), 0);
    int64_t parts = 0, *all_parts = &parts;
    int* visit = visits.data();
    parallel_ranges(n, threads, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++visit[i];
        __atomic_fetch_add(all_parts, 1, __ATOMIC_RELAXED);
    });
    for (const int times : visits) check(times == 1, "a part was done never, or twice");
    check(parts <= threads, "there were more threads than asked for");
    __atomic_fetch_add(&loops, 1, __ATOMIC_RELAXED);
    return int(parts);
}

static void all_sizes() {
    for (int round = 0; round < 200; ++round)
        for (int threads = 1; threads <= 9; ++threads) {
            const int64_t n = (round * 7 + threads) % 40;
            const int parts = count_up(n, threads);
            check(parts == (n < 1 ? 1 : n < threads ? int(n) : threads), "not as many threads as there is work for");
        }
}

static void from_within() {
    in_threads(4, [](int, int) {
        in_threads(4, [](int, int count) { check(count == 1, "a call within a call has threads"); });
        count_up(10, 3);
    });
}

static void from_several_threads() {
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i)
        callers.emplace_back([] {
            for (int round = 0; round < 300; ++round) count_up(round % 50, 1 + round % 4);
        });
    for (std::thread& caller : callers) caller.join();
}

#if !defined(_WIN32)
static void in_child(void (*body)()) {
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        body();
        _exit(0);
    }
    int status = 1;
    check(waitpid(child, &status, 0) == child && status == 0, "a forked process has no threads");
}
#endif

int main(int, char** arguments) {
    all_sizes();
    from_within();
    from_several_threads();
    check(count_up(1000, MOST_THREADS / 8) == MOST_THREADS / 8, "not as many threads as there is work for");
#if !defined(_WIN32)
    if (arguments[1]) {  // "fork": the sanitizer of threads has none
        in_child([] { all_sizes(); });
        in_child([] {
            threads_left = 2;
            check(count_up(1000, 9) == 3, "not as many threads as the system gives");
            check(count_up(1000, 9) == 3, "and later");
        });
        all_sizes();
    }
#endif
    printf("done %d\n", loops);
}
