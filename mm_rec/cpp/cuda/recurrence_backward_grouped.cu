// recurrence, backward in time, for heads of 64: a block owns one head of eight sequences, which is what a matrix instruction
// takes, so that all three products run on the tensor cores: the gates W_g h', the step W_g^T du, and dW_g, 16 rows (two
// steps of eight sequences) at a time. Operands are split into hi + lo.
//
// Four warps walk from step to step and do nothing else: g_t = dh_t + carried, du_t, W_g^T du_t. Eight others work for them,
// a few steps ahead and behind: they fetch inputs, compute gates, write gradients and add up dW_g. Chunks of four steps pass
// between the two, in place, once a chunk.
//
// A warp has 16 elements of the products. Row r of a matrix instruction is element 2 r of them, row r + 8 element 2 r + 1,
// so that a thread holds two neighbouring elements of two sequences.
#include "launch.cuh"
#include "recurrence.cuh"
#include "recurrence_backward.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace mm_rec {
namespace {

constexpr int kDim = 64, kGroup = 8, kWarps = kDim / 16, kSteps = 4, kStages = 4;
constexpr int kParts = 2;  // into which the service is divided: warps of each part take half of a chunk's steps
constexpr int kWalkers = 32 * kWarps, kServants = kParts * kWalkers, kThreads = kWalkers + kServants;
constexpr int kRows = kSteps * kGroup;
constexpr int kPitch = kDim + 4;  // of float32 rows: neighbouring sequences then fall in different banks
template <typename U>
constexpr int kPitchU = sizeof(U) == 2 ? kDim + 8 : kDim + 4;

// The inputs of a chunk, (Steps, Group, Dim) each.
template <typename U>
struct Chunk {
  float dh[kRows * kPitch];     // then g
  float h[kRows * kPitch];      // h_{t-1}, 0 after resets
  float z[kRows * kPitch];
  float gamma[kRows * kPitch];  // 0 at resets
  U u[kRows * kPitchU<U>];
};

template <typename U>
struct Shared {
  Chunk<U> stage[kStages];
  // Of the chunk that is being walked through and of the one before or after it.
  Tile<kRows, kDim, true> h[2];
  Tile<16, kDim, true> du[2][kSteps / 2];
  float gate[2][kRows * kPitch];
  float keep[2][kRows];  // 0 at resets
};

// The matrix of a head, or its transpose, as left operand; this warp's 16 rows.
class Matrix {
 public:
  template <bool Transpose>
  __device__ __forceinline__ void load(const float* __restrict__ w) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % kWarps * 16 + lane / 4 * 2;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + i % 2, c = 16 * k + lane % 4 * 2 + i / 2 * 8;
        const float first = w[Transpose ? c * kDim + r : r * kDim + c];
        const float second = w[Transpose ? (c + 1) * kDim + r : r * kDim + c + 1];
        hi_[k][i] = pack_bf16(first, second);
        lo_[k][i] = pack_remainder(first, second);
      }
    }
  }
  // The product with eight rows of `vectors` from row `first` on: element i % 2 of the sequence i / 2 of this thread.
  template <int Rows>
  __device__ __forceinline__ void multiply(const Tile<Rows, kDim, true>& vectors, int first, float (&out)[4]) const {
    const int lane = threadIdx.x % 32, at = (first + lane % 8) * vectors.kStride + lane / 8 * 8;
    float sum[3][4] = {};  // hi hi, lo hi, hi lo: three chains, so that none waits for the other
#pragma unroll
    for (int k = 0; k < kDim / 16; k += 2) {
      uint32_t hi[4], lo[4];
      ldmatrix(hi, vectors.hi + at + 16 * k);
      ldmatrix(lo, vectors.lo + at + 16 * k);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        mma_bf16(sum[0], hi_[k + j], hi[2 * j], hi[2 * j + 1]);
        mma_bf16(sum[1], lo_[k + j], hi[2 * j], hi[2 * j + 1]);
        mma_bf16(sum[2], hi_[k + j], lo[2 * j], lo[2 * j + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from = i / 2 + i % 2 * 2;  // accumulators come as (row, sequence)
      out[i] = sum[0][from] + (sum[1][from] + sum[2][from]);
    }
  }

 private:
  uint32_t hi_[kDim / 16][4], lo_[kDim / 16][4];
};

// What a thread of either kind of warps knows: two neighbouring elements of two sequences of the products.
struct Corner {
  int row, vector;
  __device__ __forceinline__ Corner()
      : row(static_cast<int>(threadIdx.x) / 32 % kWarps * 16 + static_cast<int>(threadIdx.x) % 32 / 4 * 2),
        vector(static_cast<int>(threadIdx.x) % 4 * 2) {}
  // Of step s of a chunk and sequence vector + q.
  __device__ __forceinline__ int line(int s, int q) const { return s * kGroup + vector + q; }
};

// The warps that walk. Chunk c holds the steps T - 1 - c * Steps, ..., backward.
template <typename U>
class Walk {
 public:
  __device__ __forceinline__ Walk(const RecurrenceBackward& p, const Extent& extent, int64_t head, int64_t first_sequence)
      : last_(extent.time - 1) {
    transposed_.template load<true>(p.w_g + head * kDim * kDim);
    each_pair(extent, head, first_sequence, [&](int64_t at, float* pair) {
      float given[2] = {};
      if (at >= 0 && p.dh_last != nullptr) load<2>(p.dh_last + at, given);
      pair[0] = given[0];
      pair[1] = given[1];
    });
  }

  __device__ __forceinline__ void chunk(Shared<U>& shared, int64_t c) {
    auto& in = shared.stage[c % kStages];
    const int64_t steps = last_ + 1 - c * kSteps;  // that are left
    float dh[kSteps][4], slope[kSteps][4], gamma[kSteps][4], keep[kSteps][2];  // slope: du / g
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const int line = corner_.line(s, q), at = line * kPitch + corner_.row;
        float x[4][2];
        load<2>(in.dh + at, x[0]);
        load<2>(in.gamma + at, x[1]);
        load<2>(in.z + at, x[2]);
        load<2>(shared.gate[c % 2] + at, x[3]);
        keep[s][q] = shared.keep[c % 2][line];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          dh[s][2 * q + j] = x[0][j];
          gamma[s][2 * q + j] = x[1][j];
          slope[s][2 * q + j] = x[2][j] * x[3][j] * (1.0f - x[3][j]);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      auto& tile = shared.du[c % 2][s / 2];
      float g[4], fed_back[4];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        float pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) pair[j] = g[2 * q + j] = dh[s][2 * q + j] + carried_[2 * q + j];
        tile.set(s % 2 * kGroup + corner_.vector + q, corner_.row, pair[0] * slope[s][2 * q], pair[1] * slope[s][2 * q + 1]);
        store<2>(in.dh + corner_.line(s, q) * kPitch + corner_.row, pair);
      }
      named_barrier(1, kWalkers);
      transposed_.multiply(tile, s % 2 * kGroup, fed_back);
      if (s >= steps) continue;  // steps before the first change nothing
#pragma unroll
      for (int i = 0; i < 4; ++i) carried_[i] = fmaf(gamma[s][i], g[i], keep[s][i / 2] * fed_back[i]);
    }
  }

  __device__ __forceinline__ void finish(const RecurrenceBackward& p, const Extent& extent, int64_t head,
                                         int64_t first_sequence) {
    each_pair(extent, head, first_sequence, [&](int64_t at, float* pair) {
      const float result[2] = {pair[0], pair[1]};
      if (at >= 0) store<2>(p.dh0 + at, result);
    });
  }

 private:
  // Call body(where in (B, D), or -1; the two elements of `carried_`) for both sequences.
  template <typename Body>
  __device__ __forceinline__ void each_pair(const Extent& extent, int64_t head, int64_t first_sequence,
                                            const Body& body) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int64_t sequence = first_sequence + corner_.vector + q;
      const int64_t at = (sequence * extent.heads + head) * kDim + corner_.row;
      body(sequence < extent.batch ? at : -1, carried_ + 2 * q);
    }
  }

  Corner corner_;
  Matrix transposed_;
  int64_t last_;
  float carried_[4];  // the part of g_t that comes from step t + 1
};

