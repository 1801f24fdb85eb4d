/* What a program needs of libcuda beside what fake_cuda.c has: memory that is the host's, and a context. */
#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

CUresult CUDAAPI cuInit(unsigned flags) { return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }

CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = NULL;
  return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) {
  return context == NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult CUDAAPI cuCtxSynchronize(void) { return CUDA_SUCCESS; }

CUresult CUDAAPI cuMemAlloc(CUdeviceptr* pointer, size_t bytes) {
  *pointer = (CUdeviceptr)(uintptr_t)calloc(1, bytes);
  return *pointer ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult CUDAAPI cuMemcpyHtoD(CUdeviceptr target, const void* source, size_t bytes) {
  memcpy((void*)(uintptr_t)target, source, bytes);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemcpyDtoH(void* target, CUdeviceptr source, size_t bytes) {
  memcpy(target, (const void*)(uintptr_t)source, bytes);
  return CUDA_SUCCESS;
}
