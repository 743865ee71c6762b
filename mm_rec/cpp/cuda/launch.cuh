// Kernel launches: the only place with the <<<>>> syntax.
#ifndef MM_REC_LAUNCH_CUH
#define MM_REC_LAUNCH_CUH

#include <cuda_runtime.h>

#include <cstddef>

#include "device.cuh"

namespace mm_rec {

// Dynamic shared memory of the running block, 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// What the functions of this library return, beside CUDA's own errors, if the device has too little shared memory.
constexpr cudaError_t kDoesNotFit = static_cast<cudaError_t>(20000);

// Enqueue a kernel on `stream`; never waits. Raises the kernel's limit of dynamic shared memory if needed.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    if (shared_bytes > shared_memory_limit()) return kDoesNotFit;
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

}  // namespace mm_rec

#endif
