// memory_read, backward, for the sizes of most models on compute capability 9.0: the gradients of the window, each score
// computed once, by three warpgroups (memory_walk_servants.cuh, memory_walk_keys.cuh), which meet after every step.
#include "launch.cuh"
#include "memory_walk_keys.cuh"
#include "memory_walk_servants.cuh"

namespace mm_rec {
namespace {

__global__ void __launch_bounds__(kWalkThreads, 1) window_kernel(const ReadBackward p, const MemoryExtent extent, int length) {
#ifdef MM_REC_WGMMA
  unsigned char* memory = dynamic_shared();
  auto& shared = *reinterpret_cast<WalkShared*>(memory + (1024 - shared_address(memory) % 1024) % 1024);
  const Runs runs(p, extent, length);
  shared.load_angles(runs);
  __syncthreads();
  const unsigned group = __shfl_sync(kFullWarp, threadIdx.x / kGroup, 0);
  if (group == 0) {
    take_registers<216>();
    serve(runs, shared);
  } else if (group == 1) {
    give_registers<144>();
    bool first = true;
    named_barrier(kStepBarrier, kWalkThreads);
    for (Step step(runs); step.real(runs); step.advance(runs)) {
      if (step.has_contexts()) Values(runs, shared, step).meet_queries(first);
      named_barrier(kStepBarrier, kWalkThreads);
    }
  } else {
    give_registers<144>();
    named_barrier(kStepBarrier, kWalkThreads);
    for (Step step(runs); step.real(runs); step.advance(runs)) {
      if (step.has_contexts()) Keys(runs, shared, step).meet_queries();
      named_barrier(kStepBarrier, kWalkThreads);
    }
  }
#endif
}

}  // namespace

cudaError_t walk_backward_window(const ReadBackward& p, const MemoryExtent& extent, void* stream) {
  const int64_t processors = multiprocessors();
  const int length = walk_length(extent, processors, kWalkBehind);
  const int64_t runs = extent.batch * extent.heads * ceil_div(walk_tiles(extent), length);
  return launch(window_kernel, dim3(static_cast<unsigned>(runs < processors ? runs : processors)), dim3(kWalkThreads),
                sizeof(WalkShared) + 1024, stream, p, extent, length);
}

}  // namespace mm_rec
