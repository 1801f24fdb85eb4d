/* Stands in for libcuda: one device, no memory; hands every launch to fake_cuda_on_launch, or prints it.
 *
 * FAKE_CUDA_CAPABILITY is the device's compute capability, 10 major + minor; the function named in FAKE_CUDA_FAILS
 * fails. With FAKE_CUDA_CAPTURES a stream is being captured: no machine code is loaded, be it by a launch.
 */
#include <cuda.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  const unsigned char* cubin;
  const char* name;
  unsigned max_shared_bytes;
  /* whether the one context has its machine code */
  bool in_context;
} kernel;

enum { kDevice = 3, kDefaultSharedBytes = 48 * 1024, kMaxSharedBytes = 163 * 1024 };

/* geometry: grid, block, bytes of shared memory */
typedef void (*on_launch)(const char* name, const unsigned char* cubin, uint64_t cubin_bytes, const unsigned* geometry,
                          CUstream stream, void** arguments);

on_launch fake_cuda_on_launch = NULL;
/* libraries that are loaded now, and how often one was */
atomic_int fake_cuda_loaded, fake_cuda_loads;

static bool fails(const char* function) {
  const char* name = getenv("FAKE_CUDA_FAILS");
  return name != NULL && strcmp(name, function) == 0;
}

static bool captures(void) { return getenv("FAKE_CUDA_CAPTURES") != NULL; }

static uint64_t end_of_table(const unsigned char* cubin, int offset_at, int size_at) {
  uint64_t offset;
  uint16_t size_and_count[2];
  memcpy(&offset, cubin + offset_at, sizeof offset);
  memcpy(size_and_count, cubin + size_at, sizeof size_and_count);
  return offset + (uint64_t)size_and_count[0] * size_and_count[1];
}

/* ptxas writes the section and the program headers last. */
static uint64_t size_of(const unsigned char* cubin) {
  const uint64_t sections = end_of_table(cubin, 0x28, 0x3A), programs = end_of_table(cubin, 0x20, 0x36);
  return sections > programs ? sections : programs;
}

static bool contains(const unsigned char* cubin, const char* text) {
  const uint64_t length = strlen(text) + 1, size = size_of(cubin);
  for (uint64_t i = 0; i + length <= size; ++i)
    if (memcmp(cubin + i, text, length) == 0) return true;
  return false;
}

CUresult CUDAAPI cuCtxGetDevice(CUdevice* device) {
  *device = kDevice;
  return fails("cuCtxGetDevice") ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  const char* capability = getenv("FAKE_CUDA_CAPABILITY");
  if (capability == NULL || device != kDevice) return CUDA_ERROR_INVALID_DEVICE;
  if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
    *value = atoi(capability) / 10;
  else if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
    *value = atoi(capability) % 10;
  else
    return CUDA_ERROR_INVALID_VALUE;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option* jit_options, void** jit_values,
                                   unsigned num_jit_options, CUlibraryOption* options, void** values,
                                   unsigned num_options) {
  kernel* loaded;
  if (jit_options || jit_values || num_jit_options || options || values || num_options) return CUDA_ERROR_INVALID_VALUE;
  if (memcmp(code, "\177ELF", 4) != 0) return CUDA_ERROR_INVALID_IMAGE;
  if (captures()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (fails("cuLibraryLoadData")) return CUDA_ERROR_OUT_OF_MEMORY;
  loaded = calloc(1, sizeof *loaded);
  loaded->cubin = code;
  loaded->max_shared_bytes = kDefaultSharedBytes;
  *library = (CUlibrary)loaded;
  atomic_fetch_add(&fake_cuda_loaded, 1);
  atomic_fetch_add(&fake_cuda_loads, 1);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuLibraryUnload(CUlibrary library) {
  atomic_fetch_sub(&fake_cuda_loaded, 1);
  free(library);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuLibraryGetKernel(CUkernel* found, CUlibrary library, const char* name) {
  kernel* loaded = (kernel*)library;
  char section[256];
  if (fails("cuLibraryGetKernel")) return CUDA_ERROR_NOT_FOUND;
  snprintf(section, sizeof section, ".text.%s", name);
  if (!contains(loaded->cubin, section)) return CUDA_ERROR_NOT_FOUND;
  loaded->name = name;
  *found = (CUkernel)loaded;
  return CUDA_SUCCESS;
}

static CUresult load_into_context(kernel* loaded) {
  if (!loaded->in_context && captures()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  loaded->in_context = true;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuKernelGetFunction(CUfunction* function, CUkernel kernel_) {
  if (fails("cuKernelGetFunction")) return CUDA_ERROR_OUT_OF_MEMORY;
  *function = (CUfunction)kernel_;
  return load_into_context((kernel*)kernel_);
}

CUresult CUDAAPI cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel_, CUdevice device) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || device != kDevice || value < 0 ||
      value > kMaxSharedBytes)
    return CUDA_ERROR_INVALID_VALUE;
  ((kernel*)kernel_)->max_shared_bytes = (unsigned)value;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                                CUstream stream, void** arguments, void** extra) {
  kernel* launched = (kernel*)function;
  const unsigned geometry[] = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes};
  const uint64_t num_threads = (uint64_t)block_x * block_y * block_z;
  if (grid_x == 0 || grid_x > INT32_MAX || grid_y == 0 || grid_y > UINT16_MAX || grid_z == 0 || grid_z > UINT16_MAX ||
      num_threads == 0 || num_threads > 1024 || arguments == NULL || extra != NULL ||
      shared_bytes > launched->max_shared_bytes)
    return CUDA_ERROR_INVALID_VALUE;
  if (load_into_context(launched) != CUDA_SUCCESS) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (fake_cuda_on_launch != NULL)
    fake_cuda_on_launch(launched->name, launched->cubin, size_of(launched->cubin), geometry, stream, arguments);
  else
    printf("%s grid %u %u %u block %u %u %u\n", launched->name, grid_x, grid_y, grid_z, block_x, block_y, block_z);
  return fails("cuLaunchKernel") ? CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES : CUDA_SUCCESS;
}
