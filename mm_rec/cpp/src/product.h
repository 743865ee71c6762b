// Small matrix products on float32 buffers that fit a cache: C = or += A B, register-blocked.
#pragma once

#include "vec.h"

namespace mm_rec {
namespace MM_LEVEL {

template <bool ADD, int ROWS, int VECS>
MM_INLINE void product_tile(int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                            float* c, int64_t c_row) {
    vf sums[ROWS][VECS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECS; ++v) sums[r][v] = ADD ? load(c + r * c_row + v * W) : vf{};
    for (int64_t p = 0; p < k; ++p) {
        vf line[VECS];
        for (int v = 0; v < VECS; ++v) line[v] = load(b + p * b_row + v * W);
        for (int r = 0; r < ROWS; ++r) {
            const vf factor = splat(a[r * a_row + p * a_col]);
            for (int v = 0; v < VECS; ++v) sums[r][v] += factor * line[v];
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECS; ++v) store(c + r * c_row + v * W, sums[r][v]);
}

template <bool ADD, int VECS>
static void product_columns(int64_t m, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b,
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

// C (m x n) = A (m x k) B (k x n), or += with ADD. Element (i, p) of A is a[i * a_row + p * a_col], so a
// transposed A is a matter of strides; rows of B and C are b_row and c_row apart, and n is a multiple of W.
template <bool ADD>
static void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b,
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

}  // namespace MM_LEVEL
}  // namespace mm_rec
