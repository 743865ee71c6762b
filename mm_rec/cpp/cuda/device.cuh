// What the current device has.
#ifndef MM_REC_DEVICE_CUH
#define MM_REC_DEVICE_CUH

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdlib>

namespace mm_rec {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Bytes of shared memory that one block can have. MM_REC_CUDA_SHARED_MEMORY sets fewer, so that what smaller GPUs run can be
// tested on any.
inline size_t shared_memory_limit() {
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const char* setting = std::getenv("MM_REC_CUDA_SHARED_MEMORY");
  const int fewer = setting == nullptr ? 0 : std::atoi(setting);
  return fewer > 0 && fewer < limit ? fewer : limit;
}

// Blocks of so much shared memory that a multiprocessor holds at a time, up to `most`.
inline int resident_blocks(int most, size_t bytes) {
  const int held = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / static_cast<int>(bytes);
  return held < 1 ? 1 : held < most ? held : most;
}

}  // namespace mm_rec

#endif
