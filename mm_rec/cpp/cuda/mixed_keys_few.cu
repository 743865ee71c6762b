// mixed_keys with few taps, for heads of a multiple of 8: each group walks along a run of tokens and reads each row once. Neighbouring groups have
// neighbouring heads.
#include "mixed_keys.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 128, kAtOnce = 4, kTokens = 32, kContexts = 32;

// A group's sequence, head and place among the runs of `length`, and its taps. Groups past the last work on that one too, but
// write nothing.
template <typename T>
struct Run {
  int lanes, head, run;
  bool real;
  int64_t b, width;
  const T* k;  // the group's columns of the first context
  float taps[kFewTaps][kKeySize];

  __device__ __forceinline__ Run(const KeyInputs& in, int lanes_, int runs) : lanes(lanes_), b(blockIdx.y), width(in.width()) {
    const unsigned group = (blockIdx.x * kThreads + threadIdx.x) / lanes, heads = static_cast<unsigned>(in.heads);
    const unsigned count = runs * heads, own = min(group, count - 1);
    const int at = static_cast<int>(threadIdx.x) % lanes * kKeySize;
    real = group < count && at < in.dim;
    head = static_cast<int>(own % heads);
    run = static_cast<int>(own / heads);
    k = static_cast<const T*>(in.k) + b * in.context() * width + column(in);
    const float* from = in.taps + static_cast<int64_t>(column(in)) * in.reach;
#pragma unroll
    for (int i = 0; i < kKeySize; ++i) {
      float x[kFewTaps] = {};
      if (at < in.dim && in.reach == kFewTaps) {
        mm_rec::load<kFewTaps>(from + i * kFewTaps, x);
      } else {
#pragma unroll
        for (int j = 0; j < kFewTaps; ++j) {
          if (at < in.dim && j < in.reach) x[j] = from[i * in.reach + j];
        }
      }
#pragma unroll
      for (int j = 0; j < kFewTaps; ++j) taps[j][i] = x[j];
    }
  }
  // The lane's first column of a token; lanes past the head's end have those of its beginning, without taps.
  __device__ __forceinline__ int column(const KeyInputs& in) const {
    const int at = static_cast<int>(threadIdx.x) % lanes * kKeySize;
    return head * in.dim + (at < in.dim ? at : 0);
  }
  __device__ __forceinline__ float sum(const float (&x)[kKeySize], const float (&y)[kKeySize]) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeySize; ++i) sum = fmaf(x[i], y[i], sum);
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
    return sum;
  }
  // Add up `count` keys by the taps, the j-th of them rows[last - j]; all of them if `All`.
  template <bool All, int Rows>
  __device__ __forceinline__ void combine(const float (&rows)[Rows][kKeySize], int last, int count,
                                          float (&x)[kKeySize]) const {
#pragma unroll
    for (int i = 0; i < kKeySize; ++i) x[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < kFewTaps; ++j) {
#pragma unroll
      for (int i = 0; i < kKeySize; ++i) {
        const float sum = fmaf(taps[j][i], rows[(last + Rows - j) % Rows][i], x[i]);
        x[i] = All || j < count ? sum : x[i];
      }
    }
  }
};

// How many of the keys up to its own a token is made of, as far as there are taps.
__device__ __forceinline__ int sees(const KeyInputs& in, int64_t b, int t) {
  const int64_t place = in.position[b * in.time + min(max(t, 0), static_cast<int>(in.time) - 1)];
  return place < in.reach ? static_cast<int>(place) + 1 : in.reach;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const KeyInputs in, T* __restrict__ key, int lanes, int runs) {
  const Run<T> run(in, lanes, runs);
  const int time = static_cast<int>(in.time), window = static_cast<int>(in.window), last = window + time - 1;
  T* target = key + run.b * in.time * run.width + run.column(in);
#pragma unroll 1
  for (int first = 0; first < kTokens; first += kAtOnce) {
    const int t0 = run.run * kTokens + first;
    if (__all_sync(kFullWarp, t0 >= time)) return;
    float rows[kAtOnce + kFewTaps - 1][kKeySize];
    int count[kAtOnce], least = kFewTaps;
#pragma unroll
    for (int u = 0; u < kAtOnce + kFewTaps - 1; ++u) {
      load<kKeySize>(run.k + min(max(window + t0 + u - (kFewTaps - 1), 0), last) * run.width, rows[u]);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) least = min(least, count[u] = sees(in, run.b, t0 + u));
    const bool all = __all_sync(kFullWarp, least == kFewTaps);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      float x[kKeySize];
      if (all) {
        run.template combine<true>(rows, u + kFewTaps - 1, kFewTaps, x);
      } else {
        run.template combine<false>(rows, u + kFewTaps - 1, count[u], x);
      }
      const float scale = rsqrtf(run.sum(x, x) + kNormEps);
#pragma unroll
      for (int i = 0; i < kKeySize; ++i) x[i] *= scale;
      if (run.real && t0 + u < time) store<kKeySize>(target + (t0 + u) * run.width, x);
    }
  }
}

