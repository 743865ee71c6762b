// Small matrix products on buffers that fit a cache: C = or += A B in float32, register-blocked.
//
// A and B are made of cells of 4 bytes: a float, or where the processor multiplies pairs of bfloat16 (AVX-512-BF16) a
// pair, which is two steps along the inner dimension k at once. A cell of A holds elements (i, DEPTH * p ...) and one
// of B elements (DEPTH * p ..., j), so rows of A are as in memory and rows of B are interleaved (`pack_pairs`).
#pragma once

#include "vec.h"

namespace mm_rec {
namespace MM_LEVEL {

// The cells that products of activations of type T are made of, and the elements in those.
template <class T>
struct Operand {
    typedef float Cell;
    typedef float Element;
};
template <class Cell>
inline constexpr int DEPTH = 1;

MM_INLINE vf multiply_add(float a, const float* b, vf sum) { return sum + splat(a) * load(b); }

#if defined(__AVX512BF16__)
struct Pair {
    uint32_t bits;
};
template <>
struct Operand<bf16> {
    typedef Pair Cell;
    typedef bf16 Element;
};
template <>
inline constexpr int DEPTH<Pair> = 2;

MM_INLINE vf multiply_add(Pair a, const Pair* b, vf sum) {
    return add_pairs(sum, (vu)_mm512_set1_epi32(int(a.bits)), (vu)_mm512_loadu_si512(b));
}
#endif

template <bool ADD, int ROWS, int VECS, class Cell>
MM_INLINE void product_tile(int64_t k, const Cell* a, int64_t a_row, int64_t a_col, const Cell* b, int64_t b_row,
                            float* c, int64_t c_row) {
    vf sums[ROWS][VECS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECS; ++v) sums[r][v] = ADD ? load(c + r * c_row + v * W) : vf{};
    for (int64_t p = 0; p < k; ++p)
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECS; ++v)
                sums[r][v] = multiply_add(a[r * a_row + p * a_col], b + p * b_row + v * W, sums[r][v]);
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECS; ++v) store(c + r * c_row + v * W, sums[r][v]);
}

template <bool ADD, int VECS, class Cell>
static void product_columns(int64_t m, int64_t k, const Cell* a, int64_t a_row, int64_t a_col, const Cell* b,
                            int64_t b_row, float* c, int64_t c_row) {
    constexpr int ROWS = 6;
    int64_t i = 0;
    for (; i + ROWS <= m; i += ROWS)
        product_tile<ADD, ROWS, VECS>(k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row);
    a += i * a_row;
    c += i * c_row;
    switch (m - i) {
        case 1: product_tile<ADD, 1, VECS>(k, a, a_row, a_col, b, b_row, c, c_row); break;
        case 2: product_tile<ADD, 2, VECS>(k, a, a_row, a_col, b, b_row, c, c_row); break;
        case 3: product_tile<ADD, 3, VECS>(k, a, a_row, a_col, b, b_row, c, c_row); break;
        case 4: product_tile<ADD, 4, VECS>(k, a, a_row, a_col, b, b_row, c, c_row); break;
        case 5: product_tile<ADD, 5, VECS>(k, a, a_row, a_col, b, b_row, c, c_row); break;
    }
}

// C (m x n) = A (m x k) B (k x n), or += with ADD; k counts cells. Cell (i, p) of A is a[i * a_row + p * a_col], so
// a transposed A is a matter of strides; rows of B and C are b_row and c_row apart, and n is a multiple of W.
template <bool ADD, class Cell>
static void product(int64_t m, int64_t n, int64_t k, const Cell* a, int64_t a_row, int64_t a_col, const Cell* b,
                    int64_t b_row, float* c, int64_t c_row) {
    int64_t j = 0;
    for (; j + TILE_VECS * W <= n; j += TILE_VECS * W)
        product_columns<ADD, TILE_VECS>(m, k, a, a_row, a_col, b + j, b_row, c + j, c_row);
    switch ((n - j) / W) {
        case 1: product_columns<ADD, 1>(m, k, a, a_row, a_col, b + j, b_row, c + j, c_row); break;
        case 2: product_columns<ADD, 2>(m, k, a, a_row, a_col, b + j, b_row, c + j, c_row); break;
        case 3: product_columns<ADD, 3>(m, k, a, a_row, a_col, b + j, b_row, c + j, c_row); break;
    }
}

// Rows of elements as rows of B: row r / 2 of `to` holds rows r and r + 1 of `from`, a missing one counting as 0;
// rows are `pitch` long, a multiple of W. With floats as cells a buffer is its own packed form.
MM_INLINE void pack_pairs(int64_t, int64_t, const float*, float*) {}

#if defined(__AVX512BF16__)
static void pack_pairs(int64_t rows, int64_t pitch, const bf16* from, Pair* to) {
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t i = 0; i < pitch; i += W) {
            vh even, odd = {};
            memcpy(&even, from + r * pitch + i, sizeof even);
            if (r + 1 < rows) memcpy(&odd, from + (r + 1) * pitch + i, sizeof odd);
            const vu pairs = pairs_of(even, odd);
            memcpy(to + r / 2 * pitch + i, &pairs, sizeof pairs);
        }
}
#endif

// Two rows of W floats as cells of B, if cells are pairs.
MM_INLINE void store_pairs(vf, vf, float*) {}
#if defined(__AVX512BF16__)
MM_INLINE void store_pairs(vf even, vf odd, Pair* to) {
    const vu pairs = pairs_of(narrow(even), narrow(odd));
    memcpy(to, &pairs, sizeof pairs);
}
#endif

}  // namespace MM_LEVEL
}  // namespace mm_rec
