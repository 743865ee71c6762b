// The version of the C interface, and names of the errors that its functions return.
#include <cuda_runtime.h>

// Raised with every change of the C interface, so that an old library is told from a broken one.
extern "C" int mm_rec_cuda_interface() { return 4; }

extern "C" const char* mm_rec_cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
