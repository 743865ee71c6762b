// What a warp of window_walk_forward.cu does with its 16 rows of queries or contexts.
#ifndef MM_REC_WINDOW_WALK_FORWARD_CUH
#define MM_REC_WINDOW_WALK_FORWARD_CUH

#include "window_walk.cuh"

namespace mm_rec {

constexpr int kWalkRing = kWalkWindow + kWalkTile;

// The contexts of a tile's queries, of which each tile replaces the oldest.
struct ForwardShared {
  Tile<kWalkRing, kWalkDim, false> k, v;
};

__device__ __forceinline__ int in_ring(int row) { return row < kWalkRing ? row : row - kWalkRing; }  // of the next lap, too

__device__ __forceinline__ int warp_row() { return static_cast<int>(threadIdx.x) / 32 * 16; }  // first of the warp's 16

// How the lanes of a warp share 16 rows of heads: lane l has columns 16 j + l % 4 * 4 ... + 3 of rows l / 4 and l / 4 + 8. That
// is what it needs of a left operand whose columns are counted in another order within every 16; tiles of keys have the same.
struct Quad {
  static __device__ __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x) % 32 / 4 + 8 * i; }
  static __device__ __forceinline__ int column(int j) { return 16 * j + static_cast<int>(threadIdx.x) % 4 * 4; }
  // Put the four elements of a row from column(j) on, as two words, where a tile of keys has them.
  static __device__ __forceinline__ void put(bf16* row, int j, uint2 words) {
    bf16* to = row + 16 * j + static_cast<int>(threadIdx.x) % 4 * 2;
    *reinterpret_cast<uint32_t*>(to) = words.x;
    *reinterpret_cast<uint32_t*>(to + 8) = words.y;
  }
};

// Angles of the 16 rows of a warp.
class QuadAngles {
 public:
  __device__ __forceinline__ explicit QuadAngles(const float* table) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        TableTurn{table}.load<4>(Quad::row(i), Quad::column(j), cosine_[i][j], sine_[i][j]);
      }
    }
  }
  __device__ __forceinline__ void rotate(uint2 (&x)[2][kWalkDim / 16]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        rotate(x[i][j].x, x[i][j + 2].x, cosine_[i][j], sine_[i][j]);
        rotate(x[i][j].y, x[i][j + 2].y, cosine_[i][j] + 2, sine_[i][j] + 2);
      }
    }
  }

 private:
  static __device__ __forceinline__ void rotate(uint32_t& left, uint32_t& right, const float* cosine, const float* sine) {
    float x[2], y[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float a = __uint_as_float(e == 0 ? left << 16 : left & 0xffff0000u);
      const float b = __uint_as_float(e == 0 ? right << 16 : right & 0xffff0000u);
      x[e] = a * cosine[e] - b * sine[e];
      y[e] = b * cosine[e] + a * sine[e];
    }
    left = pack_bf16(x[0], x[1]);
    right = pack_bf16(y[0], y[1]);
  }

  float cosine_[2][2][4], sine_[2][2][4];
};

// A warp's 16 queries.
struct Queries {
  uint2 x[2][kWalkDim / 16];

  // Rows `stride` apart; those past the first `rows` are zero.
  __device__ __forceinline__ void load(const bf16* source, int64_t stride, int rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bf16* from = source + Quad::row(i) * stride + Quad::column(0);
#pragma unroll
      for (int j = 0; j < kWalkDim / 16; ++j) {
        x[i][j] = Quad::row(i) < rows ? *reinterpret_cast<const uint2*>(from + 16 * j) : make_uint2(0, 0);
      }
    }
  }
  __device__ __forceinline__ Left<false> left(int j) const { return {{x[0][j].x, x[1][j].x, x[0][j].y, x[1][j].y}, {}}; }
  // c = q k^T for N times 16 keys; this lane gives the addresses of row `key_lane()` of each.
  template <int N>
  __device__ __forceinline__ void multiply(Fragments<2> (&c)[N], const bf16* const (&keys)[N]) const {
#pragma unroll
    for (int n = 0; n < N; ++n) zero(c[n]);
#pragma unroll
    for (int j = 0; j < kWalkDim / 16; ++j) {
      const Left<false> a = left(j);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        uint32_t right[4];
        ldmatrix(right, keys[n] + 16 * j + threadIdx.x / 8 % 2 * 8);
        mma_bf16(c[n][0], a.hi, right[0], right[1]);
        mma_bf16(c[n][1], a.hi, right[2], right[3]);
      }
    }
  }
  static __device__ __forceinline__ int key_lane() { return static_cast<int>(threadIdx.x) % 32 / 16 * 8 + threadIdx.x % 8; }
};

// Running softmax of the two rows of a thread, in base 2, and the weighted sum of values. Each lane has a total of its own.
struct Running {
  Fragments<kWalkDim / 8> sum;
  float top[2], total[2];

  __device__ __forceinline__ void clear() {
    zero(sum);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = -INFINITY;
      total[r] = 0.0f;
    }
  }
  // Turn scores, -inf for what is not seen, into weights.
  template <int N>
  __device__ __forceinline__ void weigh(Fragments<2> (&scores)[N]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < 2 * N; ++n) {
        largest = fmaxf(largest, fmaxf(scores[n / 2][n % 2][2 * r], scores[n / 2][n % 2][2 * r + 1]));
      }
      largest = fmaxf(top[r], kLog2e * group_max<4>(largest));
      const float base = largest == -INFINITY ? 0.0f : largest, shrink = exp2f(top[r] - base);
      top[r] = largest;
      total[r] *= shrink;
#pragma unroll
      for (int n = 0; n < kWalkDim / 8; ++n) {
        sum[n][2 * r] *= shrink;
        sum[n][2 * r + 1] *= shrink;
      }
#pragma unroll
      for (int n = 0; n < 2 * N; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = scores[n / 2][n % 2][2 * r + j];
          x = exp2f(fmaf(x, kLog2e, -base));
          total[r] += x;
        }
      }
    }
  }
  // Add N times 16 values by their weights; this lane gives the addresses of row `value_lane()` of each.
  template <int N>
  __device__ __forceinline__ void add(const Fragments<2> (&weights)[N], const bf16* const (&values)[N]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Left<false> left = to_left<false>(weights[n], 0);
#pragma unroll
      for (int i = 0; i < kWalkDim / 16; ++i) {
        uint32_t right[4];
        ldmatrix_trans(right, values[n] + 16 * i + threadIdx.x % 32 / 16 * 8);
        mma_bf16(sum[2 * i], left.hi, right[0], right[1]);
        mma_bf16(sum[2 * i + 1], left.hi, right[2], right[3]);
      }
    }
  }
  static __device__ __forceinline__ int value_lane() { return threadIdx.x % 16; }
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] = group_sum<4>(total[r]);
      const float inverse = __fdividef(1.0f, total[r]);
#pragma unroll
      for (int n = 0; n < kWalkDim / 8; ++n) {
        sum[n][2 * r] *= inverse;
        sum[n][2 * r + 1] *= inverse;
      }
    }
  }
};

}  // namespace mm_rec

#endif
