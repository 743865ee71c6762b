// Attention over the retained pairs, backward: the gradients of each pair, summed over the runs that see it, in their order. Most
// tokens are never kept; for them only the gradient of the score is written, which is 0.
#include "launch.cuh"
#include "retained_attention_backward.cuh"

namespace mm_rec {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kContexts = 8;  // contexts of a warp
constexpr int kPieces = 4;                                        // of 64 columns: heads of up to 256

// The sums of one pair; a lane has two columns of each piece.
struct PairSum {
  const PairGradients& gradients;
  int dim, lane;
  float k[kPieces][2] = {}, v[kPieces][2] = {}, score = 0.0f;

  __device__ __forceinline__ PairSum(const PairGradients& gradients_, int dim_)
      : gradients(gradients_), dim(dim_), lane(static_cast<int>(threadIdx.x) % 32) {}
  __device__ __forceinline__ int column(int piece) const { return 64 * piece + 2 * lane; }
  // Add what came of the candidate in row `row` of the scratch memory.
  __device__ __forceinline__ void add(int64_t row) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (column(i) >= dim) continue;
      float x[2], y[2];
      load<2>(gradients.k + row * dim + column(i), x);
      load<2>(gradients.v + row * dim + column(i), y);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        k[i][j] += x[j];
        v[i][j] += y[j];
      }
    }
    score += gradients.score[row];
  }
  // Put the sums in a row, beside what is there if `Beside`.
  template <bool Beside, typename T>
  __device__ __forceinline__ void store(T* to_k, T* to_v) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (column(i) >= dim) continue;
      float x[2] = {}, y[2] = {};
      if constexpr (Beside) {
        load<2>(to_k + column(i), x);
        load<2>(to_v + column(i), y);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        x[j] += k[i][j];
        y[j] += v[i][j];
      }
      mm_rec::store<2>(to_k + column(i), x);
      mm_rec::store<2>(to_v + column(i), y);
    }
  }
};

// A head of a sequence.
struct Line {
  const RetainedInputs& in;
  const RetainedExtent& extent;
  int64_t local, line, b, head;  // among those of the scratch memory, and among all

  __device__ __forceinline__ Line(const RetainedInputs& in_, const RetainedExtent& extent_, const PairGradients& gradients)
      : in(in_), extent(extent_), local(blockIdx.y), line(gradients.first + blockIdx.y), b(line / extent_.heads),
        head(line % extent_.heads) {}
  // Where the gradients of a candidate of run r are.
  __device__ __forceinline__ int64_t row(int64_t r, int64_t candidate) const {
    return (local * extent.runs() + r) * extent.candidates() + candidate;
  }
  // Add what came of `pair`, which slot `own` holds when run r begins, from that run on until it goes. Whole warps take part.
  __device__ __forceinline__ void follow(PairSum& sum, int64_t r, int own, int pair) const {
    for (; r < extent.runs(); r += 32) {
      const int64_t at = r + sum.lane, t0 = at * kRun;
      const bool seen = at < extent.runs() && in.held[(line * (extent.runs() + 1) + at) * extent.slots + own] == pair &&
                        in.position[b * extent.time + t0] != 0 && in.slot[line * extent.time + t0] != own;
      const unsigned gone = ~__ballot_sync(kFullWarp, seen);
      const int count = gone == 0 ? 32 : __ffs(static_cast<int>(gone)) - 1;
#pragma unroll 4
      for (int i = 0; i < count; ++i) sum.add(row(r + i, own));
      if (count < 32) return;
    }
  }
};

// Tokens of the window and the chunk.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    context_kernel(const RetainedBackward p, const RetainedExtent extent, const PairGradients gradients) {
  const Line line(p.in, extent, gradients);
  const int lane = threadIdx.x % 32;
  const int64_t c0 = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * kContexts, own = c0 + lane;
  // Context c leaves the window at token c.
  const int slot = lane < kContexts && own < extent.time ? p.in.slot[line.line * extent.time + own] : -1;
  if (lane < kContexts && own < extent.context() && slot < 0) {
    p.dscore[(line.b * extent.context() + own) * extent.heads + line.head] = 0.0f;
  }
  for (unsigned rest = __ballot_sync(kFullWarp, slot >= 0); rest != 0; rest &= rest - 1) {
    const int i = __ffs(static_cast<int>(rest)) - 1, taken = __shfl_sync(kFullWarp, slot, i);
    const int64_t c = c0 + i;
    PairSum sum(gradients, extent.dim);
    sum.add(line.row(c / kRun, extent.slots + c % kRun));
    line.follow(sum, c / kRun + 1, taken, static_cast<int>(extent.slots + c));
    const int64_t to = extent.context_at(line.b, c, line.head);
    sum.store<true>(static_cast<T*>(p.dk) + to, static_cast<T*>(p.dv) + to);
    if (lane == 0) p.dscore[(line.b * extent.context() + c) * extent.heads + line.head] = sum.score;
  }
}

// Pairs that were in the slots before the chunk.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    kept_kernel(const RetainedBackward p, const RetainedExtent extent, const PairGradients gradients) {
  const Line line(p.in, extent, gradients);
  const int j = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (j >= extent.slots) return;
  PairSum sum(gradients, extent.dim);
  line.follow(sum, 0, j, j);
  const int64_t to = line.line * extent.slots + j;
  sum.store<false>(static_cast<T*>(p.dkept_k) + to * extent.dim, static_cast<T*>(p.dkept_v) + to * extent.dim);
  if (sum.lane == 0) p.dkept_score[to] = sum.score;
}

template <typename T>
cudaError_t add_up(const RetainedBackward& p, const RetainedExtent& extent, const PairGradients& gradients, void* stream) {
  const auto grid = [&](int64_t size) {
    return dim3(static_cast<unsigned>(ceil_div(size, kWarps)), static_cast<unsigned>(gradients.lines));
  };
  const cudaError_t error = launch(context_kernel<T>, grid(ceil_div(extent.context(), kContexts)), dim3(kThreads), 0, stream, p,
                                   extent, gradients);
  if (error != cudaSuccess) return error;
  return launch(kept_kernel<T>, grid(extent.slots), dim3(kThreads), 0, stream, p, extent, gradients);
}

}  // namespace

cudaError_t retained_backward_sums(const RetainedBackward& p, int64_t dtype, const RetainedExtent& extent,
                                   const PairGradients& gradients, void* stream) {
  return dtype == kBFloat16 ? add_up<bf16>(p, extent, gradients, stream) : add_up<float>(p, extent, gradients, stream);
}

}  // namespace mm_rec
