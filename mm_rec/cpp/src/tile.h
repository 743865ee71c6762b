// The tile registers of AMX: eight of 16 rows of 64 bytes, and products of pairs of bfloat16. Where AMX is not compiled
// for, the same operations are plain C++, so that what is built on them is tested on any machine.
//
// Tiles have literal numbers, 0 to 7, as the instructions want them. A thread calls tiles_begin() before its first
// operation and tiles_end() after its last.
#pragma once

#include "product_operand.h"

namespace mm_rec {
namespace MM_LEVEL {

#if defined(__AMX_BF16__)

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

MM_INLINE void tiles_begin() {
    const TileShapes shapes;
    asm volatile("" ::"r"(&shapes) : "memory");  // the intrinsic does not say that it reads
    _tile_loadconfig(&shapes);
}
MM_INLINE void tiles_end() { _tile_release(); }

// The intrinsics of GCC 12 don't say that a load reads memory either: a fence goes before those of fresh data.
MM_INLINE void tiles_fence() { asm volatile("" ::: "memory"); }

#define MM_TILE_ZERO(tile) _tile_zero(tile)
#define MM_TILE_LOAD(tile, from, row_bytes) _tile_loadd(tile, from, row_bytes)
#define MM_TILE_STORE(tile, to, row_bytes) _tile_stored(tile, to, row_bytes)
#define MM_TILE_DOT(sums, a, b) _tile_dpbf16ps(sums, a, b)

#else

struct EmulatedTiles {
    uint32_t cells[8][TILE][TILE];
    bool ready;
};
inline thread_local EmulatedTiles emulated_tiles;

MM_INLINE void tiles_begin() {
    memset(&emulated_tiles, 0xff, sizeof emulated_tiles);  // NaN
    emulated_tiles.ready = true;
}
MM_INLINE void tiles_end() { emulated_tiles.ready = false; }
MM_INLINE void tiles_fence() {}

MM_INLINE uint32_t (&emulated_tile(int tile))[TILE][TILE] {
    if (!emulated_tiles.ready) __builtin_trap();  // as the processor would
    return emulated_tiles.cells[tile];
}

MM_INLINE void emulated_load(int tile, const void* from, int64_t row_bytes) {
    auto& cells = emulated_tile(tile);
    for (int r = 0; r < TILE; ++r) memcpy(cells[r], static_cast<const char*>(from) + r * row_bytes, sizeof cells[r]);
}
MM_INLINE void emulated_store(int tile, void* to, int64_t row_bytes) {
    const auto& cells = emulated_tile(tile);
    for (int r = 0; r < TILE; ++r) memcpy(static_cast<char*>(to) + r * row_bytes, cells[r], sizeof cells[r]);
}

// As the instruction adds: first and second elements of the pairs in a chain each, both chains together, that to the
// sum. It counts subnormal numbers as 0, which this does not.
static void emulated_dot(int sums, int a, int b) {
    auto& to = emulated_tile(sums);
    const auto &left = emulated_tile(a), &right = emulated_tile(b);
    for (int i = 0; i < TILE; ++i) {
        float chains[2][TILE] = {};
        for (int p = 0; p < TILE; ++p)
            for (int half = 0; half < 2; ++half) {
                const float x = widen(bf16{uint16_t(left[i][p] >> (16 * half))});
                for (int j = 0; j < TILE; ++j)
                    chains[half][j] += x * widen(bf16{uint16_t(right[p][j] >> (16 * half))});
            }
        for (int j = 0; j < TILE; ++j) {
            float sum;
            memcpy(&sum, &to[i][j], 4);
            sum += chains[0][j] + chains[1][j];
            memcpy(&to[i][j], &sum, 4);
        }
    }
}

#define MM_TILE_ZERO(tile) memset(emulated_tile(tile), 0, sizeof(emulated_tile(tile)))
#define MM_TILE_LOAD(tile, from, row_bytes) emulated_load(tile, from, row_bytes)
#define MM_TILE_STORE(tile, to, row_bytes) emulated_store(tile, to, row_bytes)
#define MM_TILE_DOT(sums, a, b) emulated_dot(sums, a, b)

#endif

}  // namespace MM_LEVEL
}  // namespace mm_rec
