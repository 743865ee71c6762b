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
  const char* fewer = std::getenv("MM_REC_CUDA_SHARED_MEMORY");
  const size_t limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), wanted = fewer ? std::atoi(fewer) : limit;
  return wanted < limit ? wanted : limit;
}

}  // namespace mm_rec

#endif
