// Elements of 16 or 32 bits on their way into floats and back, nearest, halves to even.
#pragma once

namespace mgt {
namespace {

// the upper 16 bits of the nearest bfloat16; anything of NaN
template <class S>
MGT_INLINE typename S::U bfloat16_bits(typename S::F x) {
  const typename S::U bits = S::bits(x);
  const typename S::U odd = S::bit_and(S::template shift_right<16>(bits), S::set_u(1));
  return S::template shift_right<16>(S::add_u(S::add_u(bits, S::set_u(0x7fff)), odd));
}

// 16 elements from `index` on
template <class S, mgt_dtype dtype>
MGT_INLINE typename S::F load_elements(const void* data, int64_t index) {
  if constexpr (dtype == MGT_FLOAT32)
    return S::load(static_cast<const float*>(data) + index);
  else
    return S::load(static_cast<const uint16_t*>(data) + index, dtype);
}

// 16 elements from `index` on; every NaN becomes the same one
template <class S, mgt_dtype dtype>
MGT_INLINE void store_elements(void* data, int64_t index, typename S::F x) {
  x = S::select(S::is_nan(x), S::from_bits(S::set_u(0x7fc00000)), x);
  if constexpr (dtype == MGT_FLOAT32)
    S::store(static_cast<float*>(data) + index, x);
  else if constexpr (dtype == MGT_BFLOAT16)
    S::store_low16(static_cast<uint16_t*>(data) + index, bfloat16_bits<S>(x));
  else
    S::store_low16(static_cast<uint16_t*>(data) + index, S::float16_bits(x));
}

// run(dtype) with the dtype as an integral constant
template <class Run>
MGT_INLINE void for_dtype(mgt_dtype dtype, const Run& run) {
  switch (dtype) {
    case MGT_FLOAT32: return run(std::integral_constant<mgt_dtype, MGT_FLOAT32>{});
    case MGT_BFLOAT16: return run(std::integral_constant<mgt_dtype, MGT_BFLOAT16>{});
    case MGT_FLOAT16: return run(std::integral_constant<mgt_dtype, MGT_FLOAT16>{});
  }
}

}  // namespace
}  // namespace mgt
