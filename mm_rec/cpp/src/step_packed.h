// bfloat16 matrices in 12 bits a weight, without loss.
//
// The exponents of trained weights are close to each other: those of 128 neighbours in a row nearly always lie within
// 16 values. Such a chunk keeps for each weight its sign and its mantissa, and of the exponent what it is above the
// chunk's smallest one, `base`: 192 bytes for 256. Any other chunk stays as it is, so every matrix can be packed, and
// products have the bits that they would have with the matrix itself.
//
// A packed chunk is three lines of 32 words of 16 bits. Word i of the first holds the exponents of weights i, 32 + i,
// 64 + i and 96 + i, from the lowest bits up; word i of the second the signs and mantissas of i, at their place in
// a bfloat16, and of 32 + i, with the two bytes of it changed round; the third those of 64 + i and 96 + i likewise.
// So no weight ever changes its lane.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t PACKED_CHUNK = 128, PACKED_WORDS = 32;  // weights; words of a line
constexpr int64_t PACKED_BYTES = 192, PLAIN_BYTES = 256;  // of a chunk
constexpr int64_t PACKED_UNIT = 16;                       // rows whose place is kept
constexpr uint8_t PACKED_PLAIN = 255;                     // base of a chunk that is not packed
constexpr int PACKED_EXPONENTS = 16, LAST_BASE = 256 - PACKED_EXPONENTS;
constexpr int64_t STEP_AHEAD = 4096;  // bytes; the processor's own prefetching stops at every page

// Rows lie one after the other: their chunks, then what is left of a row as bfloat16, filled up with zeros to lines.
struct PackedMatrix {
    const bf16* plain;      // the matrix itself, for single rows, and for many vectors, which reading does not limit
    const uint8_t* data;    // 64-byte aligned
    const uint8_t* base;    // (rows, columns / 128)
    const uint32_t* start;  // (units of rows): where they begin in `data`, in lines of 64 bytes
};

typedef uint16_t vw __attribute__((vector_size(4 * W)));  // words

MM_INLINE vw load_words(const uint8_t* p) {
    vw x;
    memcpy(&x, p, sizeof x);
    return x;
}

