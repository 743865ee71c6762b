// Polar factors of bfloat16 matrices by a fixed sequence of odd polynomials of degree 5 (orthogonalize in reference.py).
//
// Each matrix is one thread's work from its norm to the result, so that results don't depend on the number of threads.
// For X (n x m, n <= m) all polynomials are evaluated on the small side: with R = X X^T, a step turns X into
// P X and R into P R P, where P = a I + Z and Z = b R + c R^2, so the product of all P is applied to X once. R, Z and
// that product, Q, are symmetric, and only their lower halves are computed. R in bfloat16 has lost its small
// eigenvalues, whose errors every step multiplies by a^2; so after every two steps R is computed anew from Q X.
#pragma once

#include "tile_product.h"
#include "vector_product.h"

namespace mm_rec {
namespace MM_LEVEL {

// Of a x + b x^3 + c x^5, three floats also in the C interface.
struct PolarStep {
    float a, b, c;
};

struct PolarSteps {
    const PolarStep* step;
    int64_t count, restart;  // after every so many of them
};

// The products of one thread.
struct TileMachine {
    TileMachine() { tiles_begin(); }
    ~TileMachine() { tiles_end(); }
    TileMachine(const TileMachine&) = delete;
    bool operator()(const ProductOperand& a, const ProductOperand& b, const ProductResult<bf16>& c) const {
        return tile_product(a, b, c, ProductRange{0, a.outer, 0, b.outer}, TILE_BLOCKS);
    }
};
struct VectorMachine {
    bool operator()(const ProductOperand& a, const ProductOperand& b, const ProductResult<bf16>& c) const {
        return vector_product(a, b, c, ProductRange{0, a.outer, 0, b.outer}, VECTOR_BLOCKS);
    }
};

// A matrix of `short_side` rows, which lie in memory as rows or, if it is tall, as columns.
struct PolarMatrix {
    bf16* data;
    int64_t rows, columns;  // in memory

    bool tall() const { return rows > columns; }
    int64_t short_side() const { return min64(rows, columns); }
    int64_t long_side() const { return max64(rows, columns); }
    // Operands whose r runs along the short side, and along the long one.
    ProductOperand along_short() const { return {data, short_side(), long_side(), columns, !tall()}; }
    ProductOperand along_long() const { return {data, long_side(), short_side(), columns, tall()}; }
};

// Scales x to a norm of 1, or a little less; zeros stay. The square of an element may be too large or too small for a
// float, so the largest is divided by first.
static void normalize(int64_t n, bf16* x, float safety) {
    vf largest{};
    for_vectors(n, [&](int64_t i, auto left) {
        const vf y = load(x + i, left);
        largest = max(largest, max(y, -y));
    });
    const float most = max(largest);
    if (most == 0.0f) return;
    const float inverse = most < 1e-38f ? 1e38f : 1.0f / most;
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += 64 * W)  // short enough for float32 sums
        total += sum_over(min64(n - begin, 64 * W), [&](int64_t i, auto left) {
            const vf y = inverse * load(x + begin + i, left);
            return y * y;
        });
    const float scale = float(1.0 / (__builtin_sqrt(total) * safety));
    for_vectors(n, [&](int64_t i, auto left) { store(x + i, scale * (inverse * load(x + i, left)), left); });
}

// The four symmetric matrices of a thread; of each the blocks on and below the diagonal are there.
struct PolarSquares {
    int64_t n, row;
    bf16 *gram, *poly, *product, *spare;

    static int64_t row_of(int64_t n) { return round_up(n, 16); }
    static int64_t elements(int64_t n) { return n * row_of(n); }

    ProductOperand operand(bf16* x) const { return {x, n, n, row, true, true}; }
    void add_to_diagonal(bf16* x, float a) const {
        for (int64_t i = 0; i < n; ++i) store(x + i * row + i, splat(widen(x[i * row + i]) + a), 1);
    }
    // The blocks of a product that lie on the diagonal are written whole, and rounding has made them unsymmetric: what
    // A B^T then makes of them has errors ten times as large.
    void mirror(bf16* x) const {
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = i / PANEL * PANEL; j < i; ++j) x[j * row + i] = x[i * row + j];
    }
    // to <- factor A B + share D, all of them symmetric and of this size; false if there is no memory.
    template <class Machine>
    bool multiply(const Machine& machine, bf16* a, bf16* b, bf16* to, const bf16* addend, float factor,
                  float share) const {
        const bool done = machine(operand(a), operand(b), {to, row, addend, factor, share, true});
        mirror(to);
        return done;
    }
};

