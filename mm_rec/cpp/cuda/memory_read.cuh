// Parts that the kernels of memory_read share. Blocks of 4 warps own 64 rows (queries, keys of the window or slots), 16 a
// warp, and go through tiles of the other side.
//
// Tiles hold heads with their two halves apart: half i at columns i * Dim / 2 ..., padded with zeros. So a rotation pairs
// column j with column j + Dim / 2 whatever the head size is, and a thread's accumulators hold both.
#ifndef MM_REC_MEMORY_READ_CUH
#define MM_REC_MEMORY_READ_CUH

#include <climits>

#include "memory.cuh"

namespace mm_rec {

constexpr float kLog2e = 1.44269504f;

struct ReadInputs {
  const void* q;
  const void* k;
  const void* v;
  const float* key;
  const float* value;
  const float* mass;
  const int64_t* position;
  const float2* rotary;  // (W + 128, d / 2): cosine and sine of distance times frequency
  WriteIndex index;
};

template <typename T, int Dim>
struct ReadPlan {
  static constexpr int kDim = Dim, kThreads = 128, kOwn = 64, kOther = Dim <= 64 ? 64 : 32;
  static constexpr bool kSplit = sizeof(T) == 4;
  static constexpr int kLanes = Dim / 8;  // for a row of a tile
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

  // Eight columns of a row of a head.
  template <typename Source>
  static __device__ __forceinline__ void load_columns(const Source* row, int column, int dim, float (&x)[8]) {
    if (dim % 16 == 0) {
      const int first = element(column, dim);
      if (first < dim) {
        load<8>(row + first, x);
        return;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int at = element(column + i, dim);
        x[i] = at < dim ? to_float(row[at]) : 0.0f;
      }
    }
  }

  // Call body(row, column, x) for each row of a tile with the eight elements of `source + row * stride` that this lane
  // holds; zeros for rows outside [0, rows). Whole warps take part in each call.
  template <int Rows, typename Source, typename Body>
  static __device__ __forceinline__ void each_row(const Source* source, int64_t stride, int rows, int dim,
                                                  const Body& body) {
    static_assert(Rows * kLanes % kThreads == 0, "whole warps");
#pragma unroll
    for (int i = threadIdx.x; i < Rows * kLanes; i += kThreads) {
      const int row = i / kLanes, column = i % kLanes * 8;
      float x[8] = {};
      if (row < rows) load_columns(source + row * stride, column, dim, x);
      body(row, column, x);
    }
  }

  template <int Rows, bool Split, typename Source>
  static __device__ __forceinline__ void fill(Tile<Rows, Dim, Split>& tile, const Source* source, int64_t stride,
                                              int rows, int dim) {
    each_row<Rows>(source, stride, rows, dim, [&](int row, int column, const float(&x)[8]) { tile.set(row, column, x); });
  }

  // The same, row r rotated by distance r + `first`.
  template <int Rows, bool Split, typename Source>
  static __device__ __forceinline__ void fill_rotated(Tile<Rows, Dim, Split>& tile, const Source* source, int64_t stride,
                                                      int rows, int dim, const float2* rotary, int first) {
    each_row<Rows>(source, stride, rows, dim, [&](int row, int column, float(&x)[8]) {
      const bool second = column >= Dim / 2;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float partner = __shfl_xor_sync(kFullWarp, x[i], kLanes / 2);
        const int j = column % (Dim / 2) + i;
        if (row >= rows || j >= dim / 2) continue;
        const float2 turn = rotary[static_cast<int64_t>(first + row) * (dim / 2) + j];
        x[i] = x[i] * turn.x + (second ? partner : -partner) * turn.y;
      }
      tile.set(row, column, x);
    });
  }

  // Turn accumulators of this warp's rows back by the distances of fill_rotated.
  static __device__ __forceinline__ void rotate_back(Sums& x, int rows, int dim, const float2* rotary, int first) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = own_row() + fragment_row(i);
      if (row >= rows) continue;
#pragma unroll
      for (int n = 0; n < Dim / 16; ++n) {
        const int j = fragment_column(n, i);
        if (j >= dim / 2) continue;
        const float2 turn = rotary[static_cast<int64_t>(first + row) * (dim / 2) + j];
        const float a = x[n][i], b = x[n + Dim / 16][i];
        x[n][i] = a * turn.x + b * turn.y;
        x[n + Dim / 16][i] = b * turn.x - a * turn.y;
      }
    }
  }

  // Columns 2 j and 2 j + 1 of fragment n of this warp's row r (0 or 1 of a thread's two) to a row of a head.
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

  // Slots of one version, rows r = 0 ... of `keys` normed and of `values` divided by their mass, and `bias`, log2 of the
  // masses, -inf for slots without mass.
  template <int Rows, bool Split>
  static __device__ __forceinline__ void fill_slots(Tile<Rows, Dim, Split>& keys, Tile<Rows, Dim, Split>& values,
                                                    float* bias, const ReadInputs& in, int64_t first, int rows,
                                                    int dim) {
    each_row<Rows>(in.key + first * dim, dim, rows, dim, [&](int row, int column, float(&x)[8]) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) squares = fmaf(x[i], x[i], squares);
      const float scale = rsqrtf(group_sum<kLanes>(squares) / dim + kNormEps);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] *= scale;
      keys.set(row, column, x);
    });
    each_row<Rows>(in.value + first * dim, dim, rows, dim, [&](int row, int column, float(&x)[8]) {
      const float mass = row < rows ? in.mass[first + row] : 0.0f;
      const float scale = mass > 0.0f ? 1.0f / mass : 1.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] *= scale;
      values.set(row, column, x);
      if (column == 0) bias[row] = mass > 0.0f ? __log2f(mass) : -INFINITY;
    });
  }
};

// What a tile of queries may see. Row r is token t0 + r; its context is low[r] ... W + t0 + r, and slots of version
// version[r], -1 if none.
template <int Rows>
struct Visible {
  int low[Rows];
  int version[Rows];

  // Threads 0 ... Rows - 1 take part; tokens past the last see nothing.
  __device__ __forceinline__ void fill(const ReadInputs& in, const MemoryExtent& extent, int64_t b, int64_t t0) {
    const int r = threadIdx.x;
    if (r >= Rows) return;
    const int64_t t = t0 + r;
    const bool real = t < extent.time;
    const int64_t at = b * extent.time + t, place = real ? in.position[at] : 0;
    const int64_t newest = extent.window + t;  // context of the token itself
    low[r] = real ? static_cast<int>(max(newest - place, t + 1)) : INT_MAX;
    version[r] = real && place >= extent.window ? in.index.version[at] : -1;
  }
  // The first context that any row sees, and the first and last version. Whole warps take part.
  __device__ __forceinline__ void bounds(int& first, int& oldest, int& newest) const {
    first = oldest = INT_MAX;
    newest = -1;
    for (int r = threadIdx.x % 32; r < Rows; r += 32) {
      first = min(first, low[r]);
      newest = max(newest, version[r]);
      if (version[r] >= 0) oldest = min(oldest, version[r]);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      first = min(first, __shfl_xor_sync(kFullWarp, first, mask));
      oldest = min(oldest, __shfl_xor_sync(kFullWarp, oldest, mask));
      newest = max(newest, __shfl_xor_sync(kFullWarp, newest, mask));
    }
  }
};

}  // namespace mm_rec

#endif
