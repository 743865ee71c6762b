// The C interface of large bfloat16 products, compiled once per level like kernels.cpp; its conventions are those.
// Only the level amx has the instructions: at the others the tiles are emulated, for tests.

#include "tile_product.h"

using namespace mm_rec::MM_LEVEL;

#define MM_JOIN(a, b) a##_##b
#define MM_WITH_LEVEL(name, level) MM_JOIN(name, level)
#define MM_EXPORT(result, name) \
    extern "C" __attribute__((visibility("default"))) result MM_WITH_LEVEL(mm_rec_##name, MM_LEVEL)

template <class T>
static int product(const TileOperand& a, const TileOperand& b, void* c, int64_t c_row, int add, int threads) {
    return int(!tile_product(a, b, TileResult<T>{static_cast<T*>(c), c_row, add != 0}, TILE_BLOCKS, threads));
}

// C (rows x columns) = A B^T, or += with `add`: A is (rows, depth), B (columns, depth), both bfloat16; a flag says of each
// whether the depth, at least 1, is the fast index in memory. `type` is that of C.
MM_EXPORT(int, tile_product)
(int type, int64_t rows, int64_t columns, int64_t depth, const void* a, int64_t a_row, int a_depth_last, const void* b,
 int64_t b_row, int b_depth_last, void* c, int64_t c_row, int add, int threads) {
    const TileOperand left{static_cast<const bf16*>(a), rows, depth, a_row, a_depth_last != 0};
    const TileOperand right{static_cast<const bf16*>(b), columns, depth, b_row, b_depth_last != 0};
    return type == 0 ? product<float>(left, right, c, c_row, add, threads)
                     : product<bf16>(left, right, c, c_row, add, threads);
}
