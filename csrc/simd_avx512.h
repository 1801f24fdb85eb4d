// Sixteen lanes in one 512-bit register. Include inside the AVX-512 target region.
#pragma once

namespace mgt {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  using F = __m512;
  using U = __m512i;
  using M = __mmask16;
  static MGT_INLINE void hold(F& a) { MGT_HOLD(a); }
  static MGT_INLINE F set(float x) { return _mm512_set1_ps(x); }
  static MGT_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static MGT_INLINE F load(const uint16_t* p, mgt_dtype dtype) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if (dtype == MGT_FLOAT16) return _mm512_cvtph_ps(raw);
    // one permutation puts each value into the upper half of its lane and zero below
    const __m512i upper_halves = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5,
                                                  0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, upper_halves, _mm512_castsi256_si512(raw)));
  }
  static MGT_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  // past the caches where p is on a line; not ordered with other stores before fence()
  static MGT_INLINE void stream(float* p, F a) {
    if (reinterpret_cast<std::uintptr_t>(p) % 64 == 0)
      _mm512_stream_ps(p, a);
    else
      _mm512_storeu_ps(p, a);
  }
  static MGT_INLINE void fence() { _mm_sfence(); }
  static MGT_INLINE void store_u(uint32_t* p, U a) { _mm512_storeu_si512(p, a); }
  static MGT_INLINE U load_u(const void* p) { return _mm512_loadu_si512(p); }
  static MGT_INLINE U load_u16(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // in the low halves of the lanes
  static MGT_INLINE U float16_bits(F a) { return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
  static MGT_INLINE void store_low16(uint16_t* p, U a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a));
  }
  static MGT_INLINE void stream_low16(uint16_t* p, U a) {
    if (reinterpret_cast<std::uintptr_t>(p) % 32 != 0) return store_low16(p, a);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a));
  }
  static MGT_INLINE void store_low8(int8_t* p, U a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static MGT_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static MGT_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static MGT_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static MGT_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static MGT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static MGT_INLINE F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
  static MGT_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static MGT_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static MGT_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static MGT_INLINE M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static MGT_INLINE M equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static MGT_INLINE M not_below(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
  static MGT_INLINE M is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  static MGT_INLINE uint32_t to_bits(M m) { return m; }
  static MGT_INLINE M mask_and(M a, M b) { return _mm512_kand(a, b); }
  static MGT_INLINE M mask_or(M a, M b) { return _mm512_kor(a, b); }
  // Stores the lanes of a mask side by side, and anything behind them, 16 in all; returns how many it has.
  static MGT_INLINE int compress(float* p, F a, M m) {
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(m, a));
    return __builtin_popcount(m);
  }
  static MGT_INLINE F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
  static MGT_INLINE U bits(F a) { return _mm512_castps_si512(a); }
  static MGT_INLINE F from_bits(U u) { return _mm512_castsi512_ps(u); }
  static MGT_INLINE F uint_to_float(U u) { return _mm512_cvtepu32_ps(u); }
  static MGT_INLINE F int_to_float(U u) { return _mm512_cvtepi32_ps(u); }
  static MGT_INLINE U to_uint(F a) { return _mm512_cvttps_epu32(a); }
  // p 2^n, 127 + n the integer in the low bits of shifted; NaN where p is
  static MGT_INLINE F scale_by_power_of_two(F p, F shifted) {
    return mul(p, from_bits(_mm512_slli_epi32(bits(shifted), 23)));
  }
  static MGT_INLINE U set_u(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static MGT_INLINE U sequence(uint32_t first) {
    return _mm512_add_epi32(set_u(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  static MGT_INLINE U add_u(U a, U b) { return _mm512_add_epi32(a, b); }
  static MGT_INLINE U sub_u(U a, U b) { return _mm512_sub_epi32(a, b); }
  // as signed integers
  static MGT_INLINE U max_u(U a, U b) { return _mm512_max_epi32(a, b); }
  static MGT_INLINE int32_t reduce_max(U a) { return _mm512_reduce_max_epi32(a); }
  // a sum of at most kMaxSummands integers of 2^31 at most: of the even and of the odd lanes
  struct Sum {
    __m512i even, odd;
  };
  static MGT_INLINE Sum no_sum() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  static MGT_INLINE void add_to(Sum& sum, U a) {
    sum.even = _mm512_add_epi64(sum.even, _mm512_and_si512(a, _mm512_set1_epi64(0xffffffff)));
    sum.odd = _mm512_add_epi64(sum.odd, _mm512_srli_epi64(a, 32));
  }
  static MGT_INLINE uint64_t total(const Sum& sum) {
    return static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(sum.even, sum.odd)));
  }
  static MGT_INLINE int32_t reduce_add(U a) { return _mm512_reduce_add_epi32(a); }
  static MGT_INLINE U bit_and(U a, U b) { return _mm512_and_si512(a, b); }
  static MGT_INLINE U bit_or(U a, U b) { return _mm512_or_si512(a, b); }
  static MGT_INLINE U bit_xor(U a, U b) { return _mm512_xor_si512(a, b); }
  static MGT_INLINE U bit_xor3(U a, U b, U c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  template <int n>
  static MGT_INLINE U shift_left(U a) {
    return _mm512_slli_epi32(a, n);
  }
  template <int n>
  static MGT_INLINE U shift_right(U a) {
    return _mm512_srli_epi32(a, n);
  }
  template <int n>
  static MGT_INLINE U shift_right_signed(U a) {
    return _mm512_srai_epi32(a, n);
  }
  static MGT_INLINE M test_bit(U a, uint32_t bit) { return _mm512_test_epi32_mask(a, set_u(bit)); }
  static MGT_INLINE void mulhilo(U a, uint32_t m, U& hi, U& lo) {
    const U factor = _mm512_set1_epi64(static_cast<int64_t>(m));
    const U even = _mm512_mul_epu32(a, factor);
    const U odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
    // even lanes of hi come from even's upper halves, odd lanes of lo from odd's lower halves: one masked shuffle each
    hi = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_CDAB);
    lo = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CDAB);
  }
  static MGT_INLINE void transpose(F rows[16]) {
    F t[16];
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      const auto pd = [&](int k) { return _mm512_castps_pd(t[4 * i + k]); };
      rows[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(0), pd(2)));
      rows[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(0), pd(2)));
      rows[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(1), pd(3)));
      rows[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(1), pd(3)));
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
      rows[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      rows[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    }
  }
};

}  // namespace
}  // namespace mgt
