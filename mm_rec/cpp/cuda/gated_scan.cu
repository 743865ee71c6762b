// A linear block's recurrence in one pass, from its wide product to its readout:
//
//   gamma, x = mdi(decay, z, u);  h_t = gamma_t h_{t-1} + x_t;  y = rms_norm(h) silu(r) per head
//
// Forward reads z, r, u and decay once and writes y; of h only the states at the starts of tiles of time are kept. Backward
// computes h again from those, so that it reads the same four and dy, and writes their gradients.
//
// Tiles of time as in scan.cu: a block of 8 warps takes 64 columns, two a lane, and 64 steps, 8 a thread in registers. Each
// reduces its steps to one pair (a, x) a column, publishes it, composes the pairs of all tiles before its own, always in the
// same order, and runs its steps from the state that comes out. Tiles are handed out in the order of the loop, so a tile only
// ever waits for tiles that have begun.
#include "common.cuh"
#include "decay.cuh"
#include "launch.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

namespace mm_rec {
namespace {

constexpr int kLanes = 32, kWarps = 8, kThreads = kLanes * kWarps, kSteps = 8, kPair = 2;
constexpr int kColumns = kLanes * kPair;
constexpr int64_t kTileSteps = kWarps * kSteps;

// `projected` has rows of z, r and u, `width` elements each, `stride` elements apart. Steps are B * T rows.
template <typename T>
struct Inputs {
  const T* projected;
  int64_t stride;
  const T* decay;
  const float* decay_bias;
  const float* gate_bias;
  const float* h0;    // may be null, as reset
  const bool* reset;
  int64_t batch, time, width;
  int head;

  __host__ __device__ int64_t chunks() const { return ceil_div(time, kTileSteps); }
  __host__ __device__ int64_t tiles() const { return chunks() * batch * (width / kColumns); }
};

template <typename T>
struct Outputs {
  T* y;
  float* h_last;
  float* start;  // (B, chunks, D): the state before each tile
};

template <typename T>
struct Gradients {
  const T* dy;
  const float* dh_last;  // may be null
  const float* start;
  T* dprojected;  // as `projected`, rows `dstride` apart
  int64_t dstride;
  T* ddecay;
  float* dh0;
  float* partial;  // (B * chunks, 2, D): sums for the biases of decay and gate
};

// Scratch in global memory: of each tile its pairs and whether they are there, and which tile is next.
struct Progress {
  float4* pair;  // (tiles, 32)
  unsigned* ready;
  unsigned* ticket;

  Progress(void* memory, int64_t tiles)
      : pair(static_cast<float4*>(memory)), ready(reinterpret_cast<unsigned*>(pair + tiles * kLanes)),
        ticket(ready + tiles) {}
};

// v -> a v + x, for two columns.
struct Maps {
  float a[kPair] = {1.0f, 1.0f}, x[kPair] = {0.0f, 0.0f};

  __device__ __forceinline__ void then(const float (&next_a)[kPair], const float (&next_x)[kPair]) {
#pragma unroll
    for (int j = 0; j < kPair; ++j) {
      a[j] *= next_a[j];
      x[j] = fmaf(next_a[j], x[j], next_x[j]);
    }
  }
  __device__ __forceinline__ void then(const float4& next) {
    const float next_a[kPair] = {next.x, next.y}, next_x[kPair] = {next.z, next.w};
    then(next_a, next_x);
  }
  __device__ __forceinline__ void apply(float (&v)[kPair]) const {
#pragma unroll
    for (int j = 0; j < kPair; ++j) v[j] = fmaf(a[j], v[j], x[j]);
  }
  __device__ __forceinline__ float4 packed() const { return make_float4(a[0], a[1], x[0], x[1]); }
};

struct SharedMaps {
  unsigned ticket;
  float4 warp[kWarps][kLanes], before[kWarps][kLanes];
};

// A pair of columns of each step of a thread, in shared memory: registers are what limits the number of blocks at work.
class Slots {
 public:
  __device__ __forceinline__ float2& operator[](int i) { return slot_[i][threadIdx.x]; }

 private:
  float2 slot_[kSteps][kThreads];
};

// Where a block stands: tile `order` along the loop is a chunk of steps of 64 columns of a row.
struct Place {
  int64_t order, place, row, column, first;  // `first`: of this thread's steps, in time
  int steps;                                 // that are there, of kSteps

