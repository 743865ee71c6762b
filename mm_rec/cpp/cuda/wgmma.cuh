// Matrix products of a warpgroup (four warps), which read tiles of shared memory themselves, once for 64 rows. Compute
// capability 9.0 alone has these instructions: kernels with them have a body only where MM_REC_WGMMA is defined, and are
// launched only if has_wgmma(). What products may be in flight, and what must not be touched meanwhile, is in the description
// of wgmma.mma_async in NVIDIA's "PTX ISA".
#ifndef MM_REC_WGMMA_CUH
#define MM_REC_WGMMA_CUH

#include <initializer_list>

#include "device.cuh"
#include "tile.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MM_REC_WGMMA
#endif

namespace mm_rec {

// Whether this is such a device, and a library compiled for it.
inline bool has_wgmma() {
  for (const int compiled : {__CUDA_ARCH_LIST__}) {
    if (compiled == 900) {
      return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
             device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
    }
  }
  return false;
}

// 64 x 64 elements, a row in 128 bytes; of every row the eight pieces of 16 bytes change places with its number, so that
// eight rows of one column fall in different banks. ("128-byte swizzle")
struct alignas(1024) SwizzledTile {
  static constexpr int kSize = 64;
  bf16 elements[kSize * kSize];

  // The column is a multiple of 8.
  static __device__ __forceinline__ int at(int row, int column) { return row * kSize + (column ^ (row % 8 * 8)); }
};

// What wgmma is told of a tile: where it is, in units of 16 bytes, and that eight rows are 1,024 bytes.
__device__ __forceinline__ uint64_t describe(const SwizzledTile& tile) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 / 16} << 32, kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kEightRows | kUnused | (shared_address(&tile) / 16 & 0x3fff);
}

// Whether a tile holds its operand with the summed index along rows (K), or the other one.
enum class Along { kSummed, kOther };

// How far, in units of 16 bytes, the next 16 of the summed index are.
__host__ __device__ constexpr uint64_t step_of(Along along) { return along == Along::kSummed ? 2 : 128; }

#define MM_REC_ROW(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define MM_REC_ROWS(c)                                                                                               \
  MM_REC_ROW(c, 0), MM_REC_ROW(c, 1), MM_REC_ROW(c, 2), MM_REC_ROW(c, 3), MM_REC_ROW(c, 4), MM_REC_ROW(c, 5),         \
      MM_REC_ROW(c, 6), MM_REC_ROW(c, 7)
#define MM_REC_NEW_ROW(c, n) "=f"(c[n][0]), "=f"(c[n][1]), "=f"(c[n][2]), "=f"(c[n][3])
#define MM_REC_NEW_ROWS(c)                                                                                           \
  MM_REC_NEW_ROW(c, 0), MM_REC_NEW_ROW(c, 1), MM_REC_NEW_ROW(c, 2), MM_REC_NEW_ROW(c, 3), MM_REC_NEW_ROW(c, 4),       \
      MM_REC_NEW_ROW(c, 5), MM_REC_NEW_ROW(c, 6), MM_REC_NEW_ROW(c, 7)
#define MM_REC_SUMS                                                                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "   \
  "%24, %25, %26, %27, %28, %29, %30, %31}"

using Sums64 = Fragments<8>;  // of 64 columns; warp w of the group has rows 16 w ...

// Registers that products use have their values; to be called before the first of several products.
__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

// Products since the last commit are one group, ...
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// ... and this waits for all groups before the last `Pending`. Sums are there after a call of `settle` that follows.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Pending) : "memory");
}

// Nothing that is done to sums passes this. Between products and the wait for them the compiler must not touch them, not even
// to copy them; where it does, ptxas warns that products are serialized.
__device__ __forceinline__ void settle(Sums64& sums) { asm volatile("" : MM_REC_ROWS(sums)); }

// Sums are of no interest before the next product, so that their registers need not be copied.
__device__ __forceinline__ void forget(Sums64& sums) { asm volatile("" : MM_REC_NEW_ROWS(sums)); }

// c <- left right (+ c if `Add`) over 64 of the summed index: both from tiles, ...
template <Along kLeft, Along kRight, bool Add>
__device__ __forceinline__ void wgmma(Sums64& c, uint64_t left, uint64_t right) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " MM_REC_SUMS ", %32, %33, p, 1, 1, %35, %36;\n}\n"
                 : MM_REC_ROWS(c)
                 : "l"(left + k * step_of(kLeft)), "l"(right + k * step_of(kRight)), "r"(static_cast<int>(Add || k > 0)),
                   "n"(kLeft == Along::kOther), "n"(kRight == Along::kOther)
                 : "memory");
  }
}

// ... or the left one from registers, where it stays as it is until the product is there.
template <Along kRight, bool Add>
__device__ __forceinline__ void wgmma(Sums64& c, const Left<false> (&left)[4], uint64_t right) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " MM_REC_SUMS
                 ", {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n"
                 : MM_REC_ROWS(c)
                 : "r"(left[k].hi[0]), "r"(left[k].hi[1]), "r"(left[k].hi[2]), "r"(left[k].hi[3]),
                   "l"(right + k * step_of(kRight)), "r"(static_cast<int>(Add || k > 0)), "n"(kRight == Along::kOther)
                 : "memory");
  }
}

// Registers that a product in flight reads are not given to anything else before this.
__device__ __forceinline__ void hold(const Left<false> (&left)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    asm volatile("" ::"r"(left[k].hi[0]), "r"(left[k].hi[1]), "r"(left[k].hi[2]), "r"(left[k].hi[3]) : "memory");
  }
}

// Take registers from those of the block that gave some back, by all threads of a warpgroup; numbers are multiples of 8.
template <int Count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(Count));
}

// Where threads of several warpgroups meet step by step; a thread may do other things between its arrival and its wait.
class Gate {
 public:
  __device__ __forceinline__ explicit Gate(uint64_t& barrier) : at_(shared_address(&barrier)) {}

  // By one thread, before all others wait for it in some other way.
  __device__ __forceinline__ void open(int threads) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(at_), "r"(threads) : "memory");
  }
  // What this thread wrote to shared memory is there for all that wait, also for their products.
  __device__ __forceinline__ void arrive() const {
    asm volatile("{\n.reg .b64 state;\nfence.proxy.async.shared::cta;\n"
                 "mbarrier.arrive.shared::cta.b64 state, [%0];\n}\n" ::"r"(at_)
                 : "memory");
  }
  __device__ __forceinline__ void wait() {
    for (int there = 0; there == 0;) {
      asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}\n"
                   : "=r"(there)
                   : "r"(at_), "r"(phase_)
                   : "memory");
    }
    phase_ ^= 1;
  }

 private:
  uint32_t at_;
  unsigned phase_ = 0;
};

// Four 8x8 matrices of 16-bit elements to shared memory; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix(void* row, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_address(row)), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

}  // namespace mm_rec

#endif
