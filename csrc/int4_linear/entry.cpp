#include <cmath>

#include "dispatch.h"
#include "parallel.h"

namespace {

// outputs larger than this bypass the caches: two megabytes, a large second level
constexpr int64_t kStreamBytes = int64_t{2} << 20;

int64_t element_bytes(mgt_dtype dtype) { return dtype == MGT_FLOAT32 ? 4 : 2; }

// the stride of a single row, from which nobody steps to the next, becomes the least that is allowed
mgt_int4_linear_args normalized(mgt_int4_linear_args a) {
  if (a.num_rows == 1) a.x_stride = a.num_inputs;
  return a;
}

// expects normalized arguments
bool valid(const mgt_int4_linear_args& a) {
  return a.num_rows >= 0 && a.num_inputs >= 1 && a.num_outputs >= 1 && a.num_inputs <= INT32_MAX &&
         a.num_outputs <= INT32_MAX && (a.dtype == MGT_FLOAT32 || a.dtype == MGT_BFLOAT16) &&
         (a.scale_dtype == MGT_FLOAT32 || a.scale_dtype == MGT_FLOAT16) && a.group_size >= 32 &&
         a.group_size <= 16384 && a.group_size % 32 == 0 && (a.num_rows == 0 || a.x_stride >= a.num_inputs) &&
         (a.num_rows == 0 || (mgt::Size(a.num_rows) * a.x_stride * element_bytes(a.dtype)).fits()) &&
         (mgt::Size(a.num_rows) * a.num_outputs * element_bytes(a.dtype)).fits();
}

// how the outputs are handed out
struct Plan {
  int64_t panels, rows_at_once, runs;
  mgt::Chunks chunks;
};

// every panel once for all rows, or, where panels are few, for runs of them
Plan plan_of(const mgt_context& context, const mgt_int4_linear_args& a) {
  const int64_t panels = (a.num_outputs + mgt::kPanelOutputs - 1) / mgt::kPanelOutputs;
  const int64_t most = 4 * mgt::max_workers(context);
  const int64_t wanted = panels >= most ? 1 : (most + panels - 1) / panels;
  const int64_t rows_at_once =
      mgt::round_up(std::max(int64_t{1}, (a.num_rows + wanted - 1) / wanted), mgt::kRowAlignment);
  const int64_t runs = (a.num_rows + rows_at_once - 1) / rows_at_once;
  return {panels, rows_at_once, runs, {context, panels * runs, 1}};
}

// parts of the workspace in bytes, all multiples of a line
struct Workspace {
  // in elements
  int64_t row_stride;
  mgt::Size rows, row_scale, row_sums;
  int64_t scratch;
  mgt::Size total;
};

mgt::Size lines(mgt::Size bytes) {
  return bytes.fits() ? (bytes + (mgt::kLineBytes - 1)).value() / mgt::kLineBytes * mgt::Size(mgt::kLineBytes) : bytes;
}

Workspace workspace_of(const mgt_context& context, const mgt_int4_linear_args& a, const mgt::Int4LinearKernel& kernel) {
  const int64_t row_stride = mgt::padded_inputs(a) + mgt::kLineBytes / kernel.row_bytes;
  // tile registers read 32 rows at a time
  const mgt::Size padded_rows = mgt::Size(a.num_rows) + 31;
  const mgt::Size rows = lines(padded_rows * row_stride * kernel.row_bytes);
  const mgt::Size row_scale = lines(mgt::Size(a.num_rows) * 4);
  const mgt::Size row_sums = lines(mgt::Size(a.num_rows) * mgt::num_groups(a) * 4);
  const int64_t scratch = lines(mgt::scratch_bytes(a, kernel.panel_bytes)).value();
  const mgt::Size workers = plan_of(context, a).chunks.num_workers;
  return {row_stride, rows,    row_scale,
          row_sums,   scratch, rows + row_scale + row_sums + workers * scratch + mgt::kLineBytes};
}

using Op = const mgt::Int4LinearKernel* mgt::Kernels::*;

int64_t workspace_bytes(const mgt_context* context, const mgt_int4_linear_args* args, Op op) {
  mgt_isa isa;
  if (!mgt::valid(context) || !mgt::whole(args) || mgt_resolve_isa(context->isa, &isa) != MGT_OK) return -1;
  const mgt_int4_linear_args a = normalized(*args);
  return valid(a) ? workspace_of(*context, a, *(mgt::kKernels[isa].*op)).total.value() : -1;
}

mgt_status run_linear(const mgt_context* context, const mgt_int4_linear_args* args, Op op, const float* x_scale,
                      int64_t num_x_scales, void* y, void* workspace, int64_t num_bytes, int64_t* error_index) {
  const mgt::FloatState state;
  if (!mgt::valid(context) || !mgt::whole(args)) return MGT_INVALID_ARGUMENT;
  const mgt_int4_linear_args a = normalized(*args);
  if (!valid(a) || num_x_scales < 0 || (num_x_scales > 0 && (x_scale == nullptr || a.num_rows % num_x_scales != 0)))
    return MGT_INVALID_ARGUMENT;
  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status != MGT_OK) return status;
  if (a.num_rows == 0) return MGT_OK;
  for (int64_t i = 0; i < num_x_scales; ++i)
    if (!std::isnormal(x_scale[i]) || x_scale[i] < 0.0f) return MGT_INVALID_ARGUMENT;
  const mgt::Int4LinearKernel& kernel = *(mgt::kKernels[isa].*op);
  const Workspace layout = workspace_of(*context, a, kernel);
  if (!a.x || !a.w_q || !a.scale || !a.zero_point || !y || !workspace || !layout.total.fits() ||
      num_bytes < layout.total.value())
    return MGT_INVALID_ARGUMENT;

