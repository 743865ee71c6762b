// Parts that the time loops of recurrence share: staging of inputs, resets, sizes.
#ifndef MM_REC_RECURRENCE_CUH
#define MM_REC_RECURRENCE_CUH

#include "common.cuh"
#include "device.cuh"
#include "ptx.cuh"

namespace mm_rec {

// Sizes and where the block of threads stands: `batch` sequences of `time` steps, `heads` heads of a known size.
struct Extent {
  int64_t batch, time, heads;
};

// Start copying one head's elements of `Steps` steps, t0, t0 + step, ..., of `Batch` sequences to shared memory as
// (Steps, Batch, Dim), rows of it `Pitch` elements apart. Rows b * time + t of `source` are `stride` elements apart. What
// is outside reads as zero.
template <int Threads, int Steps, int Batch, int Dim, int Pitch, typename T>
__device__ __forceinline__ void copy_rows(T* target, const T* source, int64_t stride, int64_t first_sequence, int64_t t0,
                                          int step, const Extent& extent) {
  constexpr int kPiece = 16 / sizeof(T);
  constexpr int kPieces = Dim / kPiece;
  static_assert(Dim % kPiece == 0 && Pitch % kPiece == 0, "rows move in pieces of 16 bytes");
#pragma unroll 4
  for (int i = threadIdx.x; i < Steps * Batch * kPieces; i += Threads) {
    const int row = i / kPieces, piece = i % kPieces;
    const int64_t t = t0 + static_cast<int64_t>(row / Batch) * step;
    const int64_t b = first_sequence + row % Batch;
    const bool valid = t >= 0 && t < extent.time && b < extent.batch;
    const T* from = source + (valid ? (b * extent.time + t) * stride + piece * kPiece : 0);
    cp_async_16(target + row * Pitch + piece * kPiece, from, valid);
  }
}

// Reset flags of up to 32 steps of `Batch` sequences. `load` starts the reads, `bits` waits for them: bit s of answer n
// is the flag of step t0 + s * step of sequence first_sequence + n, 0 outside the sequence.
template <int Batch>
class ResetFlags {
 public:
  __device__ __forceinline__ void load(const bool* reset, int64_t first_sequence, int64_t t0, int step,
                                       const Extent& extent) {
    const int64_t t = t0 + static_cast<int64_t>(threadIdx.x % 32) * step;
#pragma unroll
    for (int n = 0; n < Batch; ++n) {
      const int64_t b = first_sequence + n;
      flag_[n] = reset != nullptr && b < extent.batch && t >= 0 && t < extent.time && reset[b * extent.time + t];
    }
  }
  // All lanes of a warp take part.
  __device__ __forceinline__ void bits(unsigned (&answer)[Batch]) const {
#pragma unroll
    for (int n = 0; n < Batch; ++n) answer[n] = __ballot_sync(kFullWarp, flag_[n]);
  }

 private:
  bool flag_[Batch];
};

// Element `i` of an array in registers, which must not be indexed by a variable.
template <int N>
__device__ __forceinline__ unsigned pick(const unsigned (&x)[N], int i) {
  unsigned answer = x[0];
#pragma unroll
  for (int n = 1; n < N; ++n) answer = n == i ? x[n] : answer;
  return answer;
}

// The matrix of one head for kernels of any head size: element (row, column), from a transposed copy in shared memory
// (then neighbouring threads read neighbouring rows) or from memory.
class HeadMatrix {
 public:
  __device__ __forceinline__ HeadMatrix(const float* matrix, float* shared, int dim, bool keep)
      : at_(keep ? shared : matrix), row_(keep ? 1 : dim), column_(keep ? dim + 1 : 1) {
    if (keep) {
      for (int i = threadIdx.x; i < dim * dim; i += blockDim.x) shared[i % dim * (dim + 1) + i / dim] = matrix[i];
    }
  }
  __device__ __forceinline__ float operator()(int row, int column) const {
    return at_[static_cast<int64_t>(row) * row_ + static_cast<int64_t>(column) * column_];
  }

 private:
  const float* at_;
  int row_, column_;
};

// Launch sizes of the kernels of any head size, which keep `vectors` vectors and, if it fits, the matrix.
struct AnySize {
  int threads;
  bool keep_matrix;
  size_t shared_bytes;

  AnySize(int dim, int vectors) {
    threads = static_cast<int>(dim < 1024 ? ceil_div(dim, 32) * 32 : 1024);
    const size_t matrix = sizeof(float) * dim * (dim + 1);
    shared_bytes = sizeof(float) * vectors * dim;
    keep_matrix = shared_bytes + matrix <= shared_memory_limit();
    if (keep_matrix) shared_bytes += matrix;
  }
  dim3 grid(const Extent& extent) const {
    return dim3(static_cast<unsigned>(extent.heads), static_cast<unsigned>(extent.batch));
  }
  dim3 block() const { return dim3(threads); }
};

}  // namespace mm_rec

#endif
