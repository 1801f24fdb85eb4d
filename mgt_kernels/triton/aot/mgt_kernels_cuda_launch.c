/* Finds the variant for the current device, loads it once, launches it. */
#include "mgt_kernels_cuda_launch.h"

enum {
  /* more shared memory has to be asked for */
  kDefaultSharedBytes = 48 * 1024,
};

static CUresult current_architecture(CUdevice* device, int* architecture) {
  int major, minor;
  CUresult status = cuCtxGetDevice(device);
  if (status == CUDA_SUCCESS)
    status = cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, *device);
  if (status == CUDA_SUCCESS)
    status = cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, *device);
  if (status == CUDA_SUCCESS) *architecture = 10 * major + minor;
  return status;
}

static bool runs_on(const mgt_cuda_table* table, int architecture) {
  if (table->exact) return table->architecture == architecture;
  return table->architecture / 10 == architecture / 10 && table->architecture <= architecture;
}

/* The latest exported architecture that the current device runs. */
static CUresult best_architecture(CUdevice* device, int* best) {
  int architecture;
  const CUresult status = current_architecture(device, &architecture);
  if (status != CUDA_SUCCESS) return status;
  *best = 0;
  for (int t = 0; t < mgt_cuda_num_tables; ++t)
    if (runs_on(&mgt_cuda_tables[t], architecture)) *best = mgt_cuda_tables[t].architecture;
  return *best == 0 ? CUDA_ERROR_NO_BINARY_FOR_GPU : CUDA_SUCCESS;
}

static CUresult find_variant(unsigned key, CUdevice* device, mgt_cuda_variant** variant) {
  int architecture;
  const CUresult status = best_architecture(device, &architecture);
  if (status != CUDA_SUCCESS) return status;
  for (int t = 0; t < mgt_cuda_num_tables; ++t) {
    if (mgt_cuda_tables[t].architecture != architecture) continue;
    for (int i = 0; i < mgt_cuda_tables[t].num_variants; ++i) {
      *variant = &mgt_cuda_tables[t].variants[i];
      if ((*variant)->key == key) return CUDA_SUCCESS;
    }
  }
  return CUDA_ERROR_NOT_FOUND;
}

/* A kernel of a library, unlike a function of a module, belongs to no context: one load serves all of them. */
static CUresult load_kernel(mgt_cuda_variant* variant, CUkernel* kernel) {
  CUlibrary library;
  CUkernel loaded_meanwhile = NULL;
  CUresult status;
  *kernel = atomic_load(&variant->kernel);
  if (*kernel != NULL) return CUDA_SUCCESS;
  status = cuLibraryLoadData(&library, variant->cubin, NULL, NULL, 0, NULL, NULL, 0);
  if (status != CUDA_SUCCESS) return status;
  status = cuLibraryGetKernel(kernel, library, variant->name);
  if (status == CUDA_SUCCESS && atomic_compare_exchange_strong(&variant->kernel, &loaded_meanwhile, *kernel))
    return CUDA_SUCCESS;
  cuLibraryUnload(library);
  *kernel = loaded_meanwhile;
  return status;
}

CUresult mgt_cuda_load(void) {
  CUdevice device;
  CUkernel kernel;
  CUfunction function;
  int architecture;
  CUresult status = best_architecture(&device, &architecture);
  for (int t = 0; t < mgt_cuda_num_tables && status == CUDA_SUCCESS; ++t) {
    if (mgt_cuda_tables[t].architecture != architecture) continue;
    for (int i = 0; i < mgt_cuda_tables[t].num_variants && status == CUDA_SUCCESS; ++i) {
      status = load_kernel(&mgt_cuda_tables[t].variants[i], &kernel);
      /* a library goes to a context when a function of it is needed there */
      if (status == CUDA_SUCCESS) status = cuKernelGetFunction(&function, kernel);
    }
  }
  return status;
}

CUresult mgt_cuda_find(unsigned key) {
  CUdevice device;
  mgt_cuda_variant* variant;
  return find_variant(key, &device, &variant);
}

CUresult mgt_cuda_launch(unsigned key, int64_t grid_x, int64_t grid_y, void* const* arguments, CUstream stream) {
  CUdevice device;
  CUkernel kernel;
  mgt_cuda_variant* variant;
  /* scratch memory for the compiler's own purposes, of which these kernels use none */
  CUdeviceptr scratch = 0;
  void* parameters[kMaxParameters + 2];
  int num_parameters = 0;
  CUresult status = find_variant(key, &device, &variant);
  if (status == CUDA_SUCCESS) status = load_kernel(variant, &kernel);
  if (status == CUDA_SUCCESS && variant->shared_bytes > kDefaultSharedBytes)
    status = cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)variant->shared_bytes, kernel,
                                  device);
  if (status != CUDA_SUCCESS) return status;
  for (int i = 0; i < kMaxParameters; ++i)
    if (variant->parameters >> i & 1) parameters[num_parameters++] = arguments[i];
  parameters[num_parameters++] = &scratch;
  parameters[num_parameters++] = &scratch;
  return cuLaunchKernel((CUfunction)kernel, (unsigned)grid_x, (unsigned)grid_y, 1, 32 * variant->num_warps, 1, 1,
                        variant->shared_bytes, stream, parameters, NULL);
}
