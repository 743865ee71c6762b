// What the processor can run. Compiled for the oldest one.

#include <stdint.h>

#define MM_EXPORT extern "C" __attribute__((visibility("default")))

// Raised with every change of the C interface, so that an old library is told from a broken one.
MM_EXPORT int mm_rec_interface() { return 2; }

// Index into {baseline, avx2, avx512, avx512bf16}: the best level that processor and operating system support.
MM_EXPORT int mm_rec_best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = __builtin_cpu_supports("avx512bf16");
    return !avx2 ? 0 : !avx512 ? 1 : !bf16 ? 2 : 3;
#else
    return 0;
#endif
}