// The warps that work for them. Elementwise, a thread has four neighbouring elements of one sequence, in the steps of its part.
template <typename U>
class Service {
 public:
  static __device__ __forceinline__ int part() { return static_cast<int>(threadIdx.x) / kWalkers - 1; }

  __device__ __forceinline__ Service(const RecurrenceBackward& p, const Extent& extent, int64_t head, int64_t first_sequence)
      : p_(p), extent_(extent), head_(head), vector_(thread() / kPieces),
        column_(thread() % kPieces * 4), sequence_(first_sequence + vector_), last_(extent.time - 1) {
    matrix_.template load<false>(p.w_g + head * kDim * kDim);
    if (p.u_bias != nullptr) load<2>(p.u_bias + head * kDim + corner_.row, bias_);
  }

  // Start fetching a chunk.
  __device__ __forceinline__ void prefetch(Shared<U>& shared, int64_t c) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      ready_reset_[i] = coming_reset_[i];
      coming_reset_[i] = false;
    }
    if (last_ >= c * kSteps) {
      auto& to = shared.stage[c % kStages];
      const int64_t t0 = last_ - c * kSteps, width = extent_.heads * kDim;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int s = step(i);
        const int64_t t = t0 - s, row = sequence_ * extent_.time + t, at = row * width + head_ * kDim + column_;
        const bool there = sequence_ < extent_.batch && t >= 0;
        const int to_at = (s * kGroup + vector_) * kPitch + column_;
        const auto copy = [&](float* target, const float* source, int64_t from, bool valid) {
          cp_async_16(target + to_at, source + (valid ? from : 0), valid);
        };
        copy(to.dh, p_.dh, at, there);
        copy(to.h, p_.h, at - width, there && t > 0);
        copy(to.z, p_.z, at, there);
        copy(to.gamma, p_.gamma, at, there);
        if (sizeof(U) == 4 || column_ % 8 == 0) {
          const U* u = static_cast<const U*>(p_.u) + (there ? row * p_.u_stride + head_ * kDim + column_ : 0);
          cp_async_16(to.u + (s * kGroup + vector_) * kPitchU<U> + column_, u, there);
        }
        if (p_.reset != nullptr) coming_reset_[i] = p_.reset[there ? row : 0] && there;
      }
    }
    cp_async_commit();
  }

  // Make the chunk fetched before the last one ready to be walked through: resets, h_{t-1} as operand, gates.
  __device__ __forceinline__ void prepare(Shared<U>& shared, int64_t c) {
    cp_async_wait<1>();
    named_barrier(2, kServants);
    if (last_ < c * kSteps) return;
    auto& in = shared.stage[c % kStages];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int s = step(i), line = s * kGroup + vector_, at = line * kPitch + column_;
      const bool cut = ready_reset_[i];
      float x[4], zero[4] = {};
      load<4>(in.h + at, x);
      if (c * kSteps + s == last_ && p_.h0 != nullptr && sequence_ < extent_.batch) {  // the step before the first is h0
        load<4>(p_.h0 + (sequence_ * extent_.heads + head_) * kDim + column_, x);
        store<4>(in.h + at, x);
      }
      if (cut) {
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = 0.0f;
        store<4>(in.h + at, zero);
        store<4>(in.gamma + at, zero);
      }
      shared.h[c % 2].set(line, column_, x);
      if (column_ == 0) shared.keep[c % 2][line] = cut ? 0.0f : 1.0f;
    }
    named_barrier(2, kServants);
    float gate[kOwn][4];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) matrix_.multiply(shared.h[c % 2], step(i) * kGroup, gate[i]);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const int line = corner_.line(step(i), q);
        float u[2];
        load<2>(in.u + line * kPitchU<U> + corner_.row, u);
