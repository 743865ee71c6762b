// The list of the pairs that each run sees, by one warp a run.
#include "launch.cuh"
#include "retained_attention.cuh"

namespace mm_rec {
namespace {

constexpr int kWarps = 4;

// A run's tokens; a lane has those in its own place and 32 later.
struct Tokens {
  int slot[2];         // that is taken at the token, or -1
  unsigned begins[2];  // of each half, which tokens begin a document ...
  unsigned events[2];  // ... or take a slot

  __device__ __forceinline__ Tokens(const RetainedInputs& in, const RetainedExtent& extent, int64_t line, int64_t t0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t t = t0 + 32 * half + threadIdx.x % 32;
      const bool real = t < extent.time;
      slot[half] = real ? in.slot[line * extent.time + t] : -1;
      begins[half] = __ballot_sync(kFullWarp, real && in.position[line / extent.heads * extent.time + t] == 0);
      events[half] = begins[half] | __ballot_sync(kFullWarp, slot[half] >= 0);
    }
  }
  // The first token after `after` at which the pair in slot `own` goes, or `tokens` if there is none.
  __device__ __forceinline__ int end(int own, int after, int tokens) const {
    int end = tokens;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for (unsigned rest = events[half]; rest != 0; rest &= rest - 1) {
        const int lane = __ffs(static_cast<int>(rest)) - 1, token = 32 * half + lane;
        const bool goes = (begins[half] >> lane & 1) != 0 || __shfl_sync(kFullWarp, slot[half], lane) == own;
        if (goes && token > after) end = min(end, token);
      }
    }
    return end;
  }
};

__global__ void __launch_bounds__(32 * kWarps)
    list_kernel(const RetainedInputs in, const RetainedExtent extent, const VisiblePairs visible) {
  const int64_t run = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (run >= extent.lines() * extent.runs()) return;
  const int64_t line = run / extent.runs(), r = run % extent.runs(), t0 = r * kRun;
  const int lane = threadIdx.x % 32, slots = extent.slots, tokens = static_cast<int>(min(extent.time - t0, int64_t{kRun}));
  const int* held = in.held + (line * (extent.runs() + 1) + r) * slots;
  VisiblePair* pairs = visible.pairs + run * extent.candidates();
  const Tokens of_run(in, extent, line, t0);
  int count = 0;
  // Append the lanes' candidates in order; whole warps take part. `own` is the slot, `after` the last token that can't end it.
  const auto append = [&](int source, int candidate, int own, int after) {
    const int begin = max(after, 0), end = of_run.end(own, after, tokens);
    const bool seen = source >= 0 && end > begin;
    const unsigned all = __ballot_sync(kFullWarp, seen);
    if (seen) pairs[count + __popc(all & ((1u << lane) - 1))] = VisiblePair::make(source, candidate, begin, end);
    count += __popc(all);
  };
  for (int j = lane; j - lane < slots; j += 32) append(j < slots ? held[j] : -1, j, j, -1);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int u = 32 * half + lane, own = of_run.slot[half];
    append(own >= 0 ? static_cast<int>(slots + t0 + u) : -1, slots + u, own, u);
  }
  if (lane == 0) visible.count[run] = count;
}

}  // namespace

cudaError_t find_visible_pairs(const RetainedInputs& in, const RetainedExtent& extent, const VisiblePairs& visible,
                               void* stream) {
  const int64_t blocks = ceil_div(extent.lines() * extent.runs(), kWarps);
  return launch(list_kernel, dim3(static_cast<unsigned>(blocks)), dim3(32 * kWarps), 0, stream, in, extent, visible);
}

}  // namespace mm_rec
