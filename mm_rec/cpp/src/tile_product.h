// Products of large bfloat16 matrices by the tile registers of AMX, summed in float32.
//
// Blocks of both operands are packed into tiles as the instruction takes them: of A, rows of pairs along p; of B the
// transpose of that, row by row all columns' pairs.
//
// Every sum runs along p in order, 32 elements an instruction, so that a result depends neither on the blocks nor on
// the number of threads, and a row of it on no other row.
#pragma once

#include "product_operand.h"
#include "scratch.h"
#include "tile.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t PANEL = 2 * TILE;             // rows or columns of C multiplied at once, by four tiles of sums
constexpr int64_t STEP_CELLS = 2 * TILE_CELLS;  // of a panel, for one step

// Most rows, columns and elements of p in a block: one of B (columns x depth) stays in the second cache while panels
// of A (32 x depth) go by; sums of rows x columns are kept if the depth takes several blocks.
struct TileBlocks {
    int64_t rows, columns, depth;
};
constexpr TileBlocks TILE_BLOCKS{1024, 512, 1024};

// sums (32 x 32) = or, with `add`, += panel a times panel b, at least one step of both. The next step's tiles are asked
// for as soon as a register is free: a core shared with another thread looks too short a way ahead to do so by itself.
// Calls meanwhile() in every step, for work that fits between the products.
template <class F>
MM_INLINE void tile_block(int64_t steps, const uint32_t* a, const uint32_t* b, float* sums, bool add, F meanwhile) {
    constexpr int64_t CELL_ROW = 4 * TILE, SUM_ROW = 4 * PANEL;  // bytes
    float* lower = sums + TILE * PANEL;
    tiles_fence();
    if (add) {
        MM_TILE_LOAD(0, sums, SUM_ROW);
        MM_TILE_LOAD(1, sums + TILE, SUM_ROW);
        MM_TILE_LOAD(2, lower, SUM_ROW);
        MM_TILE_LOAD(3, lower + TILE, SUM_ROW);
    } else {
        MM_TILE_ZERO(0);
        MM_TILE_ZERO(1);
        MM_TILE_ZERO(2);
        MM_TILE_ZERO(3);
    }
    MM_TILE_LOAD(4, a, CELL_ROW);
    MM_TILE_LOAD(6, b, CELL_ROW);
    MM_TILE_LOAD(7, b + TILE_CELLS, CELL_ROW);
    MM_TILE_LOAD(5, a + TILE_CELLS, CELL_ROW);
    for (int64_t step = 1; step < steps; ++step) {
        a += STEP_CELLS;
        b += STEP_CELLS;
        MM_TILE_DOT(0, 4, 6);
        MM_TILE_DOT(1, 4, 7);
        MM_TILE_LOAD(4, a, CELL_ROW);
        MM_TILE_DOT(2, 5, 6);
        MM_TILE_LOAD(6, b, CELL_ROW);
        MM_TILE_DOT(3, 5, 7);
        MM_TILE_LOAD(7, b + TILE_CELLS, CELL_ROW);
        MM_TILE_LOAD(5, a + TILE_CELLS, CELL_ROW);
        meanwhile();
    }
    MM_TILE_DOT(0, 4, 6);
    MM_TILE_DOT(1, 4, 7);
    MM_TILE_DOT(2, 5, 6);
    MM_TILE_DOT(3, 5, 7);
    meanwhile();
    MM_TILE_STORE(0, sums, SUM_ROW);
    MM_TILE_STORE(1, sums + TILE, SUM_ROW);
    MM_TILE_STORE(2, lower, SUM_ROW);
    MM_TILE_STORE(3, lower + TILE, SUM_ROW);
    tiles_fence();
}

// A block of sums on its way to the result, some rows at a time: what is left of it are `rows` from row i, column j.
template <class T>
struct TileOutput {
    const float* sums;
    int64_t rows, columns, i, j;

    void write(const ProductResult<T>& c, int64_t most) {
        for (; rows > 0 && most > 0; --rows, --most, ++i, sums += PANEL) {
            for_vectors(columns, [&](int64_t k, auto n) { c.write(i, j + k, load(sums + k), n); });
        }
    }
};