  auto* rows = static_cast<uint8_t*>(mgt::on_line(workspace));
  auto* row_scale = rows + layout.rows.value();
  auto* row_sums = row_scale + layout.row_scale.value();
  auto* scratch = row_sums + layout.row_sums.value();
  const mgt::Int4LinearCall call{a,
                                 x_scale,
                                 num_x_scales,
                                 rows,
                                 layout.row_stride,
                                 reinterpret_cast<float*>(row_scale),
                                 reinterpret_cast<uint32_t*>(row_sums),
                                 y,
                                 a.num_rows * a.num_outputs * element_bytes(a.dtype) > kStreamBytes};
  mgt::FirstIndex bad_row;
  // a chunk is worth waking a thread for from about 2^14 activations on
  const int64_t chunk = std::max(int64_t{1}, (int64_t{1} << 14) / a.num_inputs);
  mgt::parallel_chunks(*context, {*context, a.num_rows, chunk},
                       [&](int64_t begin, int64_t end, int64_t) { bad_row.report(kernel.prepare(call, begin, end)); });
  if (bad_row.get() >= 0) return mgt::fail(MGT_BAD_ACTIVATION, bad_row.get(), error_index);

  const Plan plan = plan_of(*context, a);
  mgt::parallel_chunks(*context, plan.chunks, [&](int64_t begin, int64_t end, int64_t worker) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % plan.runs * plan.rows_at_once;
      const int64_t last = std::min(first + plan.rows_at_once, a.num_rows);
      kernel.multiply(call, i / plan.runs, first, last, scratch + worker * layout.scratch);
    }
  });
  return MGT_OK;
}

}  // namespace

extern "C" {

int64_t mgt_w4a8_linear_workspace(const mgt_context* context, const mgt_int4_linear_args* args) {
  return workspace_bytes(context, args, &mgt::Kernels::w4a8_linear);
}

int64_t mgt_w4a16_linear_workspace(const mgt_context* context, const mgt_int4_linear_args* args) {
  return workspace_bytes(context, args, &mgt::Kernels::w4a16_linear);
}

mgt_status mgt_w4a8_linear(const mgt_context* context, const mgt_int4_linear_args* args, const float* x_scale,
                           int64_t num_x_scales, void* y, void* workspace, int64_t num_bytes, int64_t* error_index) {
  return run_linear(context, args, &mgt::Kernels::w4a8_linear, x_scale, num_x_scales, y, workspace, num_bytes,
                    error_index);
}

mgt_status mgt_w4a16_linear(const mgt_context* context, const mgt_int4_linear_args* args, void* y, void* workspace,
                            int64_t num_bytes, int64_t* error_index) {
  return run_linear(context, args, &mgt::Kernels::w4a16_linear, nullptr, 0, y, workspace, num_bytes, error_index);
}

}  // extern "C"
