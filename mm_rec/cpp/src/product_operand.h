// Operands of products of bfloat16 matrices, and their packing into tiles of pairs.
//
// C (rows x columns) = A B^T of two operands whose elements are (r, p): r counts rows or columns of C, p runs along
// the sum. In memory either index may be the fast one, so A B, A^T B and A B^T are all this product. An operand whose r
// is the fast index has its rows p and p + 1 interleaved, which gives pairs along p for 16 neighbouring r; of one whose
// p is the fast index they are in memory as they are, 16 of one r. The other two orders are transposed in registers.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t TILE = 16;                 // rows of a tile, and cells of 4 bytes in a row
constexpr int64_t TILE_CELLS = TILE * TILE;  // a cell is a float or a pair of bfloat16
constexpr int64_t STEP = 2 * TILE;           // elements of p in a tile

struct ProductOperand {
    const bf16* data;
    int64_t outer, depth;  // r < outer, p < depth
    int64_t row;           // distance of rows in memory, in elements
    bool depth_last;       // (r, p) is at r * row + p, else at p * row + r
    bool lower = false;    // symmetric, with only what a result that is `lower` has
};

// C = factor A B^T + share D. With `lower`, of a symmetric C only the blocks of 32 x 32 on and below the diagonal are
// sure to be written, which takes half the time.
template <class T>
struct ProductResult {
    T* data;
    int64_t row;      // distance of rows
    const T* addend;  // D, whose rows are as far apart, or null; may be C
    float factor = 1.0f, share = 1.0f;
    bool lower = false;

    // Sets the elements (i, j) to (i, j + n - 1) by their sums.
    template <class N>
    inline __attribute__((always_inline)) void write(int64_t i, int64_t j, vf sums, N n) const {
        const int64_t at = i * row + j;
        store(data + at, addend ? share * load(addend + at, n) + factor * sums : factor * sums, n);
    }
};

// Parts of at most `most`, all about alike and multiples of `unit`.
MM_INLINE int64_t even_part(int64_t size, int64_t most, int64_t unit) {
    const int64_t parts = (size + most - 1) / most;
    return parts ? round_up((size + parts - 1) / parts, unit) : unit;
}

// The rows [i0, i1) and columns [j0, j1) of C.
struct ProductRange {
    int64_t i0, i1, j0, j1;
};

// Parts of the rows and of the columns, one for each thread.
struct ProductGrid {
    int64_t row_part, column_part, across;  // sizes of a part, and parts side by side
};

// The grid whose parts, multiples of the units, cost least by cost(rows, columns).
template <class Cost>
static ProductGrid product_grid(int64_t rows, int64_t columns, int64_t threads, int64_t row_unit, int64_t column_unit,
                                Cost cost) {
    ProductGrid best{};
    for (int64_t across = 1; across <= threads; ++across) {
        if (threads % across) continue;
        const int64_t down = threads / across;
        const ProductGrid grid{round_up((rows + down - 1) / down, row_unit),
                               round_up((columns + across - 1) / across, column_unit), across};
        if (!best.across || cost(grid.row_part, grid.column_part) < cost(best.row_part, best.column_part)) best = grid;
    }
    return best;
}

// Calls multiply(range) for every part, each in a thread; false if a call says so.
template <class Multiply>
static bool share_product(int64_t rows, int64_t columns, const ProductGrid& grid, int threads, Multiply multiply) {
    bool done = true;
    parallel_for(threads, threads, [&](int64_t part) {
        const int64_t i = part / grid.across * grid.row_part, j = part % grid.across * grid.column_part;
        const ProductRange range{i, min64(i + grid.row_part, rows), j, min64(j + grid.column_part, columns)};
        if (range.i0 < range.i1 && range.j0 < range.j1 && !multiply(range))
            __atomic_store_n(&done, false, __ATOMIC_RELAXED);
    });
    return done;
}

