// Parts that the kernels of the retained pairs share. Queries are taken in runs of 64 tokens, each against a list of the pairs that
// some query of the run sees: those in the slots when it begins, and those that come in while it lasts.
#ifndef MM_REC_RETAINED_ATTENTION_CUH
#define MM_REC_RETAINED_ATTENTION_CUH

#include "window_attention.cuh"

namespace mm_rec {

constexpr int kRun = 64;  // RUN of mm_rec/ops/reference.py

struct RetainedExtent : WindowExtent {
  int slots;

  __host__ __device__ int64_t lines() const { return batch * heads; }  // heads of sequences
  __host__ __device__ int64_t runs() const { return ceil_div(time, kRun); }
  __host__ __device__ int64_t candidates() const { return slots + kRun; }  // pairs that a run may see
};

struct RetainedInputs {
  const void* q;
  const void* k;
  const void* v;
  const void* kept_k;  // (B, H, K, d)
  const void* kept_v;
  const float* score;       // (B, W + T, H)
  const float* kept_score;  // (B, H, K)
  const int* slot;          // (B, H, T)
  const int* held;          // (B, H, R + 1, K)
  const int64_t* position;
};

// A pair that the queries begin ... end - 1 of a run see. Candidate j < K of a run is what is in slot j when it begins, K + u what
// comes in at its token u.
struct VisiblePair {
  int source;  // j < K: the pair in slot j before the chunk; K + c: context c
  unsigned place;

  static __device__ __forceinline__ VisiblePair make(int source, int candidate, int begin, int end) {
    return {source, static_cast<unsigned>(candidate) << 14 | static_cast<unsigned>(begin) << 7 | static_cast<unsigned>(end)};
  }
  __device__ __forceinline__ int candidate() const { return static_cast<int>(place >> 14); }
  __device__ __forceinline__ int begin() const { return static_cast<int>(place >> 7 & 127); }
  __device__ __forceinline__ int end() const { return static_cast<int>(place & 127); }
};

// The lists of all runs, in scratch memory.
struct VisiblePairs {
  VisiblePair* pairs;  // (B, H, R, K + 64), of which ...
  int* count;          // ... (B, H, R) are filled

  VisiblePairs(void* workspace, const RetainedExtent& extent)
      : pairs(static_cast<VisiblePair*>(workspace)),
        count(reinterpret_cast<int*>(pairs + extent.lines() * extent.runs() * extent.candidates())) {}
  static int64_t bytes(const RetainedExtent& extent) {
    const int64_t size = extent.candidates() * static_cast<int64_t>(sizeof(VisiblePair)) + static_cast<int64_t>(sizeof(int));
    return ceil_div(extent.lines() * extent.runs() * size, 16) * 16;
  }
};

cudaError_t find_visible_pairs(const RetainedInputs& in, const RetainedExtent& extent, const VisiblePairs& visible,
                               void* stream);

// The 64 queries of run r of a line, and the pairs that they see.
struct RetainedRun {
  const RetainedInputs& in;
  const RetainedExtent& extent;
  int64_t line, b, head, t0;
  int tokens, count;
  const VisiblePair* pairs;

  __device__ __forceinline__ RetainedRun(const RetainedInputs& in_, const RetainedExtent& extent_,
                                         const VisiblePairs& visible, int64_t line_, int64_t r)
      : in(in_), extent(extent_), line(line_), b(line_ / extent_.heads), head(line_ % extent_.heads), t0(r * kRun) {
    tokens = static_cast<int>(min(extent.time - t0, int64_t{kRun}));
    const int64_t run = line * extent.runs() + r;
    count = visible.count[run];
    pairs = visible.pairs + run * extent.candidates();
  }
  // First element of query u, and its place in (B, H, T).
  __device__ __forceinline__ int64_t query_at(int u) const { return extent.token_at(b, t0 + u, head); }
  __device__ __forceinline__ int64_t number_at(int u) const { return line * extent.time + t0 + u; }
  template <typename T>
  __device__ __forceinline__ const T* row(const void* kept, const void* context, int source) const {
    return source < extent.slots ? static_cast<const T*>(kept) + (line * extent.slots + source) * extent.dim
                                 : static_cast<const T*>(context) + extent.context_at(b, source - extent.slots, head);
  }
  __device__ __forceinline__ float score(int source) const {
    return source < extent.slots ? in.kept_score[line * extent.slots + source]
                                 : in.score[(b * extent.context() + source - extent.slots) * extent.heads + head];
  }
};

// What a block knows of the pairs of a tile, beside keys and values.
template <int Rows>
struct PairPlaces {
  float score[Rows];  // base 2
  int begin[Rows], end[Rows];

  __device__ __forceinline__ bool seen(int pair, int query) const { return query >= begin[pair] && query < end[pair]; }
};

// `Rows` pairs of a list on their way to shared memory. Those past its end are zero and seen by no query.
template <typename T, typename Plan, int Rows>
class PairLoads {
 public:
  __device__ __forceinline__ void fetch(const RetainedRun& run, int first) {
    const RetainedInputs& in = run.in;
    k_.gather(run.extent.dim, [&](int i) { return row_of(run, in.kept_k, in.k, first + i); });
    v_.gather(run.extent.dim, [&](int i) { return row_of(run, in.kept_v, in.v, first + i); });
    if (threadIdx.x >= Rows) return;
    const int i = first + static_cast<int>(threadIdx.x);
    const bool real = i < run.count;
    pair_ = real ? run.pairs[i] : VisiblePair{0, 0};
    score_ = real ? run.score(pair_.source) * kLog2e : 0.0f;
  }
  template <typename Keys>
  __device__ __forceinline__ void put(Keys& k, Keys& v, PairPlaces<Rows>& places) const {
    k_.put(k);
    v_.put(v);
    if (threadIdx.x >= Rows) return;
    places.score[threadIdx.x] = score_;
    places.begin[threadIdx.x] = pair_.begin();
    places.end[threadIdx.x] = pair_.end();
  }

 private:
  static __device__ __forceinline__ const T* row_of(const RetainedRun& run, const void* kept, const void* context, int i) {
    return i < run.count ? run.row<T>(kept, context, run.pairs[i].source) : nullptr;
  }

  typename Plan::template RowLoads<Rows, T> k_, v_;
  VisiblePair pair_;
  float score_;
};

// Products of a warp's 16 queries and a tile of pairs to scores in base 2, -inf for what is not seen.
template <typename Plan>
__device__ __forceinline__ void add_scores(typename Plan::Scores& scores, const PairPlaces<Plan::kOther>& places) {
#pragma unroll
  for (int n = 0; n < Plan::kOther / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pair = fragment_column(n, i), query = Plan::own_row() + fragment_row(i);
      scores[n][i] = places.seen(pair, query) ? fmaf(scores[n][i], kLog2e, places.score[pair]) : -INFINITY;
    }
  }
}

}  // namespace mm_rec

#endif
