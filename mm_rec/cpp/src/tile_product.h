// Products of large bfloat16 matrices by the tile registers of AMX, summed in float32.
//
// C (rows x columns) = A B^T of two operands whose elements are (r, p): r counts rows or columns of C, p runs along
// the sum. In memory either index may be the fast one, so A B, A^T B and A B^T are all this product. Blocks of both are
// packed into tiles as the instruction takes them: of A, rows of pairs along p; of B the transpose of that, row by
// row all columns' pairs. An operand whose r is the fast index has its rows p and p + 1 interleaved, which is what B
// needs; one whose p is the fast index is what A needs; the other two cases are transposed in registers.
//
// Every sum runs along p in order, 32 elements an instruction, so that a result depends neither on the blocks nor on
// the number of threads, and a row of it on no other row.
#pragma once

#include "scratch.h"
#include "tile.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t PANEL = 2 * TILE;             // rows or columns of C multiplied at once, by four tiles of sums
constexpr int64_t STEP = 2 * TILE;              // elements of p in a tile
constexpr int64_t STEP_CELLS = 2 * TILE_CELLS;  // of a panel, for one step

struct TileOperand {
    const bf16* data;
    int64_t outer, depth;  // r < outer, p < depth
    int64_t row;           // distance of rows in memory, in elements
    bool depth_last;       // (r, p) is at r * row + p, else at p * row + r
};

// Most rows, columns and elements of p in a block: one of B (columns x depth) stays in the second cache while panels
// of A (32 x depth) go by; sums of rows x columns are kept if the depth takes several blocks.
struct TileBlocks {
    int64_t rows, columns, depth;
};
constexpr TileBlocks TILE_BLOCKS{1024, 512, 1024};