// Q for the matrix whose Gram matrix is in `at.gram`, which is changed; false if there is no memory.
template <class Machine>
static bool polar_product(const Machine& machine, PolarSquares& at, const PolarStep* step, int64_t steps) {
    bool done = true;
    for (int64_t k = 0; k < steps && done; ++k) {
        const auto [a, b, c] = step[k];
        done = at.multiply(machine, at.gram, at.gram, at.poly, at.gram, c, b);
        if (k) {  // Q <- a Q + Q Z
            done = done && at.multiply(machine, at.product, at.poly, at.spare, at.product, 1.0f, a);
            bf16* const old = at.product;
            at.product = at.spare;
            at.spare = old;
        } else {
            memcpy(at.product, at.poly, PolarSquares::elements(at.n) * sizeof(bf16));
            at.add_to_diagonal(at.product, a);
        }
        if (k + 1 == steps) break;
        done = done && at.multiply(machine, at.gram, at.poly, at.spare, at.gram, 1.0f, a);  // R P, then R <- R P P
        done = done && at.multiply(machine, at.spare, at.poly, at.gram, at.spare, 1.0f, a);
    }
    return done;
}

// Works from `x` to `spare`, of the same size, and back.
template <class Machine>
static bool orthogonalize(const Machine& machine, PolarMatrix x, bf16* spare, PolarSquares at, const PolarSteps& how) {
    constexpr float SAFETY = 1.01f;  // against rounding: what is larger than 1 would grow
    const int64_t restart = at.n < TILE ? 1 : how.restart;  // an element of a small R is large, and so is its error
    bf16* const home = x.data;
    normalize(x.rows * x.columns, x.data, SAFETY);
    for (int64_t first = 0, steps; first < how.count; first += steps) {
        steps = min64(restart, how.count - first);
        const ProductResult<bf16> gram{at.gram, at.row, nullptr, 1.0f, 1.0f, true};
        if (!machine(x.along_short(), x.along_short(), gram)) return false;
        at.mirror(at.gram);
        if (!polar_product(machine, at, how.step + first, steps)) return false;
        const ProductOperand q = at.operand(at.product);
        const ProductResult<bf16> to{x.data == home ? spare : home, x.columns, nullptr};
        if (!(x.tall() ? machine(x.along_long(), q, to) : machine(q, x.along_long(), to))) return false;
        x.data = to.data;
    }
    if (x.data != home) memcpy(home, x.data, x.rows * x.columns * sizeof(bf16));
    return true;
}

// Replaces the matrices, contiguous and given by address and shape, by their polar factors. False if there is no memory.
template <class Machine>
static bool orthogonalize(int64_t matrices, bf16* const* data, const int64_t* rows, const int64_t* columns,
                          const PolarSteps& how, int threads) {
    int64_t squares = 0, whole = 0, taken = 0;
    for (int64_t k = 0; k < matrices; ++k) {
        squares = max64(squares, round_up(PolarSquares::elements(min64(rows[k], columns[k])), 32));
        whole = max64(whole, rows[k] * columns[k]);
    }
    bool done = true;
    in_threads(int(min64(matrices, threads)), [&](int, int) {
        const Scratch block(2 * squares + (whole + 1) / 2);
        if (!block.data) return __atomic_store_n(&done, false, __ATOMIC_RELAXED);
        bf16* const buffer = reinterpret_cast<bf16*>(block.data);
        const Machine machine;
        // Matrices differ in size and cores in speed, so a thread takes the next one when it is through.
        for (int64_t k; (k = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED)) < matrices;) {
            const int64_t n = min64(rows[k], columns[k]);
            const PolarSquares at{n, PolarSquares::row_of(n), buffer, buffer + squares, buffer + 2 * squares,
                                  buffer + 3 * squares};
            if (!orthogonalize(machine, {data[k], rows[k], columns[k]}, buffer + 4 * squares, at, how))
                __atomic_store_n(&done, false, __ATOMIC_RELAXED);
        }
    });
    return done;
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