  template <typename T>
  __device__ __forceinline__ Place(const Inputs<T>& p, unsigned tile, bool backward) {
    const int64_t column_tiles = p.width / kColumns, tiles_a_chunk = p.batch * column_tiles;
    order = tile / tiles_a_chunk;
    place = tile % tiles_a_chunk;
    row = place / column_tiles;
    column = place % column_tiles * kColumns + threadIdx.x % kLanes * kPair;
    first = (backward ? p.chunks() - 1 - order : order) * kTileSteps + threadIdx.x / kLanes * kSteps;
    steps = static_cast<int>(max(min(p.time - first, int64_t{kSteps}), int64_t{0}));
  }
};

template <typename T>
__device__ __forceinline__ unsigned take_tile(const Progress& progress, SharedMaps& shared) {
  if (threadIdx.x == 0) shared.ticket = atomicAdd(progress.ticket, 1u);
  __syncthreads();
  return shared.ticket;
}

// Publish this tile's map, made of the warps' in `shared.warp` in the order of the loop, and return that of all tiles before
// it. `rank(i)` is the warp that is i-th along the loop. All threads of the block take part.
template <typename Rank>
__device__ __forceinline__ Maps exchange(const Progress& progress, SharedMaps& shared, unsigned tile, const Place& at,
                                         int64_t tiles_a_chunk, const Rank& rank) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  if (warp == 0) {
    Maps total;
    for (int w = 0; w < kWarps; ++w) total.then(shared.warp[rank(w)][lane]);
    progress.pair[static_cast<int64_t>(tile) * kLanes + lane] = total.packed();
    __threadfence();
    __syncwarp();
    if (lane == 0) store_release(progress.ready + tile, 1u);
  }
  const int64_t share = ceil_div(at.order, kWarps), end = min(at.order, (warp + 1) * share);
  Maps before;
  for (int64_t c = warp * share; c < end; ++c) {
    const int64_t earlier = c * tiles_a_chunk + at.place;
    while (load_acquire(progress.ready + earlier) == 0u) {
    }
    before.then(__ldcg(progress.pair + earlier * kLanes + lane));
  }
  shared.before[warp][lane] = before.packed();
  __syncthreads();
  Maps history;
  for (int w = 0; w < kWarps; ++w) history.then(shared.before[w][lane]);
  return history;
}

// A pair of columns of this thread's steps; 0 for steps that are not there.
template <typename T>
__device__ __forceinline__ void load_steps(const T* source, int64_t stride, int steps, Words<T, kPair> (&out)[kSteps]) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (i < steps) {
      out[i] = *reinterpret_cast<const Words<T, kPair>*>(source + i * stride);
    } else {
      out[i] = {};
    }
  }
}

// Bit i: step i of this warp is a reset.
template <typename T>
__device__ __forceinline__ unsigned reset_bits(const Inputs<T>& p, const Place& at) {
  const int lane = threadIdx.x % kLanes;
  const bool cut = p.reset != nullptr && lane < at.steps && p.reset[at.row * p.time + at.first + lane];
  return __ballot_sync(kFullWarp, cut);
}

