// delta_keys with few taps: each group walks along a run of tokens and reads each row once. Neighbouring groups have
// neighbouring heads.
#include "delta_keys.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 128, kAtOnce = 4, kTokens = 16, kContexts = 32;

// A group's head, its place among the runs of `length` of a sequence of `size`, and its taps. Groups past the last work on that
// one too, but write nothing.
template <typename T>
struct Run {
  KeyColumns<T> columns;
  int64_t b, head, run;
  bool real;
  float taps[kFewTaps][kKeySize];

  __device__ __forceinline__ Run(const KeyInputs& in, int64_t size, int length) : columns(in) {
    const int64_t runs = ceil_div(size, length), count = in.batch * runs * in.heads;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, group = thread / columns.lanes;
    const int64_t own = min(group, count - 1);
    real = group < count;
    head = own % in.heads;
    run = own / in.heads % runs;
    b = own / in.heads / runs;
    const float* from = in.taps + (head * in.dim + columns.at) * in.reach;
#pragma unroll
    for (int i = 0; i < kKeySize; ++i) {
#pragma unroll
      for (int j = 0; j < kFewTaps; ++j) {
        taps[j][i] = j < in.reach && columns.at + i < in.dim ? from[i * in.reach + j] : 0.0f;
      }
    }
  }
  // The key of context `token`, or of the nearest that is there.
  __device__ __forceinline__ void load(const KeyInputs& in, int64_t token, float (&x)[kKeySize]) const {
    const int64_t inside = min(max(token, int64_t{0}), in.context() - 1);
    columns.load(static_cast<const T*>(in.k) + in.context_at(b, inside, head), x);
  }
};

// How many of the keys up to its own a token is made of, as far as `reach`.
__device__ __forceinline__ int sees(const KeyInputs& in, int64_t b, int64_t t) {
  const int64_t inside = min(max(t, int64_t{0}), in.time - 1);
  return static_cast<int>(min(in.position[b * in.time + inside] + 1, static_cast<int64_t>(in.reach)));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const KeyInputs in, T* __restrict__ key) {
  const Run<T> run(in, in.time, kTokens);
#pragma unroll 1
  for (int first = 0; first < kTokens; first += kAtOnce) {
    const int64_t t0 = run.run * kTokens + first;
    float rows[kAtOnce + kFewTaps - 1][kKeySize];
    int count[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) count[u] = sees(in, run.b, t0 + u);
#pragma unroll
    for (int u = 0; u < kAtOnce + kFewTaps - 1; ++u) run.load(in, in.window + t0 + u - (kFewTaps - 1), rows[u]);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      float x[kKeySize] = {};
#pragma unroll
      for (int j = 0; j < kFewTaps; ++j) {
#pragma unroll
        for (int i = 0; i < kKeySize; ++i) {
          x[i] = j < count[u] ? fmaf(run.taps[j][i], rows[u + kFewTaps - 1 - j][i], x[i]) : x[i];
        }
      }
      const float scale = rsqrtf(run.columns.sum(x, x) + kNormEps);
#pragma unroll
      for (int i = 0; i < kKeySize; ++i) x[i] *= scale;
      if (run.real && t0 + u < in.time) run.columns.store(key + in.token_at(run.b, t0 + u, run.head), x);
    }
  }
}

// A group has a run of contexts: it needs the gradients of the sums of the tokens that see them, which are the run's own and up
// to three later ones. Its own tokens' share of the gradients of the taps goes to `partial`.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    backward_kernel(const KeyInputs in, const T* __restrict__ dkey, T* __restrict__ dk, float* __restrict__ partial) {
  const Run<T> run(in, in.context(), kContexts);
  const int64_t context0 = run.run * kContexts, t0 = context0 - in.window;
  // Rings of the last keys, and of the gradients of the last contexts, which later tokens still add to.
  float rows[kFewTaps][kKeySize], sums[kFewTaps][kKeySize], dtaps[kFewTaps][kKeySize] = {};
#pragma unroll
  for (int j = 1; j < kFewTaps; ++j) {
    run.load(in, context0 - j, rows[kFewTaps - j]);
#pragma unroll
    for (int i = 0; i < kKeySize; ++i) sums[kFewTaps - j][i] = 0.0f;
  }
  static_assert(kContexts % kFewTaps == 0, "whole laps");
