// window_attention, backward, for the sizes of most models on compute capability 9.0: the gradients of the window, each score
// computed once, by four warpgroups, which work step by step in parallel and wait for each other after each.
#include "launch.cuh"
#include "window_walk_fetch.cuh"
#include "window_walk_keys.cuh"
#include "window_walk_queries.cuh"

namespace mm_rec {
namespace {

constexpr size_t kAlignment = 1024;  // the swizzle counts rows from multiples of it
constexpr size_t kSharedBytes = sizeof(WalkShared) + kAlignment;

__global__ void __launch_bounds__(kWalkThreads, 1)
    window_kernel(const AttentionBackward p, const WindowExtent extent, int length) {
#ifdef MM_REC_WGMMA
  unsigned char* memory = dynamic_shared();
  auto& shared = *reinterpret_cast<WalkShared*>(memory + (kAlignment - shared_address(memory) % kAlignment) % kAlignment);
  const Runs runs(p, extent, length);
  shared.load_angles(runs);
  if (threadIdx.x == 0) Gate(shared.gate).open(kWalkThreads);
  __syncthreads();
  // There are 128 registers a thread, which Keys keep.
  const unsigned group = __shfl_sync(kFullWarp, threadIdx.x / kGroup, 0);
  if (group == 0) {
    give_registers<112>();
    Fetchers(runs, shared).walk();
  } else if (group == 1) {
    take_registers<152>();
    Queries(runs, shared).walk();
  } else if (group == 2) {
    give_registers<120>();
    walk_with<Values>(runs, shared);
  } else {
    walk_with<Keys>(runs, shared);
  }
#endif
}

}  // namespace

bool walks_backward(int64_t dtype, const WindowExtent& extent) {
  return walks(dtype, extent) && has_wgmma() && kSharedBytes <= shared_memory_limit();
}

cudaError_t walk_backward(const AttentionBackward& p, const WindowExtent& extent, void* stream) {
  const int64_t processors = multiprocessors();
  const int length = walk_length(extent, processors, kWalkBehind);
  const int64_t runs = extent.batch * extent.heads * ceil_div(walk_tiles(extent), length);
  return launch(window_kernel, dim3(static_cast<unsigned>(runs < processors ? runs : processors)), dim3(kWalkThreads),
                kSharedBytes, stream, p, extent, length);
}

}  // namespace mm_rec