MM_INLINE vw swap_bytes(vw x) {
#if defined(__AVX512F__)
    const __m128i pairs = _mm_setr_epi8(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return (vw)_mm512_maskz_shuffle_epi8(~0ull, (__m512i)x, _mm512_maskz_broadcast_i32x4(0xffff, pairs));
#elif defined(__AVX2__)
    const __m128i pairs = _mm_setr_epi8(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return (vw)_mm256_shuffle_epi8((__m256i)x, _mm256_broadcastsi128_si256(pairs));
#else
    return x << 8 | x >> 8;
#endif
}

// A chunk's weights from its three lines.
MM_INLINE void unpack_chunk(const uint8_t* chunk, uint8_t base, bf16* to) {
    constexpr uint16_t exponent = 0xf << 7, rest = 0x807f;
    const uint16_t smallest = uint16_t(base << 7);
    for (int64_t i = 0; i < PACKED_WORDS; i += 2 * W) {
        const vw codes = load_words(chunk + 2 * i);
        const vw low = load_words(chunk + 64 + 2 * i), high = load_words(chunk + 128 + 2 * i);
        const vw a = (low & rest) | ((codes << 7 & exponent) + smallest);
        const vw b = (swap_bytes(low) & rest) | ((codes << 3 & exponent) + smallest);
        const vw c = (high & rest) | ((codes >> 1 & exponent) + smallest);
        const vw d = (swap_bytes(high) & rest) | ((codes >> 5 & exponent) + smallest);
        memcpy(to + i, &a, sizeof a);
        memcpy(to + PACKED_WORDS + i, &b, sizeof b);
        memcpy(to + 2 * PACKED_WORDS + i, &c, sizeof c);
        memcpy(to + 3 * PACKED_WORDS + i, &d, sizeof d);
    }
}

// Bytes of what is left of a row after its chunks.
MM_INLINE int64_t packed_rest(int64_t columns) { return round_up(columns % PACKED_CHUNK, PACKED_WORDS) * 2; }

static int64_t packed_row_bytes(int64_t columns, const uint8_t* base) {
    int64_t bytes = packed_rest(columns);
    for (int64_t c = 0; c < columns / PACKED_CHUNK; ++c) bytes += base[c] == PACKED_PLAIN ? PLAIN_BYTES : PACKED_BYTES;
    return bytes;
}

// Goes through the rows of a packed matrix.
struct PackedReader {
    const uint8_t *data, *base;
    PackedReader(const PackedMatrix& m, int64_t row, int64_t columns) {
        const int64_t chunks = columns / PACKED_CHUNK, first = row / PACKED_UNIT * PACKED_UNIT;
        data = m.data + int64_t(m.start[row / PACKED_UNIT]) * 64;
        for (base = m.base + first * chunks; base < m.base + row * chunks; base += chunks)
            data += packed_row_bytes(columns, base);
        if (!chunks) data += (row - first) * packed_rest(columns);
    }

    // Calls body(weights, k, n) with bfloat16 weights k to k + n - 1 of the next row, in order; behind the last ones of a
    // row are zeros up to a whole line.
    template <class F>
    inline __attribute__((always_inline)) void row(int64_t columns, F body) {
        int64_t k = 0;
        for (; k + PACKED_CHUNK <= columns; k += PACKED_CHUNK, ++base) {
            for (int64_t i = 0; i < PACKED_BYTES; i += 64) __builtin_prefetch(data + STEP_AHEAD + i, 0, 0);
            if (__builtin_expect(*base == PACKED_PLAIN, 0)) {
                body(reinterpret_cast<const bf16*>(data), k, PACKED_CHUNK);
                data += PLAIN_BYTES;
            } else {
                alignas(64) bf16 weights[PACKED_CHUNK];
                unpack_chunk(data, *base, weights);
                body(static_cast<const bf16*>(weights), k, PACKED_CHUNK);
                data += PACKED_BYTES;
            }
        }
        if (k < columns) body(reinterpret_cast<const bf16*>(data), k, columns - k);
        data += packed_rest(columns);
    }
};

MM_INLINE int exponent_of(bf16 x) { return x.bits >> 7 & 0xff; }

static uint8_t packed_base(const bf16* chunk) {
    int least = 255, most = 0;
    for (int64_t i = 0; i < PACKED_CHUNK; ++i) {
        const int exponent = exponent_of(chunk[i]);
        least = exponent < least ? exponent : least;
        most = exponent > most ? exponent : most;
    }
    if (most - least >= PACKED_EXPONENTS) return PACKED_PLAIN;
    return uint8_t(least < LAST_BASE ? least : LAST_BASE);
}

static void pack_chunk(const bf16* w, uint8_t base, uint8_t* to) {
    uint16_t words[3][PACKED_WORDS] = {};
    for (int64_t i = 0; i < PACKED_CHUNK; ++i) {
        const int64_t part = i / PACKED_WORDS, word = i % PACKED_WORDS;
        const uint16_t rest = w[i].bits & 0x807f;
        words[0][word] |= uint16_t((exponent_of(w[i]) - base) << 4 * part);
        words[1 + part / 2][word] |= part % 2 ? __builtin_bswap16(rest) : rest;
    }
    memcpy(to, words, sizeof words);
}

// The bases of all chunks and the starts of all units; returns the bytes that the packed rows need.
static int64_t pack_layout(int64_t rows, int64_t columns, const bf16* w, uint8_t* base, uint32_t* start, int threads) {
    const int64_t chunks = columns / PACKED_CHUNK;
    parallel_for(rows, threads, [=](int64_t r) {
        for (int64_t c = 0; c < chunks; ++c) base[r * chunks + c] = packed_base(w + r * columns + c * PACKED_CHUNK);
    });
    int64_t bytes = 0;
    for (int64_t r = 0; r < rows; ++r) {
        if (r % PACKED_UNIT == 0) start[r / PACKED_UNIT] = uint32_t(bytes / 64);
        bytes += packed_row_bytes(columns, base + r * chunks);
    }
    return bytes;
}

// Writes the rows as pack_layout has laid them out.
static void pack(int64_t rows, int64_t columns, const bf16* w, const uint8_t* base, const uint32_t* start,
                 uint8_t* data, int threads) {
    const int64_t chunks = columns / PACKED_CHUNK, rest = columns % PACKED_CHUNK;
    parallel_for((rows + PACKED_UNIT - 1) / PACKED_UNIT, threads, [=](int64_t unit) {
        uint8_t* to = data + int64_t(start[unit]) * 64;
        for (int64_t r = unit * PACKED_UNIT; r < min64(rows, (unit + 1) * PACKED_UNIT); ++r) {
            const bf16* row = w + r * columns;
            for (int64_t c = 0; c < chunks; ++c, row += PACKED_CHUNK) {
                const uint8_t chunk = base[r * chunks + c];
                if (chunk == PACKED_PLAIN)
                    memcpy(to, row, PLAIN_BYTES);
                else
                    pack_chunk(row, chunk, to);
                to += chunk == PACKED_PLAIN ? PLAIN_BYTES : PACKED_BYTES;
            }
            memset(to, 0, packed_rest(columns));
            memcpy(to, row, rest * sizeof(bf16));
            to += packed_rest(columns);
        }
    });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
