// What the library was built from, and what the processor can run. Compiled for the oldest one.

#include <stdint.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "export.h"

#if defined(MM_SOURCES)  // by mm_rec/cpp/build.py, for the library; the programs of the tests have none
// A hash of the sources and flags that this library was built from, by which a library of other sources is told.
MM_PUBLIC uint64_t mm_rec_sources() { return MM_SOURCES; }
#endif

#if defined(__x86_64__)

// Words of what the processor says of itself; 0 if it does not know the question.
struct Answer {
    unsigned a = 0, b = 0, c = 0, d = 0;
    Answer(unsigned question, unsigned part) { __get_cpuid_count(question, part, &a, &b, &c, &d); }
};

// Registers that the operating system keeps for each thread, as bits.
static unsigned kept_registers() {
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

// Whether this process may use the tile registers of AMX: Linux wants to be asked, since they add 8 kB to the state of
// every thread that does.
static bool may_use_tiles() {
#if defined(__linux__)
    constexpr int ASK_FOR_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    return syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0;
#else
    return false;
#endif
}

// The bits are read here, and not by __builtin_cpu_supports, since not every compiler's library has that.
static int best_level() {
    constexpr unsigned FMA = 1u << 12, OSXSAVE = 1u << 27, AVX2 = 1u << 5;
    constexpr unsigned AVX512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    constexpr unsigned BF16 = 1u << 5, TILES = 1u << 24 | 1u << 22;         // AVX512-BF16; AMX-TILE, AMX-BF16
    constexpr unsigned YMM = 0x6, ZMM = 0xe6;
    const Answer first(1, 0), features(7, 0), more(7, 1);
    const unsigned kept = first.c & OSXSAVE ? kept_registers() : 0;
    const bool avx2 = first.c & FMA && features.b & AVX2 && (kept & YMM) == YMM;
    const bool avx512 = (features.b & AVX512) == AVX512 && (kept & ZMM) == ZMM;
    const bool bf16 = more.a & BF16, tiles = (features.d & TILES) == TILES;
    return !avx2 ? 0 : !avx512 ? 1 : !bf16 ? 2 : !tiles || !may_use_tiles() ? 3 : 4;
}

#else

static int best_level() { return 0; }

#endif

// Index into {baseline, avx2, avx512, avx512bf16, amx}: the best level that processor and operating system support.
MM_PUBLIC int mm_rec_best_level() { return best_level(); }
