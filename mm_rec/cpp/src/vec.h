// Vectors of W floats, the same source for every instruction set: GCC vector extensions, and intrinsics only
// where those have no word for it. Everything lives in a namespace named after the level that the file is
// compiled for, so that no function compiled for AVX-512 can stand in for its baseline twin at link time.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef MM_LEVEL
#define MM_LEVEL baseline
#endif

// Of the AVX-512 intrinsics the masked forms are used, with all lanes on: the plain ones trip a warning in GCC 12.

namespace mm_rec {
namespace MM_LEVEL {

#if defined(__AVX512F__)
constexpr int W = 16;       // floats in a vector
constexpr int TILE_VECS = 4;  // vectors across a tile of a matrix product; 6 x 4 sums fill 32 registers
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int TILE_VECS = 2;
#elif defined(__aarch64__)
constexpr int W = 4;
constexpr int TILE_VECS = 4;
#else
constexpr int W = 4;
constexpr int TILE_VECS = 2;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
    uint16_t bits;
};

#define MM_INLINE static inline __attribute__((always_inline))

MM_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
MM_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
MM_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

MM_INLINE vf splat(float x) { return x - vf{}; }  // not 0 + x, which is an addition for the sake of -0

// x, loaded once: the compiler would rather load it again for each of its uses.
MM_INLINE vf in_register(vf x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    asm("" : "+x"(x));
#endif
    return x;
}

// bfloat16 rounds to nearest even; a NaN stays one.
MM_INLINE vf widen(vh x) {
#if defined(__AVX512F__)
    return (vf)((vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x) << 16);
#else
    return (vf)(__builtin_convertvector(x, vu) << 16);
#endif
}
MM_INLINE vh narrow(vf x) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    const vu bits = (vu)x;
    const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vu quiet = (bits >> 16) | 0x40;
    return __builtin_convertvector(x == x ? rounded : quiet, vh);
#endif
}
// Pairs of bfloat16, the first element in the lower half; and sum + a b of such pairs.
MM_INLINE vu pairs_of(vh first, vh second) {
    return __builtin_convertvector(first, vu) | (__builtin_convertvector(second, vu) << 16);
}
MM_INLINE vf add_pairs(vf sum, vu a, vu b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return sum + (vf)(a & 0xffff0000) * (vf)(b & 0xffff0000) + (vf)(a << 16) * (vf)(b << 16);
#endif
}

// Rows of one head are far apart, a pattern that the processor does not foresee.
template <bool WRITE = false, class T>
MM_INLINE void prefetch_row(const T* row, int64_t d) {
    for (int64_t i = 0; i < d; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, WRITE);
}

MM_INLINE float widen(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

MM_INLINE vf load(const float* p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
MM_INLINE vf load(const bf16* p) {
    vh x;
    memcpy(&x, p, sizeof x);
    return widen(x);
}
MM_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
MM_INLINE void store(bf16* p, vf x) {
    const vh y = narrow(x);
    memcpy(p, &y, sizeof y);
}

// The first n of W elements; the others load as 0 and are not stored.
template <class T>
MM_INLINE vf load(const T* p, int64_t n) {
    if (n >= W) return load(p);
    T x[W] = {};
    for (int64_t i = 0; i < n; ++i) x[i] = p[i];
    return load(x);
}
template <class T>
MM_INLINE void store(T* p, vf y, int64_t n) {
    if (n >= W) return store(p, y);
    T x[W];
    store(x, y);
    for (int64_t i = 0; i < n; ++i) p[i] = x[i];
}

// Whole vectors to aligned memory past the caches, for what is not read again before they have forgotten it: a cache
// would first fetch the lines that are about to be written. end_streams() before another thread may read.
MM_INLINE void stream(float* p, vf x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)x);
#elif defined(__x86_64__)
    _mm_stream_ps(p, (__m128)x);
#else
    store(p, x);
#endif
}
MM_INLINE void stream(bf16* p, vf x) {
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(x));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrow(x));
#else
    store(p, x);
#endif
}
MM_INLINE void end_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}
#ifndef MM_STREAM_BYTES
#define MM_STREAM_BYTES (1 << 20)  // of a result, more than a second-level cache keeps of it
#endif

// Whether rows of n elements at p, `size` of them in all, are for stream().
template <class T>
MM_INLINE bool streams(const T* p, int64_t n, int64_t size) {
    return size * int64_t(sizeof(T)) >= MM_STREAM_BYTES && n % W == 0 && reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

// Calls body(i, n - i) for every W-th i under n: the count is a constant type where a whole vector is left, so that no
// load or store of those asks for it.
struct Whole {
    constexpr operator int64_t() const { return W; }
};
template <class T>
MM_INLINE vf load(const T* p, Whole) { return load(p); }
template <class T>
MM_INLINE void store(T* p, vf x, Whole) { store(p, x); }
template <class F>
MM_INLINE void for_vectors(int64_t n, F body) {
    int64_t i = 0;
    for (; i + W <= n; i += W) body(i, Whole{});
    if (i < n) body(i, n - i);
}

// x86's minimum and maximum return their second argument if either is NaN, so these two keep a NaN in x.
MM_INLINE vf at_least(vf x, vf low) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)low, (__m256)x);
#elif defined(__x86_64__)
    return (vf)_mm_max_ps((__m128)low, (__m128)x);
#else
    return x < low ? low : x;
#endif
}
MM_INLINE vf at_most(vf x, vf high) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_min_ps(0xffff, (__m512)high, (__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)high, (__m256)x);
#elif defined(__x86_64__)
    return (vf)_mm_min_ps((__m128)high, (__m128)x);
#else
    return x > high ? high : x;
