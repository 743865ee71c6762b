// What the processor can run. Compiled for the oldest one.

#include <stdint.h>
#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define MM_EXPORT extern "C" __attribute__((visibility("default")))

// Raised with every change of the C interface, so that an old library is told from a broken one.
MM_EXPORT int mm_rec_interface() { return 5; }

// Whether this process may use the tile registers of AMX: Linux wants to be asked, since they add 8 kB to the state of
// every thread that does.
static bool has_tiles() {
#if defined(__linux__) && defined(__x86_64__)
    constexpr int ASK_FOR_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    constexpr unsigned TILES = 1u << 24 | 1u << 22;        // AMX-TILE, AMX-BF16; compilers know their names only lately
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILES) == TILES &&
           syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0;
#else
    return false;
#endif
}

// Index into {baseline, avx2, avx512, avx512bf16, amx}: the best level that processor and operating system support.
MM_EXPORT int mm_rec_best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = __builtin_cpu_supports("avx512bf16");
    return !avx2 ? 0 : !avx512 ? 1 : !bf16 ? 2 : !has_tiles() ? 3 : 4;
#else
    return 0;
#endif
}