#pragma unroll
        for (int j = 0; j < 2; ++j) u[j] = sigmoid(u[j] + bias_[j] + gate[i][2 * q + j]);
        store<2>(shared.gate[c % 2] + line * kPitch + corner_.row, u);
      }
    }
  }

  // Write the gradients of a chunk that has been walked through, and add to that of the matrix.
  __device__ __forceinline__ void finish(Shared<U>& shared, int64_t c) {
    const auto& in = shared.stage[c % kStages];
    const int64_t t0 = last_ - c * kSteps, width = extent_.heads * kDim;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int s = step(i), at = (s * kGroup + vector_) * kPitch + column_;
      float g[4], h[4], z[4], gate[4];
      load<4>(in.dh + at, g);
      load<4>(in.h + at, h);
      load<4>(in.z + at, z);
      load<4>(shared.gate[c % 2] + at, gate);
      if (t0 < s || sequence_ >= extent_.batch) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        h[j] *= g[j];
        g[j] *= gate[j];
        z[j] *= g[j] * (1.0f - gate[j]);
        du_sum_[j] += z[j];
      }
      const int64_t row = sequence_ * extent_.time + t0 - s, to = row * width + head_ * kDim + column_;
      store<4>(p_.dz + to, g);
      store<4>(p_.dgamma + to, h);
      store<4>(static_cast<U*>(p_.du) + row * p_.du_stride + head_ * kDim + column_, z);
    }
    multiply_step<true>(dw_, load_left<true>(shared.du[c % 2][part()], warp() * 16, 0), shared.h[c % 2], 0, 16 * part());
    named_barrier(2, kServants);  // `prepare` uses the tiles again
  }

  // Sums of this part: (Dim, Dim), and (Dim) of each sequence where there is a bias.
  __device__ __forceinline__ void store_sums(float* __restrict__ dw, float* __restrict__ dbias) const {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float pair[2] = {dw_[n][2 * r], dw_[n][2 * r + 1]};
        store<2>(dw + (warp() * 16 + fragment_row(2 * r)) * kDim + fragment_column(n, 0), pair);
      }
    }
    if (p_.u_bias != nullptr && sequence_ < extent_.batch) {
      store<4>(dbias + (sequence_ * extent_.heads + head_) * kDim + column_, du_sum_);
    }
  }

 private:
  static constexpr int kPieces = kDim / 4, kOwn = kSteps / kParts;
  static_assert(kWalkers == kGroup * kPieces, "a thread for each four elements of a step");
  static_assert(kOwn == 2, "the steps of a part are a tile of du");
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x) % kWalkers; }
  static __device__ __forceinline__ int warp() { return thread() / 32; }
  static __device__ __forceinline__ int step(int i) { return part() * kOwn + i; }

  const RecurrenceBackward& p_;
  const Extent& extent_;
  int64_t head_;
  int vector_, column_;
  int64_t sequence_, last_;
  Corner corner_;
  Matrix matrix_;
  float bias_[2] = {}, du_sum_[4] = {};
  // Of the chunk fetched last, and of the one before: a flag is looked at a chunk after it was asked for.
  bool coming_reset_[kOwn] = {}, ready_reset_[kOwn] = {};
  Fragments<kDim / 8> dw_ = {};
};

