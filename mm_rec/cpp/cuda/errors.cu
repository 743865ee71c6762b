// What the library was built from, and names of the errors that its functions return.
#include <cuda_runtime.h>
#include <stdint.h>

#if !defined(MM_SOURCES)
#error "mm_rec/cpp/build.py defines MM_SOURCES"
#endif

// A hash of the sources and flags that this library was built from, by which a library of other sources is told.
extern "C" uint64_t mm_rec_cuda_sources() { return MM_SOURCES; }

extern "C" const char* mm_rec_cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
