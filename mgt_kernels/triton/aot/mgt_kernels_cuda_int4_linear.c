/* Both int4 linear layers, w4a8_linear and w4a16_linear. The same grids as the launchers in Python. */
#include "mgt_kernels_cuda_launch.h"

enum {
  /* inputs that share a run of bytes: a half of them in the low nibbles, the other in the high ones */
  kChunk = 64,
  kRun = kChunk / 2,
  kMaxGroupSize = 16384,
  kMaxRows = 1 << 30,
  kMaxInputs = 1 << 30,
  kMaxOutputs = 1 << 30,
  /* few rows take many programs to load the weights */
  kFewRows = 16,
  kFewRowsOutputs = 16,
  kOutputs = 128,
};

typedef struct {
  int64_t num_groups;
  /* both nibbles of the last bytes have activations */
  int64_t padded_groups;
  int64_t padded_rows;
  /* of a row of quantized activations: those of the low nibbles, or of the high ones */
  int64_t plane_bytes;
} quantized_sizes;

static bool valid_linear(const mgt_cuda_int4_linear_args* a) {
  return a->num_rows >= 0 && a->num_rows <= kMaxRows && a->num_inputs >= 1 && a->num_inputs <= kMaxInputs &&
         a->num_outputs >= 0 && a->num_outputs <= kMaxOutputs &&
         (a->dtype == MGT_CUDA_FLOAT32 || a->dtype == MGT_CUDA_BFLOAT16) &&
         (a->scale_dtype == MGT_CUDA_FLOAT32 || a->scale_dtype == MGT_CUDA_FLOAT16) && a->group_size >= kRun &&
         a->group_size <= kMaxGroupSize && a->group_size % kRun == 0 &&
         (a->num_rows <= 1 || a->x_stride >= a->num_inputs);
}

static bool is_empty(const mgt_cuda_int4_linear_args* a) { return a->num_rows == 0 || a->num_outputs == 0; }

static bool valid_linear_pointers(const mgt_cuda_int4_linear_args* a, const void* y) {
  return a->x && a->w_q && is_aligned(a->w_q) && a->scale && a->zero_point && y;
}

static int64_t num_bytes_of_row(const mgt_cuda_int4_linear_args* a) { return ceil_div(a->num_inputs, kChunk) * kRun; }

static bool is_x_aligned(const mgt_cuda_int4_linear_args* a) {
  return is_aligned(a->x) && a->num_inputs % 16 == 0 && (a->num_rows == 1 || a->x_stride % 16 == 0);
}

static int64_t num_output_blocks_of(const mgt_cuda_int4_linear_args* a) {
  return ceil_div(a->num_outputs, a->num_rows <= kFewRows ? kFewRowsOutputs : kOutputs);
}

static quantized_sizes sizes_of(const mgt_cuda_int4_linear_args* a) {
  const int64_t block_rows = a->num_rows <= kFewRows ? 16 : 64;
  quantized_sizes s;
  s.num_groups = ceil_div(a->num_inputs, a->group_size);
  s.padded_groups = s.num_groups + s.num_groups * a->group_size / kRun % 2;
  s.padded_rows = ceil_div(a->num_rows, block_rows) * block_rows;
  s.plane_bytes = s.padded_groups * a->group_size / 2;
  return s;
}

static bool valid_w4a8(const mgt_cuda_int4_linear_args* a) {
  /* the kernels count the sums of all groups in 32 bits */
  return valid_linear(a) && sizes_of(a).padded_rows <= INT32_MAX / sizes_of(a).padded_groups;
}

size_t mgt_cuda_w4a8_linear_workspace(const mgt_cuda_int4_linear_args* args) {
  quantized_sizes s;
  if (args == NULL || !valid_w4a8(args) || is_empty(args)) return 0;
  s = sizes_of(args);
  return (size_t)s.padded_rows *
         (2 * (size_t)s.plane_bytes + sizeof(int32_t) * (size_t)s.padded_groups + sizeof(float));
}

