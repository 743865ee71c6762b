// scan: s_t = a_t s_{t-1} + x_t, elementwise in D, cut in time so that short batches fill the device too.
//
// One pass over memory. A block of 16 warps takes a tile of 32 columns and 256 steps (128 for the gradient, which holds
// more), 16 steps a thread in registers, and reduces it to one pair (a, x) a column: the pairs compose as (a, x) then
// (a', x') = (a a', a' x + x'). It publishes that pair, then composes the pairs of all tiles before its own, always in
// the same order (so equal inputs give equal bits), and runs its steps from the state that comes out. Tiles are handed
// out in the order of time, so a tile only ever waits for tiles that have begun.
//
// The gradient is the same loop backward in time: g_t = ds_t + a_{t+1} g_{t+1}, dx_t = g_t, da_t = g_t s_{t-1}.

#include "common.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace mm_rec {
namespace {

constexpr int kLanes = 32, kWarps = 16;

template <bool Backward>
constexpr int kThreadSteps = Backward ? 8 : 16;
template <bool Backward>
constexpr int64_t kTileSteps = kWarps * kThreadSteps<Backward>;

struct Arguments {
  const float* a;
  const float* x;  // forward: x; backward: ds
  const float* s;  // backward only
  const float* s0;
  const bool* reset;
  float* out;  // forward: s; backward: dx
  float* da;   // backward only, as ds0
  float* ds0;
  int64_t batch, time, width;
};

// Scratch in global memory: which tile is next, and of each tile its pair and whether that is there.
struct Progress {
  unsigned* ticket;
  unsigned* ready;
  float2* pair;  // (tiles, 32)
};

struct Pair {
  float a = 1.0f, x = 0.0f;
  __device__ __forceinline__ void then(float next_a, float next_x) {
    a *= next_a;
    x = fmaf(next_a, x, next_x);
  }
};

// `Backward` runs from the last step to the first. "Step i" counts along the loop: it is t = i, or t = T - 1 - i. The
// coefficient of backward step i is a_{t+1} after resets: what happens between t and t + 1.
template <bool Backward>
__global__ void __launch_bounds__(kLanes* kWarps, 2) scan_kernel(const Arguments p, const Progress progress) {
  constexpr int kSteps = kThreadSteps<Backward>;
  __shared__ unsigned shared_tile;
  __shared__ float2 warp_pair[kWarps][kLanes], before_pair[kWarps][kLanes];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  if (threadIdx.x == 0) shared_tile = atomicAdd(progress.ticket, 1u);
  __syncthreads();
  const int64_t column_tiles = ceil_div(p.width, kLanes), tiles_a_chunk = p.batch * column_tiles;
  const int64_t tile = shared_tile, chunk = tile / tiles_a_chunk, place = tile % tiles_a_chunk;
  const int64_t row = place / column_tiles, column = place % column_tiles * kLanes + lane;
  const int64_t first = chunk * kTileSteps<Backward> + warp * kSteps;
  const int steps = column < p.width ? static_cast<int>(max(min(p.time - first, int64_t{kSteps}), int64_t{0})) : 0;
  const int64_t t0 = Backward ? p.time - 1 - first : first, stride = Backward ? -p.width : p.width;
  const int64_t origin = (row * p.time + t0) * p.width + column;  // step i of this thread is at origin + i * stride

  // Bit i: whether step i is cut from the one before it in the loop. Backward, bit i + 1 is the reset at step i itself.
  bool cut = false;
  if (p.reset != nullptr && lane <= kSteps) {
    const int64_t t = Backward ? t0 + 1 - lane : t0 + lane;
    cut = t >= 0 && t < p.time && p.reset[row * p.time + t];
  }
  const unsigned resets = __ballot_sync(kFullWarp, cut);

  const float s0 = p.s0 != nullptr && column < p.width ? p.s0[row * p.width + column] : 0.0f;
  float a[kSteps], x[kSteps], previous[kSteps];  // previous: s_{t-1}, for the gradient
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int64_t at = origin + i * stride;
    const bool known = !Backward || first + i > 0;  // nothing comes from after the last step
    a[i] = i < steps && known ? p.a[Backward ? at + p.width : at] : 1.0f;
    x[i] = i < steps ? p.x[at] : 0.0f;
    if constexpr (Backward) previous[i] = i >= steps ? 0.0f : first + i + 1 == p.time ? s0 : p.s[at - p.width];
  }
  Pair mine;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if ((resets >> i) & 1) a[i] = 0.0f;
    mine.then(a[i], x[i]);
  }
  warp_pair[warp][lane] = make_float2(mine.a, mine.x);
  __syncthreads();

  if (warp == 0) {
    Pair total;
    for (int w = 0; w < kWarps; ++w) total.then(warp_pair[w][lane].x, warp_pair[w][lane].y);
    progress.pair[tile * kLanes + lane] = make_float2(total.a, total.x);
    __threadfence();
    __syncwarp();
    if (lane == 0) store_release(progress.ready + tile, 1u);
  }
  // All tiles before this one, a range a warp.
  const int64_t share = ceil_div(chunk, kWarps), end = min(chunk, (warp + 1) * share);
  Pair before;
  for (int64_t c = warp * share; c < end; ++c) {
    const int64_t earlier = c * tiles_a_chunk + place;
    while (load_acquire(progress.ready + earlier) == 0u) {
    }
    const float2 pair = __ldcg(progress.pair + earlier * kLanes + lane);
    before.then(pair.x, pair.y);
  }
  before_pair[warp][lane] = make_float2(before.a, before.x);
  __syncthreads();
  Pair history;
  for (int w = 0; w < kWarps; ++w) history.then(before_pair[w][lane].x, before_pair[w][lane].y);
  for (int w = 0; w < warp; ++w) history.then(warp_pair[w][lane].x, warp_pair[w][lane].y);
  float state = Backward ? history.x : fmaf(history.a, s0, history.x);

