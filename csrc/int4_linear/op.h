// What the two int4 linear layers share: the call, its workspace and the entries of an instruction set.
#pragma once

#include "mgt_kernels.h"

namespace mgt {

// outputs that a kernel unpacks the weights of at once
constexpr int64_t kPanelOutputs = 64;
// rows are handed out in multiples of what every kernel's blocks divide
constexpr int64_t kRowAlignment = 192;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
// inputs that w_q has nibbles for
inline int64_t padded_inputs(const mgt_int4_linear_args& a) { return round_up(a.num_inputs, 64); }
inline int64_t num_groups(const mgt_int4_linear_args& a) { return (a.num_inputs + a.group_size - 1) / a.group_size; }

struct Int4LinearCall {
  const mgt_int4_linear_args& args;
  // W4A8 only
  const float* x_scale;
  int64_t num_x_scales;
  // The rows as the kernel multiplies them, zeros past num_inputs, in the workspace: one after the other, or, for tile
  // registers, in tiles of 16 rows: (row / 16, line of 64 bytes, row % 16, 64 bytes). What the last tiles hold past
  // num_rows is multiplied, and never stored.
  void* rows;
  // elements; not a power of two, which would crowd the rows into few sets of a cache
  int64_t row_stride;
  // W4A8 only: (rows) scale of each row, and (rows, groups) sum of each group as low + 128 high in two 16-bit halves
  float* row_scale;
  uint32_t* row_sums;
  void* y;
  // y is larger than a cache, so that it is written past it
  bool stream;
};

struct Int4LinearKernel {
  // rows [begin, end) into the workspace; returns the first that holds a value that cannot be multiplied, or -1
  int64_t (*prepare)(const Int4LinearCall& call, int64_t begin, int64_t end);
  // outputs [64 panel, 64 panel + 64) of rows [begin, end); scratch is a thread's own, on a cache line
  void (*multiply)(const Int4LinearCall& call, int64_t panel, int64_t begin, int64_t end, void* scratch);
  // bytes of an activation, and of a weight in the unpacked panel
  int64_t row_bytes, panel_bytes;
};

// elements of a block of results, in float32 or as sums of a group
constexpr int64_t kBlockRows = 64;
constexpr int64_t kBlockElements = kBlockRows * kPanelOutputs;

// The panel, scale and zero points of each group, two blocks.
inline int64_t scratch_bytes(const mgt_int4_linear_args& a, int64_t panel_bytes) {
  return kPanelOutputs * (padded_inputs(a) * panel_bytes + 8 * num_groups(a)) + 8 * kBlockElements;
}

}  // namespace mgt