template <class T>
struct TileTask {
    const ProductOperand &a, &b;
    const ProductResult<T>& c;
    int64_t depth;                // of a block
    uint32_t *a_tiles, *b_tiles;  // a panel of A and a block of B
    float* sums;                  // 32 x 32 for each pair of panels; two in turn if they need not be kept

    bool is_whole() const { return depth >= a.depth; }

    void pack_b(int64_t j0, int64_t j1, int64_t p) const {
        const int64_t end = min64(p + depth, b.depth);
        for (int64_t j = j0; j < j1; j += PANEL) pack_columns<2>(b, j, p, end, b_tiles + (j - j0) * depth / 2);
    }
    // The products of a range with the packed block of B, p to p + depth. With the last such block, sums go to the
    // result while the next ones are computed.
    void multiply(const ProductRange& range, int64_t p) const {
        const int64_t end = min64(p + depth, a.depth), steps = (end - p + STEP - 1) / STEP;
        const int64_t rows_a_step = (PANEL + steps - 1) / steps;
        TileOutput<T> before{};
        int64_t blocks = 0;
        for (int64_t i = c.lower ? max64(range.i0, range.j0) : range.i0; i < range.i1; i += PANEL) {
            pack_rows<2>(a, i, p, end, a_tiles);
            const int64_t j1 = c.lower ? min64(range.j1, i + PANEL) : range.j1;
            for (int64_t j = range.j0; j < j1; j += PANEL, ++blocks) {
                float* to = sums + (is_whole() ? blocks % 2 : blocks) * PANEL * PANEL;
                const uint32_t* b_panel = b_tiles + (j - range.j0) * depth / 2;
                tile_block(steps, a_tiles, b_panel, to, p > 0, [&] { before.write(c, rows_a_step); });
                if (end == a.depth) before = {to, min64(PANEL, range.i1 - i), min64(PANEL, range.j1 - j), i, j};
            }
        }
        before.write(c, PANEL);
    }
};

// Work of one thread, in blocks of at most the sizes of `most`.
template <class T>
static bool tile_product(const ProductOperand& a, const ProductOperand& b, const ProductResult<T>& c, const ProductRange& all,
                         const TileBlocks& most) {
    const int64_t depth = even_part(a.depth, most.depth, STEP);
    const bool whole = depth >= a.depth;
    const int64_t columns = even_part(all.j1 - all.j0, most.columns, PANEL);
    const int64_t rows = even_part(all.i1 - all.i0, whole ? all.i1 - all.i0 : most.rows, PANEL);
    const int64_t a_cells = PANEL * depth / 2, b_cells = columns * depth / 2;
    const Scratch block(a_cells + b_cells + (whole ? 2 * PANEL * PANEL : rows * columns));
    if (!block.data) return false;
    uint32_t* cells = reinterpret_cast<uint32_t*>(block.data);
    const TileTask<T> task{a, b, c, depth, cells, cells + a_cells, block.data + a_cells + b_cells};
    for (int64_t j = all.j0; j < all.j1; j += columns)
        for (int64_t i = all.i0; i < all.i1; i += rows)
            for (int64_t p = 0; p < a.depth; p += depth) {
                const ProductRange range{i, min64(i + rows, all.i1), j, min64(j + columns, all.j1)};
                task.pack_b(range.j0, range.j1, p);
                task.multiply(range, p);
            }
    return true;
}

// C = A B^T, or += if the result says so; the depth is at least 1. False if there is no memory for the blocks.
template <class T>
static bool tile_product(const ProductOperand& a, const ProductOperand& b, const ProductResult<T>& c,
                         const TileBlocks& most, int threads) {
    const auto packed = [](int64_t rows, int64_t columns) { return rows + columns; };
    const ProductGrid grid = product_grid(a.outer, b.outer, threads, PANEL, PANEL, packed);
    return share_product(a.outer, b.outer, grid, threads, [&](const ProductRange& range) {
        tiles_begin();
        const bool done = tile_product(a, b, c, range, most);
        tiles_end();
        return done;
    });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
