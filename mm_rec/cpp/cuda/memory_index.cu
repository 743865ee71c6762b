#include "launch.cuh"
#include "memory.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32, kAtOnce = 8;

// A block a row; a running count over pieces of kThreads tokens, several of them asked for together.
__global__ void __launch_bounds__(kThreads)
    index_kernel(const int64_t* __restrict__ position, const MemoryExtent extent, const WriteIndex index) {
  static_assert(kWarps == 32, "a lane a warp");
  __shared__ int warp_count[2][kWarps];  // of every second piece
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int block = extent.block();
  const bool power = (block & (block - 1)) == 0;  // else a division in 64 bits
  int* event = index.event + row * extent.writes();
  for (int64_t e = threadIdx.x; e < extent.writes(); e += kThreads) event[e] = -1;
  int seen = 0;
  for (int64_t first = 0; first < extent.time; first += kAtOnce * kThreads) {
    int64_t place[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t t = first + i * kThreads + threadIdx.x;
      place[i] = t < extent.time ? position[row * extent.time + t] : 0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t t = first + i * kThreads + threadIdx.x;
      if (t - threadIdx.x >= extent.time) break;
      const bool writes = place[i] >= extent.window && (power ? place[i] & (block - 1) : place[i] % block) == 0;
      const unsigned mask = __ballot_sync(kFullWarp, writes);
      if (lane == 0) warp_count[i % 2][warp] = __popc(mask);
      __syncthreads();  // also: the fill with -1 is done
      int count = warp_count[i % 2][lane];  // of this warp and all before, in lane `warp`
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(kFullWarp, count, step);
        if (lane >= step) count += before;
      }
      const int through = __shfl_sync(kFullWarp, count, warp);
      const int version = seen + through - __popc(mask) + __popc(mask & (kFullWarp >> (31 - lane)));
      seen += __shfl_sync(kFullWarp, count, 31);
      if (t < extent.time) index.version[row * extent.time + t] = version;
      if (writes) event[version - 1] = static_cast<int>(t);
    }
  }
}

}  // namespace

cudaError_t make_write_index(const int64_t* position, const MemoryExtent& extent, void* memory, WriteIndex* index,
                             void* stream) {
  index->version = static_cast<int*>(memory);
  index->event = index->version + extent.batch * extent.time;
  return launch(index_kernel, dim3(static_cast<unsigned>(extent.batch)), dim3(kThreads), 0, stream, position, extent,
                *index);
}

}  // namespace mm_rec
