// Parts that the kernels of window_attention share. Blocks of 4 warps own 64 rows (queries or keys), 16 a warp, and go through
// tiles of the other side.
//
// Tiles hold heads with their two halves apart: half i at columns i * Dim / 2 ..., padded with zeros. So a rotation pairs
// column j with column j + Dim / 2 whatever the head size is, and a thread's accumulators hold both.
#ifndef MM_REC_WINDOW_ATTENTION_CUH
#define MM_REC_WINDOW_ATTENTION_CUH

#include <climits>

#include "common.cuh"
#include "tile.cuh"

namespace mm_rec {

constexpr float kLog2e = 1.44269504f;

struct WindowExtent {
  int64_t batch, time, heads;
  int dim, window;

  __host__ __device__ int64_t context() const { return window + time; }  // tokens of k and v
  __host__ __device__ int64_t width() const { return heads * dim; }
  // First element of a head of a token of k or v, of a token of q.
  __host__ __device__ int64_t context_at(int64_t b, int64_t token, int64_t head) const {
    return (b * context() + token) * width() + head * dim;
  }
  __host__ __device__ int64_t token_at(int64_t b, int64_t t, int64_t head) const {
    return (b * time + t) * width() + head * dim;
  }
};

struct AttentionInputs {
  const void* q;
  const void* k;
  const void* v;
  const int64_t* position;
  const float* rotary;  // (W + 2176, 2, d / 2): cosines, then sines, of distance times frequency
};

template <typename T, int Dim>
struct AttentionPlan {
  static constexpr int kDim = Dim, kThreads = 128, kOwn = 64, kOther = Dim <= 64 ? 64 : 32;
  static constexpr bool kSplit = sizeof(T) == 4;
  static constexpr int kLanes = Dim / 8;                   // for a row of a tile
  static constexpr int kBlocks = Dim <= 64 ? 3 : 1;         // on a multiprocessor at least
  static constexpr bool kAhead = Dim <= 64;                 // the next tile is fetched while one is worked on
  using Own = Tile<kOwn, Dim, kSplit>;
  using Other = Tile<kOther, Dim, kSplit>;
  using Scores = Fragments<kOther / 8>;
  using Sums = Fragments<Dim / 8>;

  static __device__ __forceinline__ int own_row() { return static_cast<int>(threadIdx.x) / 32 * 16; }

  // The element of a head in column `column` of a tile, or `dim` if there is none.
  static __device__ __forceinline__ int element(int column, int dim) {
    const int half = dim / 2, j = column % (Dim / 2);
    return j >= half ? dim : column < Dim / 2 ? j : half + j;
  }

  // `Rows` rows of heads on their way from memory to a tile: first all are asked for, then they are put down, so that
  // one wait serves for all. A lane holds four elements of each half of a row.
  template <int Rows, typename Source>
  class RowLoads {
   public:
    using Four = Words<Source, 4>;
    static constexpr int kCount = Rows * kLanes / kThreads;
    static_assert(Rows * kLanes % kThreads == 0, "whole warps");

    // Row r is at source + r * stride; rows outside [0, rows) are zero.
    __device__ __forceinline__ void fetch(const Source* source, int64_t stride, int rows, int dim) {
      gather(dim, [&](int row) -> const Source* { return row < rows ? source + row * stride : nullptr; });
    }

    // Row r is at where(r); it is zero if that is null.
    template <typename Where>
    __device__ __forceinline__ void gather(int dim, const Where& where) {
      const int half = dim / 2;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const Source* from = where(row(i));
        const bool inside = from != nullptr;
        if (dim % 8 == 0) {
          if (inside && column() < half) {
            raw_[i][0] = *reinterpret_cast<const Four*>(from + column());
            raw_[i][1] = *reinterpret_cast<const Four*>(from + half + column());
          } else {
            raw_[i][0] = raw_[i][1] = {};
          }
        } else {
          Pack<Source, 4> one[2];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const bool real = inside && column() + j < half;
            one[0].v[j] = real ? from[column() + j] : from_float<Source>(0.0f);
            one[1].v[j] = real ? from[half + column() + j] : from_float<Source>(0.0f);
          }
          raw_[i][0] = *reinterpret_cast<const Four*>(&one[0]);
          raw_[i][1] = *reinterpret_cast<const Four*>(&one[1]);
        }
      }
    }

    // Call body(i, row, column, first, second) for the i-th row of this lane: elements column ... column + 3 of both halves.
    // Whole warps take part in each call.
    template <typename Body>
    __device__ __forceinline__ void each(const Body& body) const {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float first[4], second[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          first[j] = raw_[i][0][j];
          second[j] = raw_[i][1][j];
        }
        body(i, row(i), column(), first, second);
      }
    }

    template <bool Split>
    __device__ __forceinline__ void put(Tile<Rows, Dim, Split>& tile) const {
      each([&](int, int row, int column, const float(&first)[4], const float(&second)[4]) {
        tile.set(row, column, first);
        tile.set(row, Dim / 2 + column, second);
      });
    }

    // The same, row r rotated by distance `nearest` + r.
    template <bool Split>
    __device__ __forceinline__ void put_rotated(Tile<Rows, Dim, Split>& tile, int rows, int dim, const float* rotary,
                                                int nearest) const {
      const int half = dim / 2;
      each([&](int, int row, int column, const float(&first)[4], const float(&second)[4]) {
        float a[4], b[4], cosine[4] = {}, sine[4] = {};
        const float* turn = rotary + static_cast<int64_t>(nearest + row) * dim + column;
        if (row < rows && column < half) {
          if (half % 4 == 0) {
            load<4>(turn, cosine);
            load<4>(turn + half, sine);
          } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              cosine[j] = column + j < half ? turn[j] : 0.0f;
              sine[j] = column + j < half ? turn[half + j] : 0.0f;
            }
          }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a[j] = first[j] * cosine[j] - second[j] * sine[j];
          b[j] = second[j] * cosine[j] + first[j] * sine[j];
        }
        tile.set(row, column, a);
        tile.set(row, Dim / 2 + column, b);
      });
    }

   private:
    static __device__ __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x + i * kThreads) / kLanes; }
    static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) % kLanes * 4; }

    Four raw_[kCount][2];
  };
  using OwnLoads = RowLoads<kOwn, T>;
  using OtherLoads = RowLoads<kOther, T>;

  // Turn accumulators of this warp's rows back by the distances of put_rotated.
  static __device__ __forceinline__ void rotate_back(Sums& x, int rows, int dim, const float* rotary, int nearest) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = own_row() + fragment_row(i);
      if (row >= rows) continue;
