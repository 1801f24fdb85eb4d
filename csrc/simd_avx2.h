// Sixteen lanes in two 256-bit registers. Include inside the AVX2 target region.
#pragma once

namespace mgt {
namespace {

// for each mask of eight lanes, which ones it has, lowest first
struct LaneLists {
  alignas(64) uint8_t lanes[256][8];
};
constexpr LaneLists make_lane_lists() {
  LaneLists lists{};
  for (int mask = 0; mask < 256; ++mask) {
    int count = 0;
    for (int lane = 0; lane < 8; ++lane)
      if (mask >> lane & 1) lists.lanes[mask][count++] = static_cast<uint8_t>(lane);
  }
  return lists;
}
constexpr LaneLists kLaneLists = make_lane_lists();

struct Avx2 {
  static constexpr int kLanes = 16;
  struct F {
    __m256 lo, hi;
  };
  struct U {
    __m256i lo, hi;
  };
  struct M {
    __m256 lo, hi;
  };
  static MGT_INLINE void hold(F& a) {
    MGT_HOLD(a.lo);
    MGT_HOLD(a.hi);
  }
  static MGT_INLINE F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static MGT_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static MGT_INLINE F load(const uint16_t* p, mgt_dtype dtype) {
    const __m128i lo = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i hi = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8));
    if (dtype == MGT_FLOAT16) return {_mm256_cvtph_ps(lo), _mm256_cvtph_ps(hi)};
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(lo), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(hi), 16))};
  }
  static MGT_INLINE void store(float* p, F a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
  }
  // past the caches where p is on a line; not ordered with other stores before fence()
  static MGT_INLINE void stream(float* p, F a) {
    if (reinterpret_cast<std::uintptr_t>(p) % 64 != 0) return store(p, a);
    _mm256_stream_ps(p, a.lo);
    _mm256_stream_ps(p + 8, a.hi);
  }
  static MGT_INLINE void fence() { _mm_sfence(); }
  static MGT_INLINE void store_u(uint32_t* p, U a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
  }
  static MGT_INLINE U load_u(const void* p) {
    const auto* halves = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }
  static MGT_INLINE U load_u16(const uint16_t* p) {
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  // in the low halves of the lanes
  static MGT_INLINE U float16_bits(F a) {
    return {_mm256_cvtepu16_epi32(_mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT)),
            _mm256_cvtepu16_epi32(_mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT))};
  }
  static MGT_INLINE __m256i low16(U a) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    // packing works within 128-bit halves: the quarters come out in the order 0, 2, 1, 3
    const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(a.lo, low), _mm256_and_si256(a.hi, low));
    return _mm256_permute4x64_epi64(packed, 0xD8);
  }
  static MGT_INLINE void store_low16(uint16_t* p, U a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), low16(a)); }
  static MGT_INLINE void stream_low16(uint16_t* p, U a) {
    if (reinterpret_cast<std::uintptr_t>(p) % 32 != 0) return store_low16(p, a);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), low16(a));
  }
  static MGT_INLINE void store_low8(int8_t* p, U a) {
    const __m256i low = _mm256_set1_epi32(0xff);
    const __m256i words =
        _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(a.lo, low), _mm256_and_si256(a.hi, low)), 0xD8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
  static MGT_INLINE F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static MGT_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  static MGT_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static MGT_INLINE F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static MGT_INLINE F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  static MGT_INLINE F fms(F a, F b, F c) {
    return {_mm256_fmsub_ps(a.lo, b.lo, c.lo), _mm256_fmsub_ps(a.hi, b.hi, c.hi)};
  }
  static MGT_INLINE F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  static MGT_INLINE F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
  static MGT_INLINE F sqrt(F a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
  static MGT_INLINE M less(F a, F b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
  }
  static MGT_INLINE M equal(F a, F b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)};
  }
  static MGT_INLINE M not_below(F a, F b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_NLT_UQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_NLT_UQ)};
  }
  static MGT_INLINE M is_nan(F a) {
    return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
  }
  static MGT_INLINE uint32_t to_bits(M m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(m.lo)) | static_cast<uint32_t>(_mm256_movemask_ps(m.hi)) << 8;
  }
  static MGT_INLINE M mask_and(M a, M b) { return {_mm256_and_ps(a.lo, b.lo), _mm256_and_ps(a.hi, b.hi)}; }
  static MGT_INLINE M mask_or(M a, M b) { return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)}; }
  // Stores the lanes of a mask side by side, and anything behind them, 16 in all at most; returns how many it has.
  static MGT_INLINE int compress(float* p, F a, M m) {
    const int count = compress(p, a.lo, m.lo);
    return count + compress(p + count, a.hi, m.hi);
  }
  static MGT_INLINE int compress(float* p, __m256 a, __m256 m) {
    const int mask = _mm256_movemask_ps(m);
    const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneLists.lanes[mask]));
    _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(a, _mm256_cvtepu8_epi32(lanes)));
    return __builtin_popcount(static_cast<unsigned>(mask));
  }
  static MGT_INLINE F select(M m, F a, F b) {
    return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
  }
  static MGT_INLINE U bits(F a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
  static MGT_INLINE F from_bits(U u) { return {_mm256_castsi256_ps(u.lo), _mm256_castsi256_ps(u.hi)}; }
  // there is no unsigned conversion: both 16-bit halves convert exactly and one fma rounds their sum once
  static MGT_INLINE __m256 uint_to_float(__m256i u) {
    const __m256 upper = _mm256_cvtepi32_ps(_mm256_srli_epi32(u, 16));
    const __m256 lower = _mm256_cvtepi32_ps(_mm256_blend_epi16(u, _mm256_setzero_si256(), 0xAA));
    return _mm256_fmadd_ps(upper, _mm256_set1_ps(65536.0f), lower);
  }
  static MGT_INLINE F uint_to_float(U u) { return {uint_to_float(u.lo), uint_to_float(u.hi)}; }
  static MGT_INLINE F int_to_float(U u) { return {_mm256_cvtepi32_ps(u.lo), _mm256_cvtepi32_ps(u.hi)}; }
  // 2^31, which no signed integer is, comes as 0x80000000
  static MGT_INLINE U to_uint(F a) { return {_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi)}; }
  static MGT_INLINE F scale_by_power_of_two(F p, F shifted) { return mul(p, from_bits(shift_left<23>(bits(shifted)))); }
  static MGT_INLINE U set_u(uint32_t x) {
    return {_mm256_set1_epi32(static_cast<int>(x)), _mm256_set1_epi32(static_cast<int>(x))};
  }
  static MGT_INLINE U sequence(uint32_t first) {
    const __m256i start = _mm256_set1_epi32(static_cast<int>(first));
    return {_mm256_add_epi32(start, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
            _mm256_add_epi32(start, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
  }
  static MGT_INLINE U add_u(U a, U b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
  static MGT_INLINE U sub_u(U a, U b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
  // as signed integers
  static MGT_INLINE U max_u(U a, U b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
  static MGT_INLINE int32_t reduce_max(U a) {
    const __m256i eight = _mm256_max_epi32(a.lo, a.hi);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
  }
  // A sum of at most kMaxSummands integers of 2^31 at most: modulo 2^32, and without the lower halves of the integers,
  // whose own sum is less than 2^32.
  struct Sum {
    __m256i low, upper_halves;
  };
  static MGT_INLINE Sum no_sum() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static MGT_INLINE void add_to(Sum& sum, U a) {
    sum.low = _mm256_add_epi32(sum.low, _mm256_add_epi32(a.lo, a.hi));
    const __m256i halves = _mm256_add_epi32(_mm256_srli_epi32(a.lo, 16), _mm256_srli_epi32(a.hi, 16));
    sum.upper_halves = _mm256_add_epi32(sum.upper_halves, halves);
  }
  static MGT_INLINE uint64_t total(const Sum& sum) {
    uint32_t low[8], upper_halves[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), sum.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(upper_halves), sum.upper_halves);
    uint64_t total = 0;
    for (int lane = 0; lane < 8; ++lane) {
      const uint64_t upper = uint64_t{upper_halves[lane]} << 16;
      total += upper + static_cast<uint32_t>(low[lane] - upper);
    }
    return total;
  }
  static MGT_INLINE int32_t reduce_add(U a) {
    const __m256i eight = _mm256_add_epi32(a.lo, a.hi);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
  }
  static MGT_INLINE U bit_and(U a, U b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
  static MGT_INLINE U bit_or(U a, U b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
  static MGT_INLINE U bit_xor(U a, U b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
  static MGT_INLINE U bit_xor3(U a, U b, U c) { return bit_xor(bit_xor(a, b), c); }
  template <int n>
  static MGT_INLINE U shift_left(U a) {
    return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)};
  }
  template <int n>
  static MGT_INLINE U shift_right(U a) {
    return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)};
  }
  template <int n>
  static MGT_INLINE U shift_right_signed(U a) {
    return {_mm256_srai_epi32(a.lo, n), _mm256_srai_epi32(a.hi, n)};
  }
  static MGT_INLINE M test_bit(U a, uint32_t bit) {
    const __m256i wanted = _mm256_set1_epi32(static_cast<int>(bit));
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(a.lo, wanted), wanted)),
            _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(a.hi, wanted), wanted))};
  }
  static MGT_INLINE void mulhilo(__m256i a, __m256i factor, __m256i& hi, __m256i& lo) {
    const __m256i even = _mm256_mul_epu32(a, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
    hi = _mm256_blend_epi32(_mm256_shuffle_epi32(even, 0xB1), odd, 0xAA);
    lo = _mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xB1), 0xAA);
  }
  static MGT_INLINE void mulhilo(U a, uint32_t m, U& hi, U& lo) {
    const __m256i factor = _mm256_set1_epi64x(static_cast<int64_t>(m));
    mulhilo(a.lo, factor, hi.lo, lo.lo);
    mulhilo(a.hi, factor, hi.hi, lo.hi);
  }
  static MGT_INLINE void transpose8(__m256* rows[8]) {
    __m256 t[8], s[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(*rows[2 * i], *rows[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(*rows[2 * i], *rows[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      s[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      s[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
      s[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      s[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
      *rows[i] = _mm256_permute2f128_ps(s[i], s[i + 4], 0x20);
      *rows[i + 4] = _mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
    }
  }
  static MGT_INLINE void transpose(F rows[16]) {
    __m256* quarter[4][8];
    for (int i = 0; i < 8; ++i) {
      quarter[0][i] = &rows[i].lo, quarter[1][i] = &rows[i].hi;
      quarter[2][i] = &rows[i + 8].lo, quarter[3][i] = &rows[i + 8].hi;
    }
    for (auto& rows8 : quarter) transpose8(rows8);
    for (int i = 0; i < 8; ++i) std::swap(rows[i].hi, rows[i + 8].lo);
  }
};

}  // namespace
}  // namespace mgt
