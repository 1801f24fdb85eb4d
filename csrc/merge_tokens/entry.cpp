#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "parallel.h"

namespace {

// a chunk of rows is worth waking a thread for from about 2^15 elements on
constexpr int64_t kChunkElements = int64_t{1} << 15;

// of both ops, whose sizes are called alike; rows_of_x of each sample's x are read
template <class Args>
bool valid(const Args& a, int64_t rows_of_x) {
  if (a.num_samples < 0 || a.num_tokens < 0 || a.num_rows < 0 || a.num_channels < 0 || a.num_rows > a.num_tokens)
    return false;
  if (a.dtype != MGT_FLOAT32 && a.dtype != MGT_BFLOAT16 && a.dtype != MGT_FLOAT16) return false;
  const int64_t size = a.dtype == MGT_FLOAT32 ? 4 : 2;
  const mgt::Size samples = a.num_samples > 1 ? mgt::Size(a.num_samples) * mgt::Size(a.stride_sample).magnitude() : 0;
  const mgt::Size rows = rows_of_x > 1 ? mgt::Size(rows_of_x) * mgt::Size(a.stride_token).magnitude() : 0;
  return ((samples + rows + a.num_channels) * size).fits() &&
         (mgt::Size(a.num_samples) * std::max(a.num_tokens, int64_t{1}) * std::max(a.num_channels, int64_t{1}) * size)
             .fits() &&
         (mgt::Size(a.num_samples) * (mgt::Size(a.num_tokens) + 1) * int64_t{sizeof(int64_t)}).fits();
}

// whether starts rises from 0 to all tokens, and the members are tokens
bool is_match(const mgt_merge_tokens_args& a, int64_t sample) {
  const int64_t* starts = a.starts + sample * (a.num_tokens + 1);
  const int64_t* members = a.members + sample * a.num_tokens;
  if (starts[0] != 0 || starts[a.num_rows] != a.num_tokens) return false;
  for (int64_t row = 0; row < a.num_rows; ++row)
    if (starts[row] > starts[row + 1]) return false;
  return std::all_of(members, members + a.num_tokens, [&](int64_t i) { return i >= 0 && i < a.num_tokens; });
}

bool is_match(const mgt_unmerge_tokens_args& a, int64_t sample) {
  const int64_t* rows = a.rows + sample * a.num_tokens;
  return std::all_of(rows, rows + a.num_tokens, [&](int64_t row) { return row >= 0 && row < a.num_rows; });
}

// each(sample, begin, end): for the first to the last of `count` rows of every sample
template <class Each>
void for_rows(const mgt_context& context, int64_t num_samples, int64_t count, int64_t num_channels, const Each& each) {
  const int64_t at_once = std::max(int64_t{1}, kChunkElements / std::max(num_channels, int64_t{1}));
  const int64_t runs = (count + at_once - 1) / at_once;
  mgt::parallel_chunks(context, {context, num_samples * runs, 1}, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k % runs * at_once;
      each(k / runs, first, std::min(first + at_once, count));
    }
  });
}

template <class Args>
mgt_status check_match(const Args& a, int64_t* error_index) {
  for (int64_t sample = 0; sample < a.num_samples; ++sample)
    if (!is_match(a, sample)) return mgt::fail(MGT_BAD_MATCH, sample, error_index);
  return MGT_OK;
}

}  // namespace

extern "C" {

mgt_status mgt_merge_tokens(const mgt_context* context, const mgt_merge_tokens_args* args, void* y,
                            int64_t* error_index) {
  const mgt::FloatState state;
  if (!mgt::valid(context) || !mgt::whole(args) || !valid(*args, args->num_tokens)) return MGT_INVALID_ARGUMENT;
  const mgt_merge_tokens_args& a = *args;
  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status != MGT_OK) return status;
  if (a.num_samples == 0 || a.num_tokens == 0) return MGT_OK;
  if (!a.starts || !a.members) return MGT_INVALID_ARGUMENT;
  const mgt_status found = check_match(a, error_index);
  if (found != MGT_OK || a.num_channels == 0) return found;
  if (!a.x || !y) return MGT_INVALID_ARGUMENT;
  for_rows(*context, a.num_samples, a.num_rows, a.num_channels, [&](int64_t sample, int64_t begin, int64_t end) {
    mgt::kKernels[isa].merge_tokens(a, sample, begin, end, y);
  });
  return MGT_OK;
}

mgt_status mgt_unmerge_tokens(const mgt_context* context, const mgt_unmerge_tokens_args* args, void* y,
                              int64_t* error_index) {
  if (!mgt::valid(context) || !mgt::whole(args) || !valid(*args, args->num_rows)) return MGT_INVALID_ARGUMENT;
  const mgt_unmerge_tokens_args& a = *args;
  // copying takes no instruction set, but one that is missing is an error here, too
  mgt_isa isa;
  const mgt_status status = mgt_resolve_isa(context->isa, &isa);
  if (status != MGT_OK) return status;
  if (a.num_samples == 0 || a.num_tokens == 0) return MGT_OK;
  if (!a.rows) return MGT_INVALID_ARGUMENT;
  const mgt_status found = check_match(a, error_index);
  if (found != MGT_OK || a.num_channels == 0) return found;
  if (!a.x || !y) return MGT_INVALID_ARGUMENT;
  const int64_t size = a.dtype == MGT_FLOAT32 ? 4 : 2, bytes = a.num_channels * size;
  for_rows(*context, a.num_samples, a.num_tokens, a.num_channels, [&](int64_t sample, int64_t begin, int64_t end) {
    const char* x = static_cast<const char*>(a.x) + sample * a.stride_sample * size;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = a.rows[sample * a.num_tokens + i];
      std::memcpy(static_cast<char*>(y) + (sample * a.num_tokens + i) * bytes, x + row * a.stride_token * size,
                  static_cast<size_t>(bytes));
    }
  });
  return MGT_OK;
}

}  // extern "C"