#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (i >= steps) break;
    const int64_t at = origin + i * stride;
    state = fmaf(a[i], state, x[i]);
    p.out[at] = state;
    if constexpr (Backward) {
      const float keep = (resets >> (i + 1)) & 1 ? 0.0f : state;
      p.da[at] = keep * previous[i];
      if (first + i + 1 == p.time) p.ds0[row * p.width + column] = keep * p.a[at];
    }
  }
}

int64_t tiles(int64_t batch, int64_t time, int64_t width, bool backward) {
  return ceil_div(time, backward ? kTileSteps<true> : kTileSteps<false>) * batch * ceil_div(width, kLanes);
}

template <bool Backward>
cudaError_t run(const Arguments& p, void* workspace, void* stream) {
  const int64_t count = tiles(p.batch, p.time, p.width, Backward);
  const Progress progress{static_cast<unsigned*>(workspace) + 2 * kLanes * count,
                          static_cast<unsigned*>(workspace) + 2 * kLanes * count + 1, static_cast<float2*>(workspace)};
  const cudaError_t error =
      cudaMemsetAsync(progress.ticket, 0, sizeof(unsigned) * (count + 1), static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) return error;
  return launch(scan_kernel<Backward>, dim3(static_cast<unsigned>(count)), dim3(kLanes * kWarps), 0, stream, p, progress);
}

}  // namespace
}  // namespace mm_rec

extern "C" int64_t mm_rec_cuda_scan_workspace(int64_t batch, int64_t time, int64_t width, int64_t backward) {
  const int64_t count = mm_rec::tiles(batch, time, width, backward != 0);
  return count * (sizeof(float2) * mm_rec::kLanes + sizeof(unsigned)) + sizeof(unsigned);
}

extern "C" int mm_rec_cuda_scan_forward(const float* a, const float* x, const float* s0, const bool* reset, float* s,
                                        void* workspace, int64_t batch, int64_t time, int64_t width, void* stream) {
  const mm_rec::Arguments p{a, x, nullptr, s0, reset, s, nullptr, nullptr, batch, time, width};
  return mm_rec::run<false>(p, workspace, stream);
}

extern "C" int mm_rec_cuda_scan_backward(const float* ds, const float* s, const float* a, const float* s0,
                                         const bool* reset, float* da, float* dx, float* ds0, void* workspace,
                                         int64_t batch, int64_t time, int64_t width, void* stream) {
  const mm_rec::Arguments p{a, ds, s, s0, reset, dx, da, ds0, batch, time, width};
  return mm_rec::run<true>(p, workspace, stream);
}
