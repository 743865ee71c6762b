// Phases that threads walk through together: each takes what is left of a phase, and all go on when it is done.
//
// A phase waits for its work, not for its threads. A thread that the system has put aside holds the others up only if
// it was in the middle of something, and finds itself passed by when it comes back; with a barrier every phase of a
// step would wait for it, which on a machine with other work takes longer than the step.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace mm_rec {
namespace MM_LEVEL {

struct alignas(64) StepPhase {
    int64_t taken, done;  // units
};

struct Share {
    int64_t begin, end;
};

constexpr int STEP_SPINS = 4096;  // looks at the counter before the processor is offered to others: some 50 us

// Where one thread is; all of them walk through the same phases in the same order.
struct StepWalk {
    StepPhase* phases;
    int64_t threads;
    int64_t phase = 0;  // that is under way, from 1

    // Calls body(Share) until n things, in whole units, are done by all threads together. What is left is taken in
    // smaller and smaller parts. A body may read what earlier phases wrote: no later one begins before it is through.
    template <class F>
    void share(int64_t n, int64_t unit, F body) {
        StepPhase& now = phases[phase++];
        const int64_t units = (n + unit - 1) / unit;
        int64_t begin = __atomic_load_n(&now.taken, __ATOMIC_RELAXED);
        while (begin < units) {
            const int64_t part = threads == 1 ? units : max64(1, (units - begin) / (2 * threads)), end = begin + part;
            constexpr int order = __ATOMIC_RELAXED;  // `done` is what publishes results
            if (!__atomic_compare_exchange_n(&now.taken, &begin, end, true, order, order)) continue;
            body(Share{begin * unit, min64(n, end * unit)});
            __atomic_fetch_add(&now.done, part, __ATOMIC_ACQ_REL);
            begin = __atomic_load_n(&now.taken, __ATOMIC_RELAXED);
        }
        for (int spins = 0; __atomic_load_n(&now.done, __ATOMIC_ACQUIRE) < units; ++spins)
            spins < STEP_SPINS ? pause_thread() : yield_thread();
    }
};

}  // namespace MM_LEVEL
}  // namespace mm_rec
