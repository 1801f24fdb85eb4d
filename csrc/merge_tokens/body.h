// merge_tokens, written once against the lanes of simd_*.h.
//
// Bound by: memory. Every token is read once, every mean written once.
#pragma once

namespace mgt {
namespace {

// the mean of `count` tokens, two at least, in the order of `members`
template <class S, mgt_dtype dtype>
void average(const mgt_merge_tokens_args& a, const void* sample, const int64_t* members, int64_t count, void* mean) {
  using Element = std::conditional_t<dtype == MGT_FLOAT32, float, uint16_t>;
  const typename S::F divisor = S::set(static_cast<float>(count));
  const auto* x = static_cast<const Element*>(sample);
  // of 16 channels, which load(token) gives
  const auto mean_of = [&](const auto& load) MGT_INLINE_LAMBDA {
    typename S::F sum = load(members[0]);
    for (int64_t k = 1; k < count; ++k) sum = S::add(sum, load(members[k]));
    return S::div(sum, divisor);
  };
  int64_t c = 0;
  for (; c + 16 <= a.num_channels; c += 16)
    store_elements<S, dtype>(mean, c, mean_of([&](int64_t token) MGT_INLINE_LAMBDA {
                               return load_elements<S, dtype>(x + token * a.stride_token, c);
                             }));
  const int64_t left = a.num_channels - c;
  if (left == 0) return;
  Element rest[16] = {};
  store_elements<S, dtype>(rest, 0, mean_of([&](int64_t token) MGT_INLINE_LAMBDA {
                             Element copy[16] = {};
                             const Element* channels = x + token * a.stride_token + c;
                             std::copy(channels, channels + left, copy);
                             return load_elements<S, dtype>(copy, 0);
                           }));
  std::copy(rest, rest + left, static_cast<Element*>(mean) + c);
}

template <class S>
void merge_tokens(const mgt_merge_tokens_args& a, int64_t sample, int64_t begin, int64_t end, void* y) {
  const int64_t size = a.dtype == MGT_FLOAT32 ? 4 : 2;
  const char* x = static_cast<const char*>(a.x) + sample * a.stride_sample * size;
  const int64_t* starts = a.starts + sample * (a.num_tokens + 1);
  const int64_t* members = a.members + sample * a.num_tokens;
  for (int64_t row = begin; row < end; ++row) {
    char* mean = static_cast<char*>(y) + (sample * a.num_rows + row) * a.num_channels * size;
    const int64_t first = starts[row], count = starts[row + 1] - first;
    if (count == 0)
      std::fill(mean, mean + a.num_channels * size, char{0});
    else if (count == 1)
      std::memcpy(mean, x + members[first] * a.stride_token * size, static_cast<size_t>(a.num_channels * size));
    else
      for_dtype(a.dtype,
                [&](auto dtype) MGT_INLINE_LAMBDA { average<S, dtype.value>(a, x, members + first, count, mean); });
  }
}

}  // namespace
}  // namespace mgt