template <typename U>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_kernel(const RecurrenceBackward p, float* __restrict__ dw_partial, float* __restrict__ dbias_partial,
                   const Extent extent) {
  auto& shared = *reinterpret_cast<Shared<U>*>(dynamic_shared());
  const int64_t head = blockIdx.x, first_sequence = static_cast<int64_t>(blockIdx.y) * kGroup;
  const int64_t chunks = ceil_div(extent.time, kSteps);
  if (threadIdx.x < kWalkers) {
    Walk<U> walk(p, extent, head, first_sequence);
    for (int64_t c = 0; c < chunks; ++c) {
      named_barrier(3, kThreads);
      walk.chunk(shared, c);
    }
    named_barrier(3, kThreads);
    walk.finish(p, extent, head, first_sequence);
  } else {
    Service<U> service(p, extent, head, first_sequence);
    service.prefetch(shared, 0);
    service.prefetch(shared, 1);
    service.prepare(shared, 0);
    for (int64_t c = 0; c < chunks; ++c) {
      named_barrier(3, kThreads);
      service.prefetch(shared, c + 2);
      if (c > 0) service.finish(shared, c - 1);
      service.prepare(shared, c + 1);
    }
    named_barrier(3, kThreads);
    service.finish(shared, chunks - 1);
    const int64_t slot = static_cast<int64_t>(blockIdx.y) * kParts + service.part();
    service.store_sums(dw_partial + (slot * extent.heads + head) * kDim * kDim,
                       dbias_partial + service.part() * extent.batch * extent.heads * kDim);
  }
}

template <typename U>
cudaError_t run(const RecurrenceBackward& p, float* dw_partial, float* dbias_partial, const Extent& extent, void* stream) {
  const dim3 grid(static_cast<unsigned>(extent.heads), static_cast<unsigned>(ceil_div(extent.batch, kGroup)));
  return launch(grouped_kernel<U>, grid, dim3(kThreads), sizeof(Shared<U>), stream, p, dw_partial, dbias_partial, extent);
}

}  // namespace

bool recurrence_grouped(int64_t dim) {
  return dim == kDim && sizeof(Shared<float>) <= shared_memory_limit();
}

int64_t recurrence_grouped_workspace(const Extent& extent) {
  return kParts * extent.heads * (ceil_div(extent.batch, kGroup) * kDim * kDim + extent.batch * kDim);
}

cudaError_t recurrence_backward_grouped(const RecurrenceBackward& p, float* workspace, const Extent& extent, void* stream) {
  const int64_t parts = kParts * ceil_div(extent.batch, kGroup);
  const int64_t size = extent.heads * kDim * kDim, width = extent.heads * kDim;
  float* dbias = workspace + parts * size;
  cudaError_t error = p.u_dtype == kBFloat16 ? run<bf16>(p, workspace, dbias, extent, stream)
                                             : run<float>(p, workspace, dbias, extent, stream);
  if (error == cudaSuccess) error = sum_partials(workspace, size, parts, p.dw_g, size, stream);
  if (error == cudaSuccess && p.u_bias != nullptr) {
    error = sum_partials(dbias, width, kParts * extent.batch, p.du_bias, width, stream);
  }
  return error;
}

}  // namespace mm_rec