#pragma unroll
      for (int n = 0; n < Dim / 16; ++n) {
        const int j = fragment_column(n, i);
        if (j >= dim / 2) continue;
        const float* turn = rotary + static_cast<int64_t>(nearest + row) * dim + j;
        const float a = x[n][i], b = x[n + Dim / 16][i], cosine = turn[0], sine = turn[dim / 2];
        x[n][i] = a * cosine + b * sine;
        x[n + Dim / 16][i] = b * cosine - a * sine;
      }
    }
  }

  // Two neighbouring columns of fragment n of a row of a head; those that pad it are 0.
  template <typename Source>
  static __device__ __forceinline__ void load_columns(const Source* row, int n, int dim, float (&pair)[2]) {
    const int column = fragment_column(n, 0), at = element(column, dim);
    if (dim % 4 == 0) {
      pair[0] = pair[1] = 0.0f;
      if (at < dim) load<2>(row + at, pair);
    } else {
      const int next = element(column + 1, dim);
      pair[0] = at < dim ? to_float(row[at]) : 0.0f;
      pair[1] = next < dim ? to_float(row[next]) : 0.0f;
    }
  }

  // The same to a row.
  template <typename Target>
  static __device__ __forceinline__ void store_columns(Target* row, int n, int dim, float first, float second) {
    const int column = fragment_column(n, 0), at = element(column, dim);
    if (dim % 4 == 0) {
      const float pair[2] = {first, second};
      if (at < dim) store<2>(row + at, pair);
    } else {
      const int next = element(column + 1, dim);
      if (at < dim) row[at] = from_float<Target>(first);
      if (next < dim) row[next] = from_float<Target>(second);
    }
  }
};

// What a tile of queries may see. Row r is token t0 + r; its context is low[r] ... W + t0 + r.
template <int Rows>
struct Visible {
  int low[Rows];

  // Threads 0 ... Rows - 1 take part; tokens past the last see nothing.
  __device__ __forceinline__ void fill(const AttentionInputs& in, const WindowExtent& extent, int64_t b, int64_t t0) {
    const int r = threadIdx.x;
    if (r >= Rows) return;
    const int64_t t = t0 + r;
    const bool real = t < extent.time;
    const int64_t place = real ? in.position[b * extent.time + t] : 0;
    const int64_t newest = extent.window + t;  // context of the token itself
    low[r] = real ? static_cast<int>(max(newest - place, t + 1)) : INT_MAX;
  }
  // The first context that any row sees. Whole warps take part.
  __device__ __forceinline__ int first() const {
    int least = INT_MAX;
    for (int r = threadIdx.x % 32; r < Rows; r += 32) least = min(least, low[r]);
    return __reduce_min_sync(kFullWarp, least);
  }
};

// An online softmax (FlashAttention, arXiv 2205.14135) of the two rows of a thread, in base 2, and the weighted sum of values.
template <typename Plan>
struct OnlineSoftmax {
  typename Plan::Sums sum = {};
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

  // Scores in base 2 with -inf for what is not seen; `values` holds the other side's rows.
  __device__ __forceinline__ void add(typename Plan::Scores& scores, const typename Plan::Other& values) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = top[r];
#pragma unroll
      for (int n = 0; n < Plan::kOther / 8; ++n) largest = fmaxf(largest, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
      largest = group_max<4>(largest);
      const float base = largest == -INFINITY ? 0.0f : largest, shrink = exp2f(top[r] - base);
      top[r] = largest;
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < Plan::kOther / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          scores[n][2 * r + j] = exp2f(scores[n][2 * r + j] - base);
          added += scores[n][2 * r + j];
        }
      }
      total[r] = total[r] * shrink + group_sum<4>(added);
#pragma unroll
      for (int n = 0; n < Plan::kDim / 8; ++n) {
        sum[n][2 * r] *= shrink;
        sum[n][2 * r + 1] *= shrink;
      }
    }
    multiply<Plan::kSplit, true, Plan::kOther>(sum, scores, values, 0);
  }
};

// Run(type, head size rounded up) for a type code and head size.
template <template <typename, int> class Run, typename... Arguments>
cudaError_t by_head_size(int64_t dtype, int dim, const Arguments&... arguments) {
  const bool narrow = dtype == kBFloat16;
  if (dim <= 32) return narrow ? Run<bf16, 32>::run(arguments...) : Run<float, 32>::run(arguments...);
  if (dim <= 64) return narrow ? Run<bf16, 64>::run(arguments...) : Run<float, 64>::run(arguments...);
  if (dim <= 128) return narrow ? Run<bf16, 128>::run(arguments...) : Run<float, 128>::run(arguments...);
  if (dim <= 256) return narrow ? Run<bf16, 256>::run(arguments...) : Run<float, 256>::run(arguments...);
  return cudaErrorInvalidValue;
}

}  // namespace mm_rec

#endif