// Sum over the lanes that share a head, for two sums at once.
__device__ __forceinline__ float head_sum(float x, int head) {
  for (int mask = head / kPair / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kFullWarp, x, mask);
  return x;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    forward_kernel(const Inputs<T> p, const Outputs<T> out, const Progress progress) {
  __shared__ SharedMaps shared;
  __shared__ Slots a, x;
  const unsigned tile = take_tile<T>(progress, shared);
  const Place at(p, tile, false);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t line = at.row * p.time + at.first;  // of the first step

  Words<T, kPair> z[kSteps], u[kSteps], decay[kSteps], r[kSteps];
  const T* projected = p.projected + line * p.stride + at.column;
  load_steps(p.decay + line * p.width + at.column, p.width, at.steps, decay);
  load_steps(projected, p.stride, at.steps, z);
  load_steps(projected + 2 * p.width, p.stride, at.steps, u);
  load_steps(projected + p.width, p.stride, at.steps, r);
  const unsigned resets = reset_bits(p, at);
  float decay_bias[kPair], gate_bias[kPair], state[kPair] = {};
  load<kPair>(p.decay_bias + at.column, decay_bias);
  load<kPair>(p.gate_bias + at.column, gate_bias);
  if (p.h0 != nullptr) load<kPair>(p.h0 + at.row * p.width + at.column, state);

  Maps mine;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const bool keep = !((resets >> i) & 1);
    float kept[kPair], scaled[kPair];
#pragma unroll
    for (int j = 0; j < kPair; ++j) {
      const Decay d(decay[i][j] + decay_bias[j]);
      kept[j] = i >= at.steps ? 1.0f : keep ? d.gamma : 0.0f;
      scaled[j] = d.scale * z[i][j] * sigmoid(u[i][j] + gate_bias[j]);
    }
    mine.then(kept, scaled);
    a[i] = make_float2(kept[0], kept[1]);
    x[i] = make_float2(scaled[0], scaled[1]);
  }
  shared.warp[warp][lane] = mine.packed();
  __syncthreads();
  const int64_t tiles_a_chunk = p.batch * (p.width / kColumns);
  Maps history = exchange(progress, shared, tile, at, tiles_a_chunk, [](int w) { return w; });
  history.apply(state);
  if (warp == 0) store<kPair>(out.start + (at.row * p.chunks() + at.order) * p.width + at.column, state);
  Maps earlier;
  for (int w = 0; w < warp; ++w) earlier.then(shared.warp[w][lane]);
  earlier.apply(state);

#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    state[0] = fmaf(a[i].x, state[0], x[i].x);
    state[1] = fmaf(a[i].y, state[1], x[i].y);
    const float squares = head_sum(fmaf(state[0], state[0], state[1] * state[1]), p.head);
    const float scale = rsqrtf(squares / p.head + kNormEps);
    if (i >= at.steps) continue;
    float y[kPair];
#pragma unroll
    for (int j = 0; j < kPair; ++j) {
      const float gate = r[i][j];
      y[j] = state[j] * scale * gate * sigmoid(gate);
    }
    store<kPair>(out.y + (line + i) * p.width + at.column, y);
    if (at.first + i + 1 == p.time) store<kPair>(out.h_last + at.row * p.width + at.column, state);
  }
}

struct BackwardShared {
  SharedMaps maps;
  Slots a, h, dh;  // a is gamma, 0 at resets; h is x at first
};

// Backward in time with e_t, the gradient that step t hands to the state before it: g_t = dh_t + e_{t+1} is that at h_t and at
// x_t, e_t = a_t g_t, and that at gamma_t is g_t h_{t-1}.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const Inputs<T> p, const Gradients<T> g, const Progress progress) {
  auto& whole = *reinterpret_cast<BackwardShared*>(dynamic_shared());
  SharedMaps& shared = whole.maps;
  Slots &a = whole.a, &h = whole.h, &dh = whole.dh;
  const unsigned tile = take_tile<T>(progress, shared);
  const Place at(p, tile, true);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t line = at.row * p.time + at.first, chunk = p.chunks() - 1 - at.order;

  Words<T, kPair> z[kSteps], u[kSteps], decay[kSteps], r[kSteps], dy[kSteps];
  const T* projected = p.projected + line * p.stride + at.column;
  load_steps(p.decay + line * p.width + at.column, p.width, at.steps, decay);
  load_steps(projected, p.stride, at.steps, z);
  load_steps(projected + 2 * p.width, p.stride, at.steps, u);
  load_steps(projected + p.width, p.stride, at.steps, r);
  load_steps(g.dy + line * p.width + at.column, p.width, at.steps, dy);
  const unsigned resets = reset_bits(p, at);
  float decay_bias[kPair], gate_bias[kPair], before[kPair];  // before: the state before this warp's steps
  load<kPair>(p.decay_bias + at.column, decay_bias);
  load<kPair>(p.gate_bias + at.column, gate_bias);
  load<kPair>(g.start + (at.row * p.chunks() + chunk) * p.width + at.column, before);

  // The states again, from the start of the tile.
  Maps mine;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    float kept[kPair], x[kPair];
#pragma unroll
    for (int j = 0; j < kPair; ++j) {
      const Decay d(decay[i][j] + decay_bias[j]);
      x[j] = d.scale * z[i][j] * sigmoid(u[i][j] + gate_bias[j]);
      kept[j] = i >= at.steps ? 1.0f : (resets >> i) & 1 ? 0.0f : d.gamma;
    }
    mine.then(kept, x);
    a[i] = make_float2(kept[0], kept[1]);
    h[i] = make_float2(x[0], x[1]);
  }
  shared.warp[warp][lane] = mine.packed();
  __syncthreads();
  Maps earlier;
  for (int w = 0; w < warp; ++w) earlier.then(shared.warp[w][lane]);
  earlier.apply(before);
  __syncthreads();  // `shared.warp` is used again

  // Through the readout, and this warp's map of e.
  T* dprojected = g.dprojected + line * g.dstride + at.column;
  float state[kPair] = {before[0], before[1]};
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    state[0] = fmaf(a[i].x, state[0], h[i].x);
    state[1] = fmaf(a[i].y, state[1], h[i].y);
    h[i] = make_float2(state[0], state[1]);
    float silu[kPair], slope[kPair], product = 0.0f;
