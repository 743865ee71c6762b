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

MM_INLINE vf splat(float x) { return vf{} + x; }

// bfloat16 rounds to nearest even; a NaN stays one.
MM_INLINE vf widen(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }
MM_INLINE vh narrow(vf x) {
    const vu bits = (vu)x;
    const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vu quiet = (bits >> 16) | 0x40;
    return __builtin_convertvector(x == x ? rounded : quiet, vh);
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

MM_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
MM_INLINE vf at_least(vf x, float low) { return x < low ? splat(low) : x; }  // these two keep a NaN
MM_INLINE vf at_most(vf x, float high) { return x > high ? splat(high) : x; }

MM_INLINE vf sqrt(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);  // the plain form trips a warning inside GCC 12
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

// Halves are added pairwise, so the order of additions is fixed per level.
MM_INLINE float sum(vf x) {
    float lane[W];
    store(lane, x);
    for (int n = W / 2; n; n /= 2)
        for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
    return lane[0];
}
MM_INLINE float max(vf x) {
    float lane[W];
    store(lane, x);
    for (int n = W / 2; n; n /= 2)
        for (int i = 0; i < n; ++i) lane[i] = lane[i] > lane[i + n] ? lane[i] : lane[i + n];
    return lane[0];
}

// e^x by x = n ln 2 + r, |r| <= ln 2 / 2, and 1 + r + r^2 q(r) with q of degree 4 (minimax, error 3e-9).
// Arguments under -87.3 give 0 exactly, as masks need, and those over 88.3 about 2e38; NaN stays NaN.
MM_INLINE vf exp(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    const vf y = at_most(x, 88.3f);
    const vf shifted = y * 1.44269504f + magic;
    const vf n = shifted - magic;
    const vf r = y - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts, the first exact times n
    vf q = splat(0.00138143194f);
    q = q * r + 0.00836885162f;
    q = q * r + 0.0416684002f;
    q = q * r + 0.166665196f;
    q = q * r + 0.49999994f;
    const vf p = q * (r * r) + r + 1.0f;
    const vu two_to_n = ((vu)shifted << 23) + 0x3f800000;
    return x < -87.3f ? vf{} : p * (vf)two_to_n;
}

MM_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace MM_LEVEL
}  // namespace mm_rec
