// Products of a matrix with the few vectors of a step, one per sequence. The weights are read once and in order, as
// they lie in memory, since reading them is what a step costs.
//
// Every result is one chain of additions along the row and one fixed sum over the lanes, however rows and sequences
// are tiled, so it depends neither on the batch nor on the number of threads.
#pragma once

#include "step_packed.h"

namespace mm_rec {
namespace MM_LEVEL {

#if defined(__AVX512F__)
constexpr int STEP_BATCH = 8;  // sequences at once, of 32 registers
#else
constexpr int STEP_BATCH = 4;
#endif

// A matrix as it lies in memory, rows contiguous: float32, bfloat16, or int8 with a factor for each row. Of a packed
// one `data` is a PackedMatrix.
enum StepType { STEP_FLOAT32 = 0, STEP_BFLOAT16 = 1, STEP_INT8 = 2, STEP_PACKED = 3 };
struct StepMatrix {
    const void* data;
    const float* scale;  // (rows) of an int8 matrix, else null
    int64_t type;
};

MM_INLINE vf load(const int8_t* p) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (vf)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__x86_64__)
    int32_t four;
    memcpy(&four, p, sizeof four);
    const __m128i bytes = _mm_cvtsi32_si128(four), pairs = _mm_unpacklo_epi8(bytes, bytes);
    return (vf)_mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(pairs, pairs), 24));
#else
    vf x;
    for (int i = 0; i < W; ++i) x[i] = p[i];
    return x;
#endif
}

// What a vector is made of when it meets a matrix: floats, or where the processor multiplies pairs of bfloat16, those.
// SPAN elements make a register; vectors are filled up with zeros to whole ones.
template <class X>
inline constexpr int SPAN = W;

template <class Element>
MM_INLINE vf step_load(const Element* p, float) {
    return load(p);
}
MM_INLINE vf step_multiply_add(vf a, vf b, vf sum) { return sum + a * b; }

#if defined(__AVX512BF16__)
template <>
inline constexpr int SPAN<bf16> = 2 * W;

MM_INLINE __m512bh step_load(const bf16* p, bf16) { return (__m512bh)_mm512_loadu_si512(p); }
MM_INLINE __m512bh step_load(const int8_t* p, bf16) {  // exact: bfloat16 has eight bits
    return _mm512_cvtne2ps_pbh((__m512)load(p + W), (__m512)load(p));
}
MM_INLINE __m512bh step_load(const float*, bf16) { return __m512bh{}; }  // no plan pairs float32 weights with bfloat16
MM_INLINE vf step_multiply_add(__m512bh a, __m512bh b, vf sum) {
    return add_pairs(sum, (vu)a, (vu)b);
}
#endif

// Orders that take of two vectors the even blocks of HALF lanes from the first and the odd ones from the second,
// where they lie (`kept`) and each with its neighbour's lanes (`swapped`).
template <int HALF>
struct SumOrders {
    int32_t kept[W], swapped[W];
    constexpr SumOrders() : kept(), swapped() {
        for (int i = 0; i < W; ++i) {
            kept[i] = i & HALF ? W + i : i;
            swapped[i] = i & HALF ? W + i - HALF : i + HALF;
        }
    }
};
template <int HALF>
static constexpr SumOrders<HALF> SUM_ORDERS{};

// Sums over the lanes of W vectors, as a vector of them. Each is added up in the order of `sum`.
template <int HALF = W / 2>
MM_INLINE vf step_sums(vf (&x)[W]) {
    for (int i = 0; i < HALF; ++i)
        x[i] = shuffle(x[i], x[i + HALF], SUM_ORDERS<HALF>.kept) + shuffle(x[i], x[i + HALF], SUM_ORDERS<HALF>.swapped);
    if constexpr (HALF > 1)
        return step_sums<HALF / 2>(x);
    else
        return x[0];
}

// out[r][g] = row r of w times vector g, lane by lane, for ROWS rows `columns` apart. FIRST says that they come from
// memory.
template <bool FIRST, int ROWS, int BATCH, class Element, class X>
MM_INLINE void step_tile(int64_t columns, const Element* w, const X* x, int64_t x_pitch, vf (*out)[BATCH]) {
    constexpr int64_t span = SPAN<X>;
    vf sums[ROWS][BATCH] = {};
    int64_t k = 0;
    for (; k + span <= columns; k += span)
        for (int r = 0; r < ROWS; ++r) {
            const Element* row = w + r * columns + k;
            if (FIRST && span * sizeof(Element) >= 32)
                __builtin_prefetch(reinterpret_cast<const char*>(row) + STEP_AHEAD);
            const auto weights = step_load(row, X{});
            for (int g = 0; g < BATCH; ++g)
                sums[r][g] = step_multiply_add(weights, step_load(x + g * x_pitch + k, X{}), sums[r][g]);
        }
    if (k < columns)
        for (int r = 0; r < ROWS; ++r) {
            Element rest[span] = {};
            memcpy(rest, w + r * columns + k, (columns - k) * sizeof(Element));
            const auto weights = step_load(rest, X{});
            for (int g = 0; g < BATCH; ++g)
                sums[r][g] = step_multiply_add(weights, step_load(x + g * x_pitch + k, X{}), sums[r][g]);
        }
    for (int r = 0; r < ROWS; ++r)
        for (int g = 0; g < BATCH; ++g) out[r][g] = sums[r][g];
}