CUresult mgt_cuda_w4a8_linear(const mgt_cuda_int4_linear_args* args, const float* x_scale, int64_t num_x_scales,
                              void* y, void* workspace, size_t workspace_bytes, CUstream stream) {
  if (args == NULL || !valid_w4a8(args) || num_x_scales < 0 ||
      (num_x_scales > 0 && (x_scale == NULL || args->num_rows % num_x_scales != 0)))
    return CUDA_ERROR_INVALID_VALUE;
  if (is_empty(args)) return CUDA_SUCCESS;
  mgt_cuda_int4_linear_args a = *args;
  if (!valid_linear_pointers(&a, y) || !workspace || !is_aligned(workspace) ||
      workspace_bytes < mgt_cuda_w4a8_linear_workspace(args))
    return CUDA_ERROR_INVALID_VALUE;

  const quantized_sizes s = sizes_of(&a);
  const bool few_rows = a.num_rows <= kFewRows, is_static = num_x_scales > 0;
  int8_t* x_q = workspace;
  int32_t* x_sum = (int32_t*)(void*)(x_q + 2 * s.padded_rows * s.plane_bytes);
  float* row_scale = (float*)(void*)(x_sum + s.padded_rows * s.padded_groups);
  int32_t num_rows = (int32_t)a.num_rows, num_inputs = (int32_t)a.num_inputs, num_outputs = (int32_t)a.num_outputs;
  int32_t num_groups = (int32_t)s.num_groups, padded_groups = (int32_t)s.padded_groups;
  const int64_t row_blocks = s.padded_rows / (few_rows ? 16 : 64), num_programs = row_blocks * num_output_blocks_of(&a);
  if (num_programs > INT32_MAX) return CUDA_ERROR_INVALID_VALUE;
  int32_t num_row_blocks = (int32_t)row_blocks,
          split_groups = a.group_size == kRun ? num_groups + num_groups % 2 : num_groups;
  int32_t stride_group = (int32_t)s.padded_rows, plane_bytes = (int32_t)s.plane_bytes;
  int32_t row_bytes = (int32_t)num_bytes_of_row(&a);
  int32_t rows_per_scale = is_static ? (int32_t)(a.num_rows / num_x_scales) : 1;
  void* const quantize_arguments[kMaxParameters] = {&x_q,           &x_sum,        &row_scale,   &a.x,
                                                    &x_scale,       &a.x_stride,   &num_rows,    &num_inputs,
                                                    &padded_groups, &stride_group, &plane_bytes, &rows_per_scale};
  const CUresult status = mgt_cuda_launch(MGT_CUDA_QUANTIZE_ROWS(a.dtype, a.group_size, is_static, is_x_aligned(&a)),
                                          s.padded_rows, 1, quantize_arguments, stream);
  if (status != CUDA_SUCCESS) return status;

  void* const arguments[kMaxParameters] = {
      &y,        &x_q,         &x_sum,      &row_scale,      &a.w_q,        &a.scale,      &a.zero_point, &a.bias,
      &num_rows, &num_outputs, &num_groups, &num_row_blocks, &split_groups, &stride_group, &row_bytes,    &plane_bytes};
  return mgt_cuda_launch(MGT_CUDA_W4A8_LINEAR(a.dtype, a.group_size, a.scale_dtype, a.bias != NULL, few_rows),
                         num_programs, 1, arguments, stream);
}

CUresult mgt_cuda_w4a16_linear(const mgt_cuda_int4_linear_args* args, void* y, CUstream stream) {
  if (args == NULL || !valid_linear(args)) return CUDA_ERROR_INVALID_VALUE;
  if (is_empty(args)) return CUDA_SUCCESS;
  mgt_cuda_int4_linear_args a = *args;
  if (!valid_linear_pointers(&a, y)) return CUDA_ERROR_INVALID_VALUE;

  const bool few_rows = a.num_rows <= kFewRows;
  int32_t num_rows = (int32_t)a.num_rows, num_inputs = (int32_t)a.num_inputs, num_outputs = (int32_t)a.num_outputs;
  int32_t num_groups = (int32_t)ceil_div(a.num_inputs, a.group_size), row_bytes = (int32_t)num_bytes_of_row(&a);
  /* bytes of a step of the loop, all of one group */
  const int64_t block_bytes = a.group_size % (2 * kChunk) == 0 ? kChunk : kRun;
  const int64_t row_blocks = ceil_div(a.num_rows, few_rows ? 16 : 128);
  const int64_t num_programs = row_blocks * num_output_blocks_of(&a);
  if (num_programs > INT32_MAX) return CUDA_ERROR_INVALID_VALUE;
  int32_t num_row_blocks = (int32_t)row_blocks, split_bytes = (int32_t)(ceil_div(row_bytes, block_bytes) * block_bytes);
  void* const arguments[kMaxParameters] = {
      &y,        &a.x,         &a.w_q,      &a.scale,    &a.zero_point,   &a.bias,    &a.x_stride,
      &num_rows, &num_outputs, &num_inputs, &num_groups, &num_row_blocks, &row_bytes, &split_bytes};
  return mgt_cuda_launch(
      MGT_CUDA_W4A16_LINEAR(a.dtype, a.group_size, a.scale_dtype, a.bias != NULL, few_rows, is_x_aligned(&a)),
      num_programs, 1, arguments, stream);
}
