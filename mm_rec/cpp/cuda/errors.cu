// Names of the errors that the functions of this library return.
#include <cuda_runtime.h>

extern "C" const char* mm_rec_cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
