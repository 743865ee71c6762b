// Products of large bfloat16 matrices on vectors that multiply pairs (AVX-512-BF16), summed in float32.
//
// A panel of 64 columns of B is packed, and all rows of a block of A go by it, six at a time. Rows of A are read where
// they are if the depth is their fast index, and packed if it is not. While a panel is multiplied the next one is asked
// for, since weights come from memory.
//
// Every sum runs along p in order, a pair an instruction, so that a result depends neither on the blocks nor on the
// number of threads, and a row of it on no other row.
#pragma once

#include "product_operand.h"
#include "scratch.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t COLUMNS = 4 * TILE;  // of a panel
constexpr int VECTORS = COLUMNS / W;   // across it

// Most rows and elements of p in a block: so many of A stay in the second cache.
struct VectorBlocks {
    int64_t rows, depth;
};
constexpr VectorBlocks VECTOR_BLOCKS{512, 2048};

// Pairs of the rows of A from some p on; distances in bytes.
struct PairRows {
    const char* data;
    int64_t row, tile, pair;  // of rows in a tile of 16, of such tiles, and of pairs along p

    PairRows from(int64_t r) const { return {data + r / TILE * tile + r % TILE * row, row, tile, pair}; }
};

MM_INLINE bool reads_in_place(const ProductOperand& a) { return a.depth_last && !a.lower && a.depth % STEP == 0; }

static PairRows rows_in_place(const ProductOperand& a, int64_t i, int64_t p) {
    const int64_t row = a.row * int64_t(sizeof(bf16));
    return {reinterpret_cast<const char*>(a.data + i * a.row + p), row, TILE * row, 2 * int64_t(sizeof(bf16))};
}
static PairRows packed_rows(const ProductOperand& a, int64_t i0, int64_t i1, int64_t begin, int64_t end, uint32_t* to) {
    constexpr int64_t CELL = sizeof(uint32_t);
    const int64_t cells = TILE * round_up(end - begin, STEP) / 2;
    for (int64_t i = i0; i < i1; i += TILE) pack_columns<1>(a, i, begin, end, to + (i - i0) / TILE * cells);
    return {reinterpret_cast<const char*>(to), CELL, cells * CELL, TILE * CELL};
}

// The lines of memory that a panel is packed from, asked for some at a time.
struct Lines {
    const bf16* at;
    int64_t row, rows, width;  // distance and number of rows, and lines of a row
    int64_t line = 0;

    Lines(const ProductOperand& x, int64_t r, int64_t begin, int64_t end) : row(x.row) {
        const int64_t columns = min64(COLUMNS, x.outer - r), depth = end - begin;
        at = x.data + (x.depth_last ? r * x.row + begin : begin * x.row + r);
        rows = x.depth_last ? columns : depth;
        width = ((x.depth_last ? depth : columns) * int64_t(sizeof(bf16)) + 63) / 64;
    }
    void ask(int64_t n) {
        for (; n > 0 && rows > 0; --n) {
            __builtin_prefetch(at + line * 64 / int64_t(sizeof(bf16)), 0, 2);
            if (++line < width) continue;
            line = 0;
            at += row;
            --rows;
        }
    }
};

// One panel of B, and what the rows of a block have to do with it.
template <class T>
struct PanelTask {
    const ProductResult<T>& c;
    const uint32_t* panel;         // packed
    int64_t j, columns;            // of the result
    int64_t begin, end, depth;     // of p, and where it ends
    float* sums;                   // of a block's rows, 64 each, if the depth takes several blocks
    Lines ahead;                   // of the next panel
    int64_t lines_a_step;

    template <int ROWS>
    void multiply(PairRows from, float* kept, int64_t i) {
        vf x[ROWS][VECTORS] = {};
        if (begin)
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < VECTORS; ++v) x[r][v] = load(kept + r * COLUMNS + v * W);
        const uint32_t* tile = panel;
        for (int64_t p = begin; p < end; p += STEP, tile += 4 * TILE_CELLS) {
            ahead.ask(lines_a_step);
            for (int64_t pair = 0; pair < TILE; ++pair, from.data += from.pair) {
                vu right[VECTORS];
                for (int64_t v = 0; v < VECTORS; ++v)
                    memcpy(&right[v], tile + v * W / TILE * TILE_CELLS + pair * TILE + v * W % TILE, sizeof(vu));
                for (int r = 0; r < ROWS; ++r) {
                    uint32_t bits;
                    memcpy(&bits, from.data + r * from.row, sizeof bits);
                    const vu left = (vu)in_register((vf)(bits - vu{}));
                    for (int v = 0; v < VECTORS; ++v) x[r][v] = add_pairs(x[r][v], left, right[v]);
                }
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            if (end == depth)
                write(x[r], i + r);
            else
                for (int v = 0; v < VECTORS; ++v) store(kept + r * COLUMNS + v * W, x[r][v]);
        }
    }