// Elements (r, p ... p + 2 W - 1); past the ends, zeros.
template <bool WHOLE>
MM_INLINE vu cells_along_depth(const ProductOperand& x, int64_t r, int64_t p) {
    vu cells = {};
    const bf16* from = x.data + r * x.row + p;
    if (WHOLE)
        memcpy(&cells, from, sizeof cells);
    else if (r < x.outer && p < x.depth)
        memcpy(&cells, from, min64(2 * W, x.depth - p) * int64_t(sizeof(bf16)));
    return cells;
}

// Pairs (r ... r + W - 1, p and p + 1); past the ends, zeros.
template <bool WHOLE>
MM_INLINE vu cells_across_depth(const ProductOperand& x, int64_t r, int64_t p) {
    vh even = {}, odd = {};
    const bf16* from = x.data + p * x.row + r;
    if (WHOLE) {
        memcpy(&even, from, sizeof even);
        memcpy(&odd, from + x.row, sizeof odd);
    } else if (r < x.outer) {
        const int64_t bytes = min64(W, x.outer - r) * int64_t(sizeof(bf16));
        if (p < x.depth) memcpy(&even, from, bytes);
        if (p + 1 < x.depth) memcpy(&odd, from + x.row, bytes);
    }
    return pairs_of(even, odd);
}

// The tile from (r, p): as it is in memory, 16 rows of cells, or transposed.
template <bool DEPTH_LAST, bool TRANSPOSED, bool WHOLE>
MM_INLINE void pack_tile(const ProductOperand& x, int64_t r, int64_t p, uint32_t* to) {
    for (int64_t i = 0; i < TILE; i += W)
        for (int64_t j = 0; j < TILE; j += W) {
            vu block[W];
            for (int64_t l = 0; l < W; ++l)
                block[l] = DEPTH_LAST ? cells_along_depth<WHOLE>(x, r + i + l, p + 2 * j)
                                      : cells_across_depth<WHOLE>(x, r + j, p + 2 * (i + l));
            if (TRANSPOSED) transpose(block);
            uint32_t* corner = to + (TRANSPOSED ? j * TILE + i : i * TILE + j);
            for (int64_t l = 0; l < W; ++l) memcpy(corner + l * TILE, &block[l], sizeof(vu));
        }
}

// TILES tiles side by side from r, and p from `begin` to `end`, step by step.
template <int TILES, bool DEPTH_LAST, bool TRANSPOSED>
static void pack_panel(const ProductOperand& x, int64_t r, int64_t begin, int64_t end, uint32_t* to) {
    for (int64_t p = begin; p < end; p += STEP)
        for (int64_t i = 0; i < TILES * TILE; i += TILE, to += TILE_CELLS) {
            const bool whole = r + i + TILE <= x.outer && p + STEP <= x.depth;
            if (x.lower && r + i < p)  // above the diagonal: what lies across it, where the other index is the fast one
                whole ? pack_tile<!DEPTH_LAST, !TRANSPOSED, true>(x, r + i, p, to)
                      : pack_tile<!DEPTH_LAST, !TRANSPOSED, false>(x, r + i, p, to);
            else
                whole ? pack_tile<DEPTH_LAST, TRANSPOSED, true>(x, r + i, p, to)
                      : pack_tile<DEPTH_LAST, TRANSPOSED, false>(x, r + i, p, to);
        }
}

// Tiles whose rows are those of the operand, each of 16 pairs along p, and tiles whose rows are pairs, each of 16 r.
template <int TILES>
static void pack_rows(const ProductOperand& x, int64_t r, int64_t begin, int64_t end, uint32_t* to) {
    x.depth_last ? pack_panel<TILES, true, false>(x, r, begin, end, to)
                 : pack_panel<TILES, false, true>(x, r, begin, end, to);
}
template <int TILES>
static void pack_columns(const ProductOperand& x, int64_t r, int64_t begin, int64_t end, uint32_t* to) {
    x.depth_last ? pack_panel<TILES, true, true>(x, r, begin, end, to)
                 : pack_panel<TILES, false, false>(x, r, begin, end, to);
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