// A group has a run of contexts: it needs the gradients of the sums of the tokens that see them, which are the run's own and up
// to three later ones. Its own tokens' share of the gradients of the taps goes to `partial`.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    backward_kernel(const KeyInputs in, const T* __restrict__ dkey, T* __restrict__ dk, float* __restrict__ partial,
                    int lanes, int runs) {
  const Run<T> run(in, lanes, runs);
  const int time = static_cast<int>(in.time), window = static_cast<int>(in.window), last = window + time - 1;
  const int context0 = run.run * kContexts, t0 = context0 - window, column = run.column(in);
  const T* slopes = dkey + run.b * in.time * run.width + column;
  T* target = dk + run.b * in.context() * run.width + column;
  // Rings of the last keys, and of the gradients of the last contexts, which later tokens still add to.
  float rows[kFewTaps][kKeySize], sums[kFewTaps][kKeySize], dtaps[kFewTaps][kKeySize] = {};
#pragma unroll
  for (int j = 1; j < kFewTaps; ++j) {
    load<kKeySize>(run.k + max(context0 - j, 0) * run.width, rows[kFewTaps - j]);
#pragma unroll
    for (int i = 0; i < kKeySize; ++i) sums[kFewTaps - j][i] = 0.0f;
  }
  static_assert(kContexts % kFewTaps == 0, "whole laps");
#pragma unroll 1
  for (int lap = 0; lap <= kContexts; lap += kFewTaps) {  // the last lap has the tokens after the run
    Words<T, kKeySize> dy[kFewTaps], next[kFewTaps];
    int count[kFewTaps], least = kFewTaps;
#pragma unroll
    for (int u = 0; u < kFewTaps; ++u) {
      const int t = t0 + lap + u, inside = min(max(t, 0), time - 1);
      dy[u] = *reinterpret_cast<const Words<T, kKeySize>*>(slopes + inside * run.width);
      next[u] = *reinterpret_cast<const Words<T, kKeySize>*>(run.k + min(context0 + lap + u, last) * run.width);
      const int seen = sees(in, run.b, t);
      count[u] = t >= 0 && t < time ? seen : 0;
      least = min(least, count[u]);
    }
    const bool all = __all_sync(kFullWarp, least == kFewTaps);
    const float owns = lap < kContexts ? 1.0f : 0.0f;
#pragma unroll
    for (int u = 0; u < kFewTaps; ++u) {
      float x[kKeySize], slope[kKeySize];
#pragma unroll
      for (int i = 0; i < kKeySize; ++i) {
        rows[u][i] = next[u][i];
        slope[i] = dy[u][i];
        sums[u][i] = 0.0f;
      }
      if (all) {
        run.template combine<true>(rows, u, kFewTaps, x);
      } else {
        run.template combine<false>(rows, u, count[u], x);
      }
      const float scale = rsqrtf(run.sum(x, x) + kNormEps), along = scale * scale * scale * run.sum(slope, x);
#pragma unroll
      for (int i = 0; i < kKeySize; ++i) x[i] = scale * slope[i] - along * x[i];
#pragma unroll
      for (int j = 0; j < kFewTaps; ++j) {
        const int place = (u + kFewTaps - j) % kFewTaps;  // of context t - j
        if (!all && j >= count[u]) continue;
#pragma unroll
        for (int i = 0; i < kKeySize; ++i) {
          sums[place][i] = fmaf(run.taps[j][i], x[i], sums[place][i]);
          dtaps[j][i] = fmaf(owns * x[i], rows[place][i], dtaps[j][i]);
        }
      }
      // Context t - 3 is complete.
      const int done = lap + u - (kFewTaps - 1);
      if (run.real && done >= 0 && done < kContexts && context0 + done <= last) {
        store<kKeySize>(target + (context0 + done) * run.width, sums[(u + 1) % kFewTaps]);
      }
    }
  }
  if (!run.real) return;
  float* own = partial + ((run.b * runs + run.run) * run.width + column) * in.reach;
#pragma unroll
  for (int i = 0; i < kKeySize; ++i) {
#pragma unroll
    for (int j = 0; j < kFewTaps; ++j) {
      if (j < in.reach) own[i * in.reach + j] = dtaps[j][i];
    }
  }
}

int runs_of(int64_t size, int length) { return static_cast<int>(ceil_div(size, length)); }

template <typename... Parameters, typename... Arguments>
cudaError_t run_all(void (*kernel)(Parameters...), const KeyInputs& in, int runs, void* stream, Arguments... arguments) {
  const dim3 grid(static_cast<unsigned>(ceil_div(runs * in.heads * in.lanes(), kThreads)), static_cast<unsigned>(in.batch));
  return launch(kernel, grid, dim3(kThreads), 0, stream, in, arguments..., in.lanes(), runs);
}

template <typename T>
cudaError_t forward(const KeyInputs& in, void* key, void* stream) {
  return run_all(forward_kernel<T>, in, runs_of(in.time, kTokens), stream, static_cast<T*>(key));
}

template <typename T>
cudaError_t backward(const KeyInputs& in, const void* dkey, void* dk, float* partial, void* stream) {
  return run_all(backward_kernel<T>, in, runs_of(in.context(), kContexts), stream, static_cast<const T*>(dkey),
                 static_cast<T*>(dk), partial);
}

}  // namespace

cudaError_t few_keys_forward(const KeyInputs& in, int64_t dtype, void* key, void* stream) {
  return dtype == kBFloat16 ? forward<bf16>(in, key, stream) : forward<float>(in, key, stream);
}

int64_t few_keys_partials(const KeyInputs& in) { return in.batch * runs_of(in.context(), kContexts); }

cudaError_t few_keys_backward(const KeyInputs& in, int64_t dtype, const void* dkey, void* dk, float* partial, void* stream) {
  return dtype == kBFloat16 ? backward<bf16>(in, dkey, dk, partial, stream)
                            : backward<float>(in, dkey, dk, partial, stream);
}

}  // namespace mm_rec