// The first n of W elements, the others as 0.
template <class Element>
MM_INLINE vf step_load_first(const Element* p, int64_t n) {
    if (n >= W) return load(p);
    Element first[W] = {};
    memcpy(first, p, n * sizeof(Element));
    return load(first);
}

// Rows of a matrix as what vectors are made of; exact, so that it changes no result.
template <class Element, class X>
MM_INLINE void step_widen(int64_t n, const Element* w, X* to) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        __builtin_prefetch(reinterpret_cast<const char*>(w + i) + STEP_AHEAD);
        store(to + i, load(w + i));
    }
    if (i < n) store(to + i, step_load_first(w + i, n - i), n - i);
}

// The results of up to W rows from the sums of their lanes; out[g * out_pitch + r].
template <int BATCH>
MM_INLINE void step_results(int64_t rows, vf (&sums)[W][BATCH], const float* row_scale, const float* x_scale, float* out,
                            int64_t out_pitch) {
    for (int64_t r = rows; r < W; ++r)
        for (int g = 0; g < BATCH; ++g) sums[r][g] = vf{};
    const vf row_factor = row_scale ? load(row_scale, rows) : splat(1.0f);
    for (int g = 0; g < BATCH; ++g) {
        vf own[W];
        for (int i = 0; i < W; ++i) own[i] = sums[i][g];
        store(out + g * out_pitch, step_sums(own) * (row_factor * (x_scale ? x_scale[g] : 1.0f)), rows);
    }
}

// Up to W rows with BATCH vectors.
template <bool FIRST, int ROWS, int BATCH, class Element, class X>
static void step_group(int64_t rows, int64_t columns, const Element* w, const float* row_scale, const X* x,
                       int64_t x_pitch, const float* x_scale, float* out, int64_t out_pitch) {
    vf sums[W][BATCH];
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS) step_tile<FIRST, ROWS, BATCH>(columns, w + r * columns, x, x_pitch, sums + r);
    for (; r < rows; ++r) step_tile<FIRST, 1, BATCH>(columns, w + r * columns, x, x_pitch, sums + r);
    step_results(rows, sums, row_scale, x_scale, out, out_pitch);
}

// Rows that come from memory are read one after the other, the fastest order; from a cache two at a time, since loads of
// x are the limit there.
template <bool FIRST, int BATCH = STEP_BATCH, class Element, class X>
MM_INLINE void step_some(int64_t batch, int64_t rows, int64_t columns, const Element* w, const float* row_scale,
                         const X* x, int64_t x_pitch, const float* x_scale, float* out, int64_t out_pitch) {
    if (batch == BATCH)
        return step_group<FIRST, FIRST ? 1 : 2, BATCH>(rows, columns, w, row_scale, x, x_pitch, x_scale, out, out_pitch);
    if constexpr (BATCH > 1)
        step_some<FIRST, BATCH - 1>(batch, rows, columns, w, row_scale, x, x_pitch, x_scale, out, out_pitch);
}

// Up to W rows with all vectors, in groups of about the same size.
template <class Element, class X>
static void step_row_block(int64_t batch, int64_t rows, int64_t columns, const Element* w, const float* row_scale,
                           const X* x, int64_t x_pitch, const float* x_scale, float* out, int64_t out_pitch) {
    const int64_t groups = (batch + STEP_BATCH - 1) / STEP_BATCH;
    int64_t end = batch / groups;
    step_some<true>(end, rows, columns, w, row_scale, x, x_pitch, x_scale, out, out_pitch);
    for (int64_t i = 1; i < groups; ++i) {
        const int64_t b = end;
        end = batch * (i + 1) / groups;
        step_some<false>(end - b, rows, columns, w, row_scale, x + b * x_pitch, x_pitch, x_scale ? x_scale + b : nullptr,
                         out + b * out_pitch, out_pitch);
    }
}

