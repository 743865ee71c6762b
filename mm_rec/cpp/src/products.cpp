// The C interface of large bfloat16 products, compiled once per level like kernels.cpp; its conventions are those.
// The level amx has the instructions for tiles and avx512bf16 those for vectors: at the others they are emulated, for
// tests.

#include "export.h"
#include "orthogonalize.h"
#include "tile_product.h"
#include "vector_product.h"

using namespace mm_rec::MM_LEVEL;

// C (rows x columns) = A B^T, or += with `add`: A is (rows, depth), B (columns, depth), both bfloat16; a flag says of each
// whether the depth, at least 1, is the fast index in memory. `type` is that of C.
#define MM_PRODUCT(name, blocks)                                                                                      \
    MM_EXPORT(int, name)                                                                                              \
    (int type, int64_t rows, int64_t columns, int64_t depth, const void* a, int64_t a_row, int a_depth_last,          \
     const void* b, int64_t b_row, int b_depth_last, void* c, int64_t c_row, int add, int threads) {                  \
        const ProductOperand left{static_cast<const bf16*>(a), rows, depth, a_row, a_depth_last != 0};                \
        const ProductOperand right{static_cast<const bf16*>(b), columns, depth, b_row, b_depth_last != 0};            \
        const ProductResult<float> wide{static_cast<float*>(c), c_row, static_cast<float*>(add ? c : nullptr)};       \
        const ProductResult<bf16> narrow{static_cast<bf16*>(c), c_row, static_cast<bf16*>(add ? c : nullptr)};        \
        return type == 0 ? !name(left, right, wide, blocks, threads) : !name(left, right, narrow, blocks, threads);   \
    }

MM_PRODUCT(tile_product, TILE_BLOCKS)
MM_PRODUCT(vector_product, VECTOR_BLOCKS)

// Each matrix, contiguous and bfloat16, is replaced by its polar factor. Of a step there are three coefficients; after
// every `restart` steps the Gram matrix is computed anew.
#define MM_ORTHOGONALIZE(name, machine)                                                                               \
    MM_EXPORT(int, name)                                                                                              \
    (int64_t matrices, void* const* data, const int64_t* rows, const int64_t* columns, int64_t steps,                 \
     const float* coefficients, int64_t restart, int threads) {                                                       \
        const PolarSteps how{reinterpret_cast<const PolarStep*>(coefficients), steps, restart};                       \
        return !orthogonalize<machine>(matrices, reinterpret_cast<bf16* const*>(data), rows, columns, how, threads);  \
    }

MM_ORTHOGONALIZE(tile_orthogonalize, TileMachine)
MM_ORTHOGONALIZE(vector_orthogonalize, VectorMachine)