#endif
}
MM_INLINE vf at_least(vf x, float low) { return at_least(x, splat(low)); }
MM_INLINE vf at_most(vf x, float high) { return at_most(x, splat(high)); }
MM_INLINE vf max(vf a, vf b) { return at_least(b, a); }

MM_INLINE vf sqrt(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
    return (vf)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
    return (vf)vsqrtq_f32((float32x4_t)x);
#else
    for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// 1 / x and 1 / sqrt(x) to about 1e-7, for x in [1e-37, 1e37]: an estimate of the processor and one step of Newton
// cost a quarter of a division. At x beyond, reciprocal goes to 0 as it should.
MM_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
    const vf r = (vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
    return r * (2.0f - x * r);
#elif defined(__AVX2__)
    const vf r = (vf)_mm256_rcp_ps((__m256)x);
    return r * (2.0f - x * r);
#elif defined(__x86_64__)
    const vf r = (vf)_mm_rcp_ps((__m128)x);
    return r * (2.0f - x * r);
#else
    return 1.0f / x;
#endif
}
MM_INLINE vf reciprocal_sqrt(vf x) {
#if defined(__AVX512F__)
    const vf r = (vf)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)x);
    return r * (1.5f - 0.5f * x * (r * r));
#elif defined(__AVX2__)
    const vf r = (vf)_mm256_rsqrt_ps((__m256)x);
    return r * (1.5f - 0.5f * x * (r * r));
#elif defined(__x86_64__)
    const vf r = (vf)_mm_rsqrt_ps((__m128)x);
    return r * (1.5f - 0.5f * x * (r * r));
#else
    return 1.0f / sqrt(x);
#endif
}

// Constant orders of lanes, of blocks of HALF lanes.
template <int HALF>
struct LaneOrders {
    int32_t swapped[W], low[W], high[W];
    constexpr LaneOrders() : swapped(), low(), high() {
        for (int i = 0; i < W; ++i) {
            swapped[i] = i ^ HALF;              // neighbouring blocks change places
            low[i] = i & HALF ? W + i - HALF : i;   // of two vectors, the even blocks of both
            high[i] = i & HALF ? W + i : i + HALF;  // and the odd ones
        }
    }
};
template <int HALF>
static constexpr LaneOrders<HALF> LANE_ORDERS{};

// Lanes of a, and past W those of b, in a constant order.
template <class V>
MM_INLINE V shuffle(V a, V b, const int32_t (&order)[W]) {
    V x;
#if defined(__clang__)
    for (int i = 0; i < W; ++i) x[i] = order[i] < W ? a[order[i]] : b[order[i] - W];
#else
    vi lanes;
    memcpy(&lanes, order, sizeof lanes);
    x = __builtin_shuffle(a, b, lanes);
#endif
    return x;
}

// Halves are added pairwise, so the order of additions is fixed per level.
template <int HALF = W / 2>
MM_INLINE float sum(vf x) {
    x += shuffle(x, x, LANE_ORDERS<HALF>.swapped);
    if constexpr (HALF > 1)
        return sum<HALF / 2>(x);
    else
        return x[0];
}
template <int HALF = W / 2>
MM_INLINE float max(vf x) {
    x = max(x, shuffle(x, x, LANE_ORDERS<HALF>.swapped));
    if constexpr (HALF > 1)
        return max<HALF / 2>(x);
    else
        return x[0];
}

// The sum of term(i, n - i) over every W-th i under n, in four chains: one would wait for each of its additions.
template <class F>
MM_INLINE float sum_over(int64_t n, F term) {
    vf sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        for (int chain = 0; chain < 4; ++chain) sums[chain] += term(i + chain * W, Whole{});
    for (; i < n; i += W) sums[0] += term(i, n - i);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Transposes W vectors of W lanes in place, larger and larger blocks.
template <int HALF = 1>
MM_INLINE void transpose(vu (&x)[W]) {
    for (int i = 0; i < W; ++i) {
        if (i & HALF) continue;
        const vu a = x[i], b = x[i + HALF];
        x[i] = shuffle(a, b, LANE_ORDERS<HALF>.low);
        x[i + HALF] = shuffle(a, b, LANE_ORDERS<HALF>.high);
    }
    if constexpr (HALF < W / 2) transpose<HALF * 2>(x);
}

#if defined(__AVX512F__)
constexpr float EXP_ZERO = -104.0f;  // scalef goes through the denormals down to 0
#else
constexpr float EXP_ZERO = -87.0f;
#endif

// e^x by x = n ln 2 + r, |r| <= ln 2 / 2, and 1 + r + r^2 q(r) with q of degree 3 (minimax, error 1e-7).
// Arguments under EXP_ZERO give 0 exactly, as masks need, and those over 88.3 about 2e38; NaN stays NaN.
MM_INLINE vf exp(vf x) {
    const vf y = at_least(at_most(x, 88.3f), EXP_ZERO);
#if defined(__AVX512F__)
    const vf n = (vf)_mm512_maskz_roundscale_ps(0xffff, (__m512)(y * 1.44269504f), 8);
#else
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    const vf shifted = y * 1.44269504f + magic;
    const vf n = shifted - magic;
#endif
#if defined(__FMA__) || defined(__aarch64__)
    const vf r = y - n * 0.693147181f;
#else
    const vf r = y - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts, the first exact times n
#endif
    vf q = splat(0.0083125066f);
    q = q * r + 0.0418902002f;
    q = q * r + 0.166671142f;
    q = q * r + 0.499992311f;
    const vf p = q * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
    const vf scaled = p * (vf)(((vu)shifted << 23) + 0x3f800000);
    return x < EXP_ZERO ? vf{} : scaled;
#endif
}

MM_INLINE vf sigmoid(vf x) { return reciprocal(1.0f + exp(-x)); }

}  // namespace MM_LEVEL
}  // namespace mm_rec