// Elements (r, p ... p + 2 W - 1); past the ends, zeros.
template <bool WHOLE>
MM_INLINE vu cells_along_depth(const TileOperand& x, int64_t r, int64_t p) {
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
MM_INLINE vu cells_across_depth(const TileOperand& x, int64_t r, int64_t p) {
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
    return __builtin_convertvector(even, vu) | (__builtin_convertvector(odd, vu) << 16);
}

// The tile from (r, p): as it is in memory, 16 rows of cells, or transposed.
template <bool DEPTH_LAST, bool TRANSPOSED, bool WHOLE>
MM_INLINE void pack_tile(const TileOperand& x, int64_t r, int64_t p, uint32_t* to) {
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

template <bool DEPTH_LAST, bool TRANSPOSED>
static void pack_panel(const TileOperand& x, int64_t r, int64_t begin, int64_t end, uint32_t* to) {
    for (int64_t p = begin; p < end; p += STEP)
        for (int64_t half = 0; half < PANEL; half += TILE, to += TILE_CELLS) {
            if (r + PANEL <= x.outer && p + STEP <= x.depth)
                pack_tile<DEPTH_LAST, TRANSPOSED, true>(x, r + half, p, to);
            else
                pack_tile<DEPTH_LAST, TRANSPOSED, false>(x, r + half, p, to);
        }
}

// The panel of r ... r + 31 and p from `begin` to `end`, step by step, two tiles each.
static void pack_rows(const TileOperand& a, int64_t r, int64_t begin, int64_t end, uint32_t* to) {
    a.depth_last ? pack_panel<true, false>(a, r, begin, end, to) : pack_panel<false, true>(a, r, begin, end, to);
}
static void pack_columns(const TileOperand& b, int64_t r, int64_t begin, int64_t end, uint32_t* to) {
    b.depth_last ? pack_panel<true, true>(b, r, begin, end, to) : pack_panel<false, false>(b, r, begin, end, to);
}

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

template <class T>
struct TileResult {
    T* data;
    int64_t row;  // distance of rows
    bool add;     // to what is there
};

// A block of sums on its way to the result, some rows at a time: what is left of it are `rows` from row i, column j.
template <class T>
struct TileOutput {
    const float* sums;
    int64_t rows, columns, i, j;

    void write(const TileResult<T>& c, int64_t most) {
        for (; rows > 0 && most > 0; --rows, --most, ++i, sums += PANEL) {
            T* to = c.data + i * c.row + j;
            for_vectors(columns, [&](int64_t k, auto n) {
                const vf x = load(sums + k);
                store(to + k, c.add ? load(to + k, n) + x : x, n);
            });
        }
    }
};

// Parts of at most `most`, all about alike and multiples of `unit`.
MM_INLINE int64_t even_part(int64_t size, int64_t most, int64_t unit) {
    const int64_t parts = (size + most - 1) / most;
    return parts ? round_up((size + parts - 1) / parts, unit) : unit;
}

// The rows [i0, i1) and columns [j0, j1) of C.
struct TileRange {
    int64_t i0, i1, j0, j1;
};

template <class T>
struct TileTask {
    const TileOperand &a, &b;
    const TileResult<T>& c;
    int64_t depth;                // of a block
    uint32_t *a_tiles, *b_tiles;  // a panel of A and a block of B
    float* sums;                  // 32 x 32 for each pair of panels; two in turn if they need not be kept

    bool is_whole() const { return depth >= a.depth; }

    void pack_b(int64_t j0, int64_t j1, int64_t p) const {
        const int64_t end = min64(p + depth, b.depth);
        for (int64_t j = j0; j < j1; j += PANEL) pack_columns(b, j, p, end, b_tiles + (j - j0) * depth / 2);
    }
    // The products of a range with the packed block of B, p to p + depth. With the last such block, sums go to the
    // result while the next ones are computed.
    void multiply(const TileRange& range, int64_t p) const {
        const int64_t end = min64(p + depth, a.depth), steps = (end - p + STEP - 1) / STEP;
        const int64_t rows_a_step = (PANEL + steps - 1) / steps;
        TileOutput<T> before{};
        int64_t blocks = 0;
        for (int64_t i = range.i0; i < range.i1; i += PANEL) {
            pack_rows(a, i, p, end, a_tiles);
            for (int64_t j = range.j0; j < range.j1; j += PANEL, ++blocks) {
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
static bool tile_product(const TileOperand& a, const TileOperand& b, const TileResult<T>& c, const TileRange& all,
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
                const TileRange range{i, min64(i + rows, all.i1), j, min64(j + columns, all.j1)};
                task.pack_b(range.j0, range.j1, p);
                task.multiply(range, p);
            }
    return true;
}

// Parts of the rows and of the columns, one for each thread, such that the threads pack least.
struct TileGrid {
    int64_t row_part, column_part, across;  // sizes of a part, and parts side by side
};
MM_INLINE TileGrid tile_grid(int64_t rows, int64_t columns, int64_t threads) {
    TileGrid best{};
    for (int64_t across = 1; across <= threads; ++across) {
        if (threads % across) continue;
        const int64_t down = threads / across;
        const TileGrid grid{round_up((rows + down - 1) / down, PANEL), round_up((columns + across - 1) / across, PANEL),
                            across};
        if (!best.across || grid.row_part + grid.column_part < best.row_part + best.column_part) best = grid;
    }
    return best;
}

// C = A B^T, or += if the result says so; the depth is at least 1. False if there is no memory for the blocks.
template <class T>
static bool tile_product(const TileOperand& a, const TileOperand& b, const TileResult<T>& c, const TileBlocks& most,
                         int threads) {
    const TileGrid grid = tile_grid(a.outer, b.outer, threads);
    bool done = true;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : done)
    {
        tiles_begin();
#pragma omp for schedule(static)
        for (int64_t part = 0; part < threads; ++part) {
            const int64_t i = part / grid.across * grid.row_part, j = part % grid.across * grid.column_part;
            const TileRange range{i, min64(i + grid.row_part, a.outer), j, min64(j + grid.column_part, b.outer)};
            if (range.i0 < range.i1 && range.j0 < range.j1) done = tile_product(a, b, c, range, most) && done;
        }
        tiles_end();
    }
    return done;
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