#pragma unroll 1
  for (int lap = 0; lap <= kContexts; lap += kFewTaps) {
    float dy[kFewTaps][kKeySize];
    int count[kFewTaps];
    // The last lap begins with the tokens after the run; the last of its tokens sees none of it.
#pragma unroll
    for (int u = 0; u < kFewTaps; ++u) {
      const int64_t t = t0 + lap + u, inside = min(max(t, int64_t{0}), in.time - 1);
      count[u] = sees(in, run.b, t);
      run.columns.load(dkey + in.token_at(run.b, inside, run.head), dy[u]);
    }
#pragma unroll
    for (int u = 0; u < kFewTaps; ++u) {
      const int64_t t = t0 + lap + u;
      const bool token = t >= 0 && t < in.time;
      run.load(in, in.window + t, rows[u]);
      float x[kKeySize] = {};
#pragma unroll
      for (int j = 0; j < kFewTaps; ++j) {
#pragma unroll
        for (int i = 0; i < kKeySize; ++i) {
          x[i] = j < count[u] ? fmaf(run.taps[j][i], rows[(u + kFewTaps - j) % kFewTaps][i], x[i]) : x[i];
        }
      }
      run.columns.through_norm(dy[u], x);
#pragma unroll
      for (int i = 0; i < kKeySize; ++i) sums[u][i] = 0.0f;
#pragma unroll
      for (int j = 0; j < kFewTaps; ++j) {
        const int place = (u + kFewTaps - j) % kFewTaps;  // of context t - j
        const bool seen = token && j < count[u];
#pragma unroll
        for (int i = 0; i < kKeySize; ++i) {
          const float slope = seen ? x[i] : 0.0f;
          sums[place][i] = fmaf(run.taps[j][i], slope, sums[place][i]);
          dtaps[j][i] = lap < kContexts && seen ? fmaf(x[i], rows[place][i], dtaps[j][i]) : dtaps[j][i];
        }
      }
      // Context t - 3 is complete.
      const int done = lap + u - (kFewTaps - 1);
      if (run.real && done >= 0 && done < kContexts && context0 + done < in.context()) {
        run.columns.store(dk + in.context_at(run.b, context0 + done, run.head), sums[(u + 1) % kFewTaps]);
      }
    }
  }
  if (!run.real) return;
  const int64_t runs = ceil_div(in.context(), kContexts);
  float* own = partial + ((run.b * runs + run.run) * in.width() + run.head * in.dim + run.columns.at) * in.reach;
#pragma unroll
  for (int i = 0; i < kKeySize; ++i) {
#pragma unroll
    for (int j = 0; j < kFewTaps; ++j) {
      if (j < in.reach && run.columns.at + i < in.dim) own[i * in.reach + j] = dtaps[j][i];
    }
  }
}

dim3 blocks(const KeyInputs& in, int64_t size, int length) {
  return dim3(static_cast<unsigned>(ceil_div(in.batch * ceil_div(size, length) * in.heads * in.lanes(), kThreads)));
}

template <typename T>
cudaError_t forward(const KeyInputs& in, void* key, void* stream) {
  return launch(forward_kernel<T>, blocks(in, in.time, kTokens), dim3(kThreads), 0, stream, in, static_cast<T*>(key));
}

template <typename T>
cudaError_t backward(const KeyInputs& in, const void* dkey, void* dk, float* partial, void* stream) {
  return launch(backward_kernel<T>, blocks(in, in.context(), kContexts), dim3(kThreads), 0, stream, in,
                static_cast<const T*>(dkey), static_cast<T*>(dk), partial);
}

}  // namespace

cudaError_t few_keys_forward(const KeyInputs& in, int64_t dtype, void* key, void* stream) {
  return dtype == kBFloat16 ? forward<bf16>(in, key, stream) : forward<float>(in, key, stream);
}

int64_t few_keys_partials(const KeyInputs& in) { return in.batch * ceil_div(in.context(), kContexts); }

cudaError_t few_keys_backward(const KeyInputs& in, int64_t dtype, const void* dkey, void* dk, float* partial, void* stream) {
  return dtype == kBFloat16 ? backward<bf16>(in, dkey, dk, partial, stream)
                            : backward<float>(in, dkey, dk, partial, stream);
}

}  // namespace mm_rec