    void write(const vf (&x)[VECTORS], int64_t i) const {
        if (columns < COLUMNS)
            for_vectors(columns, [&](int64_t k, auto n) { c.write(i, j + k, x[k / W], n); });
        else
            for (int v = 0; v < VECTORS; ++v) c.write(i, j + v * W, x[v], Whole{});
    }

    // Of the rows [i0, i1), a block, those from `first` on: of 16 in a tile 6, 5 and 5, which keep the unit as busy as
    // 6 do.
    void multiply_block(const PairRows& block, int64_t i0, int64_t first, int64_t i1) {
        int64_t rows;
        for (int64_t i = first - i0; i < i1 - i0; i += rows) {
            rows = min64(i % TILE ? 5 : 6, i1 - i0 - i);
            const PairRows from = block.from(i);
            float* kept = sums + i * COLUMNS;
            switch (rows) {
                case 1: multiply<1>(from, kept, i0 + i); break;
                case 2: multiply<2>(from, kept, i0 + i); break;
                case 3: multiply<3>(from, kept, i0 + i); break;
                case 4: multiply<4>(from, kept, i0 + i); break;
                case 5: multiply<5>(from, kept, i0 + i); break;
                case 6: multiply<6>(from, kept, i0 + i); break;
            }
        }
    }
};

// Of the panel that comes after that of columns j and p: in the same block, or the first of the next.
static Lines lines_after(const ProductOperand& b, const ProductRange& range, int64_t j, int64_t p, int64_t depth) {
    const bool same = j + COLUMNS < range.j1;
    const int64_t begin = same ? p : p + depth < b.depth ? p + depth : 0;
    return {b, same ? j + COLUMNS : range.j0, begin, min64(begin + depth, b.depth)};
}

// Work of one thread, in blocks of at most the sizes of `most`.
template <class T>
static bool vector_product(const ProductOperand& a, const ProductOperand& b, const ProductResult<T>& c,
                           const ProductRange& range, const VectorBlocks& most) {
    const int64_t depth = even_part(a.depth, most.depth, STEP);
    const int64_t rows = even_part(range.i1 - range.i0, most.rows, TILE);
    const int64_t b_cells = COLUMNS * depth / 2, a_cells = reads_in_place(a) ? 0 : rows * depth / 2;
    const Scratch block(b_cells + a_cells +
                        (depth < a.depth ? rows * round_up(range.j1 - range.j0, COLUMNS) : 0));
    if (!block.data) return false;
    uint32_t* panel = reinterpret_cast<uint32_t*>(block.data);
    float* sums = block.data + b_cells + a_cells;
    for (int64_t i = range.i0; i < range.i1; i += rows)
        for (int64_t p = 0; p < a.depth; p += depth) {
            const int64_t last = min64(i + rows, range.i1), end = min64(p + depth, a.depth);
            const int64_t steps = (end - p + STEP - 1) / STEP * ((last - i + TILE - 1) / TILE * 3);
            const PairRows from =
                reads_in_place(a) ? rows_in_place(a, i, p) : packed_rows(a, i, last, p, end, panel + b_cells);
            for (int64_t j = range.j0; j < range.j1; j += COLUMNS) {
                pack_columns<4>(b, j, p, end, panel);
                const Lines ahead = lines_after(b, range, j, p, depth);
                PanelTask<T> task{c, panel, j, min64(COLUMNS, range.j1 - j), p, end, a.depth,
                                  sums + (j - range.j0) * rows, ahead, (ahead.rows * ahead.width + steps - 1) / steps};
                task.multiply_block(from, i, c.lower ? min64(max64(i, j), last) : i, last);
            }
        }
    return true;
}

// C = A B^T, or += if the result says so; the depth is at least 1. False if there is no memory for the blocks.
template <class T>
static bool vector_product(const ProductOperand& a, const ProductOperand& b, const ProductResult<T>& c,
                           const VectorBlocks& most, int threads) {
    const bool in_place = reads_in_place(a);
    const auto cost = [&](int64_t rows, int64_t columns) {  // packing a row or column is as long as multiplying it by 8
        const int64_t blocks = (rows + most.rows - 1) / most.rows;
        return rows * columns + 8 * (columns * blocks + (in_place ? 0 : rows));
    };
    const ProductGrid grid = product_grid(a.outer, b.outer, threads, TILE, COLUMNS, cost);
    return share_product(a.outer, b.outer, grid, threads,
                         [&](const ProductRange& range) { return vector_product(a, b, c, range, most); });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
