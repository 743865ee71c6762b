#include "launch.cuh"
#include "memory.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 1024;

// A block a row; a running count over pieces of kThreads tokens.
__global__ void __launch_bounds__(kThreads)
    index_kernel(const int64_t* __restrict__ position, const MemoryExtent extent, const WriteIndex index) {
  __shared__ int warp_count[kThreads / 32];
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int* event = index.event + row * extent.writes();
  for (int64_t e = threadIdx.x; e < extent.writes(); e += kThreads) event[e] = -1;
  int seen = 0;
  for (int64_t first = 0; first < extent.time; first += kThreads) {
    const int64_t t = first + threadIdx.x;
    const int64_t place = t < extent.time ? position[row * extent.time + t] : 0;
    const bool writes = place >= extent.window && place % extent.block() == 0;
    const unsigned mask = __ballot_sync(kFullWarp, writes);
    if (lane == 0) warp_count[warp] = __popc(mask);
    __syncthreads();  // also: the fill with -1 is done
    int before = seen;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) before += warp_count[w];
      seen += warp_count[w];
    }
    const int version = before + __popc(mask & (kFullWarp >> (31 - lane)));
    if (t < extent.time) index.version[row * extent.time + t] = version;
    if (writes) event[version - 1] = static_cast<int>(t);
    __syncthreads();
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