#pragma unroll
    for (int j = 0; j < kPair; ++j) {
      const float gate = r[i][j], open = sigmoid(gate);
      silu[j] = gate * open;
      slope[j] = open + silu[j] * (1.0f - open);
      product = fmaf(state[j], dy[i][j] * silu[j], product);
    }
    const float squares = head_sum(fmaf(state[0], state[0], state[1] * state[1]), p.head);
    const float norm = rsqrtf(squares / p.head + kNormEps);
    const float back = norm * norm * norm * head_sum(product, p.head) / p.head;
    float dr[kPair], at_state[kPair];
#pragma unroll
    for (int j = 0; j < kPair; ++j) {
      const float above = dy[i][j];
      dr[j] = above * state[j] * norm * slope[j];
      at_state[j] = i < at.steps ? norm * above * silu[j] - back * state[j] : 0.0f;
    }
    dh[i] = make_float2(at_state[0], at_state[1]);
    if (i < at.steps) store<kPair>(dprojected + i * g.dstride + p.width, dr);
  }
  Maps reverse;
#pragma unroll
  for (int i = kSteps - 1; i >= 0; --i) {
    const float kept[kPair] = {a[i].x, a[i].y}, x[kPair] = {kept[0] * dh[i].x, kept[1] * dh[i].y};
    reverse.then(kept, x);
  }
  shared.warp[warp][lane] = reverse.packed();
  __syncthreads();
  const int64_t tiles_a_chunk = p.batch * (p.width / kColumns);
  float e[kPair] = {};
  if (g.dh_last != nullptr) load<kPair>(g.dh_last + at.row * p.width + at.column, e);
  Maps history = exchange(progress, shared, tile, at, tiles_a_chunk, [](int w) { return kWarps - 1 - w; });
  for (int w = kWarps - 1; w > warp; --w) history.then(shared.warp[w][lane]);
  history.apply(e);
  __syncthreads();  // `shared.before` is used again

  // Through the recurrence and mdi.
  float decay_sum[kPair] = {}, gate_sum[kPair] = {};
#pragma unroll
  for (int i = kSteps - 1; i >= 0; --i) {
    if (i >= at.steps) continue;
    const bool keep = !((resets >> i) & 1);
    const float2 last = i > 0 ? h[i > 0 ? i - 1 : 0] : make_float2(before[0], before[1]), at_state = dh[i];
    float dz[kPair], du[kPair], ddecay[kPair];
#pragma unroll
    for (int j = 0; j < kPair; ++j) {
      const Decay d(decay[i][j] + decay_bias[j]);
      const float candidate = z[i][j], opened = sigmoid(u[i][j] + gate_bias[j]);
      const float dx = (j == 0 ? at_state.x : at_state.y) + e[j], at_gamma = keep ? dx * (j == 0 ? last.x : last.y) : 0.0f;
      e[j] = keep ? d.gamma * dx : 0.0f;
      const float gated = dx * opened;
      dz[j] = gated * d.scale;
      du[j] = dz[j] * candidate * (1.0f - opened);
      // (at_gamma - gated candidate gamma / scale) gamma (1 - gamma), where scale^2 is (1 - gamma) (1 + gamma).
      const float through_scale = __fdividef(gated * candidate * d.gamma * d.scale, 1.0f + d.gamma);
      ddecay[j] = d.clamped ? 0.0f : d.gamma * (at_gamma * d.rest - through_scale);
      gate_sum[j] += du[j];
      decay_sum[j] += ddecay[j];
    }
    store<kPair>(dprojected + i * g.dstride, dz);
    store<kPair>(dprojected + i * g.dstride + 2 * p.width, du);
    store<kPair>(g.ddecay + (line + i) * p.width + at.column, ddecay);
  }
  if (at.first == 0) store<kPair>(g.dh0 + at.row * p.width + at.column, e);

  shared.before[warp][lane] = make_float4(decay_sum[0], decay_sum[1], gate_sum[0], gate_sum[1]);
  __syncthreads();
  if (warp < 2) {  // one bias each
    float total[kPair] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 sum = shared.before[w][lane];
      total[0] += warp == 0 ? sum.x : sum.z;
      total[1] += warp == 0 ? sum.y : sum.w;
    }
    store<kPair>(g.partial + ((at.row * p.chunks() + chunk) * 2 + warp) * p.width + at.column, total);
  }
}