// A matrix of another type than the vectors is converted at each load, or, if it meets many, once into `widened`.
template <class Element, class X>
static void step_rows(int64_t batch, int64_t begin, int64_t end, int64_t columns, const Element* w,
                      const float* row_scale, const X* x, int64_t x_pitch, const float* x_scale, float* out,
                      int64_t out_pitch, X* widened) {
    for (int64_t r = begin; r < end; r += W) {
        const int64_t rows = min64(W, end - r);
        const float* scale = row_scale ? row_scale + r : nullptr;
        if constexpr (sizeof(Element) < sizeof(X)) {
            if (batch > STEP_BATCH) {
                step_widen(rows * columns, w + r * columns, widened);
                step_row_block(batch, rows, columns, static_cast<const X*>(widened), scale, x, x_pitch, x_scale, out + r,
                               out_pitch);
                continue;
            }
        }
        step_row_block(batch, rows, columns, w + r * columns, scale, x, x_pitch, x_scale, out + r, out_pitch);
    }
}

// Rows of a packed matrix with up to STEP_BATCH vectors: the additions of step_tile in their order.
template <int BATCH = STEP_BATCH, class X>
static void step_packed_rows(int64_t batch, int64_t begin, int64_t end, int64_t columns, const PackedMatrix& m,
                             const X* x, int64_t x_pitch, const float* x_scale, float* out, int64_t out_pitch) {
    if constexpr (BATCH > 1)
        if (batch < BATCH)
            return step_packed_rows<BATCH - 1>(batch, begin, end, columns, m, x, x_pitch, x_scale, out, out_pitch);
    PackedReader in(m, begin, columns);
    for (int64_t r = begin; r < end; r += W) {
        const int64_t rows = min64(W, end - r);
        vf sums[W][BATCH];
        for (int64_t i = 0; i < rows; ++i) {
            vf own[BATCH] = {};
            in.row(columns, [&](const bf16* w, int64_t first, int64_t n) {
                for (int64_t k = 0; k < n; k += SPAN<X>) {
                    const auto weights = step_load(w + k, X{});
                    for (int g = 0; g < BATCH; ++g)
                        own[g] = step_multiply_add(weights, step_load(x + g * x_pitch + first + k, X{}), own[g]);
                }
            });
            for (int g = 0; g < BATCH; ++g) sums[i][g] = own[g];
        }
        step_results(rows, sums, nullptr, x_scale, out + r, out_pitch);
    }
}

// out[b * out_pitch + r] = x_scale[b] * (row r of the matrix times x[b]) for begin <= r < end. Rows of x are x_pitch
// apart, filled up with zeros to whole registers; x_scale may be null; `widened` has room for W rows.
template <class X>
static void step_product(const StepMatrix& m, int64_t batch, int64_t begin, int64_t end, int64_t columns, const X* x,
                         int64_t x_pitch, const float* x_scale, float* out, int64_t out_pitch, X* widened) {
    switch (m.type) {
        case STEP_FLOAT32:
            return step_rows(batch, begin, end, columns, static_cast<const float*>(m.data), m.scale, x, x_pitch,
                             x_scale, out, out_pitch, widened);
        case STEP_BFLOAT16:
            return step_rows(batch, begin, end, columns, static_cast<const bf16*>(m.data), m.scale, x, x_pitch,
                             x_scale, out, out_pitch, widened);
        case STEP_INT8:
            return step_rows(batch, begin, end, columns, static_cast<const int8_t*>(m.data), m.scale, x, x_pitch,
                             x_scale, out, out_pitch, widened);
        case STEP_PACKED: {
            const auto& packed = *static_cast<const PackedMatrix*>(m.data);
            if (batch <= STEP_BATCH)
                return step_packed_rows(batch, begin, end, columns, packed, x, x_pitch, x_scale, out, out_pitch);
            return step_rows(batch, begin, end, columns, packed.plain, nullptr, x, x_pitch, x_scale, out, out_pitch,
                             widened);
        }
    }
}

// Row `row` of a matrix as floats.
static void step_read_row(const StepMatrix& m, int64_t row, int64_t columns, float* to) {
    const void* data = m.type == STEP_PACKED ? static_cast<const PackedMatrix*>(m.data)->plain : m.data;
    const int64_t first = row * columns;
    for (int64_t i = 0; i < columns; i += W) {
        const int64_t left = columns - i, at = first + i;
        vf x = {};
        switch (m.type) {
            case STEP_FLOAT32: x = step_load_first(static_cast<const float*>(data) + at, left); break;
            case STEP_PACKED:
            case STEP_BFLOAT16: x = step_load_first(static_cast<const bf16*>(data) + at, left); break;
            case STEP_INT8: x = step_load_first(static_cast<const int8_t*>(data) + at, left) * m.scale[row]; break;
        }
        store(to + i, x, left);
    }
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
