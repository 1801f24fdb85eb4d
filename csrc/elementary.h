// The transcendental functions of the noise and of the softmax: our own polynomials, a fixed order of operations,
// explicit fma and no contraction, so that every instruction set computes the same bits. Fitted to the least maximal
// relative error.
#pragma once

namespace mgt {
namespace {

// log1p(r) for r in [-1/4, 1/2]; log(x) keeps its relative precision near 1, because r = x - 1 is exact there
template <class S>
MGT_INLINE typename S::F log1p_polynomial(typename S::F r) {
  using F = typename S::F;
  F p = S::set(-0.04507484659552574f);
  p = S::fma(p, r, S::set(0.10463026165962219f));
  p = S::fma(p, r, S::set(-0.13161194324493408f));
  p = S::fma(p, r, S::set(0.14478394389152527f));
  p = S::fma(p, r, S::set(-0.1664731204509735f));
  p = S::fma(p, r, S::set(0.19990861415863037f));
  p = S::fma(p, r, S::set(-0.2500009536743164f));
  p = S::fma(p, r, S::set(0.3333345055580139f));
  // r - r^2/2 + r^3 p, for r in [-1/4, 1/2]
  p = S::fma(p, r, S::set(-0.5f));
  return S::fma(S::mul(r, r), p, r);
}

constexpr float kLn2 = 0.693147182464599609375f;

// x = 2^e (1 + r), r in [-1/4, 1/2)
template <class S>
MGT_INLINE void split_exponent(typename S::F x, typename S::F& e, typename S::F& r) {
  const typename S::U biased = S::sub_u(S::bits(x), S::set_u(0x3f400000u));
  const typename S::U exponent = S::template shift_right_signed<23>(biased);
  e = S::int_to_float(exponent);
  r = S::sub(S::from_bits(S::sub_u(S::bits(x), S::template shift_left<23>(exponent))), S::set(1.0f));
}

template <class S>
MGT_INLINE typename S::F log_f32(typename S::F x) {
  typename S::F e, r;
  split_exponent<S>(x, e, r);
  return S::fma(e, S::set(kLn2), log1p_polynomial<S>(r));
}

// exp(d) for d <= 0; the one-step reduction loses precision with |d|, as the weight of exp(d) in a sum falls. Below -87
// it stays at exp(-87). NaN in, NaN out.
template <class S>
MGT_INLINE typename S::F exp_nonpositive(typename S::F d) {
  using F = typename S::F;
  d = S::max(S::set(-87.0f), d);
  const F log2e = S::set(1.44269502162933349609375f);
  // adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa, and 127 more makes it an exponent
  const F magic = S::set(12582912.0f + 127.0f);
  const F shifted = S::fma(d, log2e, magic);
  const F r = S::fms(d, log2e, S::sub(shifted, magic));
  F p = S::set(0.0013264729641377926f);
  p = S::fma(p, r, S::set(0.009671512991189957f));
  p = S::fma(p, r, S::set(0.05550733581185341f));
  p = S::fma(p, r, S::set(0.24022242426872253f));
  p = S::fma(p, r, S::set(0.6931470036506653f));
  p = S::fma(p, r, S::set(1.0f));
  return S::scale_by_power_of_two(p, shifted);
}

constexpr float kTwoPow32 = 4294967296.0f;
constexpr float kTwoPowMinus32 = 1.0f / kTwoPow32;

// w = (word + 1/2) 2^-32: small words keep all their bits, so the tail at w -> 0 is dense
template <class S>
MGT_INLINE typename S::F uniform(typename S::U word) {
  return S::fma(S::uint_to_float(word), S::set(kTwoPowMinus32), S::set(0.5f * kTwoPowMinus32));
}

// g = -log(E), E = -log1p(-w): Gumbel(0, 1) within [-3.2, 22.9]; the winning tail sits at small w
template <class S>
MGT_INLINE typename S::F gumbel(typename S::U word) {
  using F = typename S::F;
  const F w = uniform<S>(word);
  // log1p(-w): directly for w < 1/4, through 1 - w (exact from the complement of the word) above
  F e, r;
  split_exponent<S>(uniform<S>(S::bit_xor(word, S::set_u(0xffffffffu))), e, r);
  const auto direct = S::less(w, S::set(0.25f));
  e = S::select(direct, S::set(0.0f), e);
  r = S::select(direct, S::sub(S::set(0.0f), w), r);
  const F log1p = S::fma(e, S::set(kLn2), log1p_polynomial<S>(r));
  return S::sub(S::set(0.0f), log_f32<S>(S::sub(S::set(0.0f), log1p)));
}

// Box-Muller: two words give two independent N(0, 1) values, |value| < 6.77
template <class S>
MGT_INLINE void gaussian_pair(typename S::U word_radius, typename S::U word_angle, typename S::F& first,
                              typename S::F& second) {
  using F = typename S::F;
  using U = typename S::U;
  const F radius = S::sqrt(S::mul(S::set(-2.0f), log_f32<S>(uniform<S>(word_radius))));
  // angle = 2 pi word / 2^32 = quadrant pi/2 + x, |x| <= pi/4, split in integers and so without rounding
  const U quadrant = S::template shift_right<30>(S::add_u(word_angle, S::set_u(0x20000000u)));
  const F x = S::mul(S::int_to_float(S::sub_u(word_angle, S::template shift_left<30>(quadrant))),
                     S::set(1.4629180792671596e-9f));
  const F x2 = S::mul(x, x);
  F sine = S::fma(S::set(-0.00019515282474458218f), x2, S::set(0.00833216030150652f));
  sine = S::fma(sine, x2, S::set(-0.16666655242443085f));
  sine = S::fma(S::mul(sine, x2), x, x);
  F cosine = S::fma(S::set(2.44331567955669e-05f), x2, S::set(-0.0013887316454201937f));
  cosine = S::fma(cosine, x2, S::set(0.04166664555668831f));
  cosine = S::fma(cosine, x2, S::set(-0.5f));
  cosine = S::fma(cosine, x2, S::set(1.0f));
  // quadrants 1 and 3 exchange sine and cosine; the sign bits follow the quadrant
  const auto odd = S::test_bit(quadrant, 1u);
  const U cosine_sign = S::template shift_left<30>(S::bit_and(S::add_u(quadrant, S::set_u(1u)), S::set_u(2u)));
  const U sine_sign = S::template shift_left<30>(S::bit_and(quadrant, S::set_u(2u)));
  first = S::mul(radius, S::from_bits(S::bit_xor(S::bits(S::select(odd, sine, cosine)), cosine_sign)));
  second = S::mul(radius, S::from_bits(S::bit_xor(S::bits(S::select(odd, cosine, sine)), sine_sign)));
}

}  // namespace
}  // namespace mgt