template <typename T>
int64_t progress_bytes(const Inputs<T>& p) {
  return p.tiles() * (sizeof(float4) * kLanes + sizeof(unsigned)) + sizeof(unsigned);
}

// Enqueue `kernel` on all tiles, with progress at `memory`.
template <typename T, typename Kernel, typename Results>
cudaError_t run(Kernel kernel, const Inputs<T>& p, const Results& results, size_t shared_bytes, void* memory,
                void* stream) {
  const Progress progress(memory, p.tiles());
  const cudaError_t error = cudaMemsetAsync(progress.ready, 0, sizeof(unsigned) * (p.tiles() + 1),
                                            static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(static_cast<unsigned>(p.tiles())), dim3(kThreads), shared_bytes, stream, p, results,
                progress);
}

template <typename T>
cudaError_t forward(const Inputs<T>& p, void* y, float* h_last, float* start, void* workspace, void* stream) {
  return run(forward_kernel<T>, p, Outputs<T>{static_cast<T*>(y), h_last, start}, 0, workspace, stream);
}

template <typename T>
cudaError_t backward(const Inputs<T>& p, Gradients<T> g, float* ddecay_bias, float* dgate_bias, void* workspace,
                     void* stream) {
  const int64_t rows = p.batch * p.chunks();
  g.partial = static_cast<float*>(workspace);
  cudaError_t error = run(backward_kernel<T>, p, g, sizeof(BackwardShared), g.partial + rows * 2 * p.width, stream);
  if (error == cudaSuccess) error = sum_partials(g.partial, 2 * p.width, rows, ddecay_bias, p.width, stream);
  if (error == cudaSuccess) error = sum_partials(g.partial + p.width, 2 * p.width, rows, dgate_bias, p.width, stream);
  return error;
}

}  // namespace
}  // namespace mm_rec

// Scratch of either direction; `head` divides 64 and is even, 64 divides `width`.
extern "C" int64_t mm_rec_cuda_gated_scan_workspace(int64_t batch, int64_t time, int64_t width, int64_t backward) {
  using namespace mm_rec;
  const Inputs<float> p{nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr, batch, time, width, 0};
  const int64_t partial = backward != 0 ? static_cast<int64_t>(sizeof(float)) * batch * p.chunks() * 2 * width : 0;
  return partial + progress_bytes(p);
}

extern "C" int64_t mm_rec_cuda_gated_scan_chunks_workspace(int64_t time) {
  return mm_rec::ceil_div(time, mm_rec::kTileSteps);
}

extern "C" int mm_rec_cuda_gated_scan_forward(const void* projected, int64_t stride, const void* decay, int64_t dtype,
                                              const float* decay_bias, const float* gate_bias, const float* h0,
                                              const bool* reset, void* y, float* h_last, float* start, void* workspace,
                                              int64_t batch, int64_t time, int64_t width, int64_t head, void* stream) {
  using namespace mm_rec;
  const auto go = [&](auto type) {
    using T = decltype(type);
    const Inputs<T> p{static_cast<const T*>(projected), stride, static_cast<const T*>(decay), decay_bias, gate_bias, h0,
                      reset, batch, time, width, static_cast<int>(head)};
    return forward(p, y, h_last, start, workspace, stream);
  };
  return dtype == kBFloat16 ? go(bf16()) : go(float());
}

extern "C" int mm_rec_cuda_gated_scan_backward(const void* dy, const float* dh_last, const float* start,
                                               const void* projected, int64_t stride, const void* decay, int64_t dtype,
                                               const float* decay_bias, const float* gate_bias, const bool* reset,
                                               void* dprojected, int64_t dstride, void* ddecay, float* ddecay_bias,
                                               float* dgate_bias, float* dh0, void* workspace, int64_t batch,
                                               int64_t time, int64_t width, int64_t head, void* stream) {
  using namespace mm_rec;
  const auto go = [&](auto type) {
    using T = decltype(type);
    const Inputs<T> p{static_cast<const T*>(projected), stride, static_cast<const T*>(decay), decay_bias, gate_bias,
                      nullptr, reset, batch, time, width, static_cast<int>(head)};
    const Gradients<T> g{static_cast<const T*>(dy), dh_last, start, static_cast<T*>(dprojected), dstride,
                         static_cast<T*>(ddecay), dh0, nullptr};
    return backward(p, g, ddecay_bias, dgate_bias, workspace, stream);
  };
  return dtype == kBFloat16 ? go(bf16()) : go(float());
}
