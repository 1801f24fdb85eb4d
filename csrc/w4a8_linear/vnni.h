// Sums of a group by the 32-bit dot product of bytes. Include inside a target region with AVX512-VNNI.
#pragma once

namespace mgt {
namespace {

// unsigned weights times signed activations; the sums start from what the zero points take away
struct VnniTile {
  using Session = NoSession;
  static constexpr bool kSignedWeights = false;
  static constexpr int64_t kTileRows = 1;
  static constexpr int64_t kBlock = 48;
  static int64_t num_groups(int64_t) { return 1; }
  static int32_t zero_point(int32_t value) { return negated_zero_point(value); }

  template <int R>
  static MGT_INLINE void add_rows(const W4A8Groups& group, int64_t first) {
    __m512i sum[R][4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i zero_point = _mm512_load_si512(group.zero_point + 16 * c);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
        sum[r][c] = _mm512_madd_epi16(
            zero_point, _mm512_set1_epi32(static_cast<int>(group.row_sums[(first + r) * group.sums_stride])));
    }
    const int8_t* x_q = group.x_q + first * group.x_stride;
    const int64_t x_stride = group.x_stride;
    const uint8_t* panel = group.panel;
    int64_t quads = group.num_quads;
    // at least once: a loop that might not run keeps a second copy of every sum
    do {
      const __m512i w0 = _mm512_load_si512(panel), w1 = _mm512_load_si512(panel + 64);
      const __m512i w2 = _mm512_load_si512(panel + 128), w3 = _mm512_load_si512(panel + 192);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        int32_t word;
        std::memcpy(&word, x_q + r * x_stride, 4);
        const __m512i x = _mm512_set1_epi32(word);
        sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], w0, x);
        sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], w1, x);
        sum[r][2] = _mm512_dpbusd_epi32(sum[r][2], w2, x);
        sum[r][3] = _mm512_dpbusd_epi32(sum[r][3], w3, x);
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        MGT_HOLD(sum[r][0]);
        MGT_HOLD(sum[r][1]);
        MGT_HOLD(sum[r][2]);
        MGT_HOLD(sum[r][3]);
      }
      panel += 4 * kPanelOutputs;
      x_q += 4;
    } while (--quads > 0);
    const float* scales = group.scale;
    float* results = group.results + first * kPanelOutputs;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512 scale = _mm512_load_ps(scales + 16 * c);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        float* result = results + r * kPanelOutputs + 16 * c;
        _mm512_store_ps(result, _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum[r][c]), _mm512_load_ps(result)));
      }
    }
  }

  static void add(const W4A8Groups& group, int64_t num_rows) {
    for_rows<6>(num_rows, [&](auto rows, int64_t first) { add_rows<decltype(rows)::value>(group, first); });
  }
};

}  // namespace
}  // namespace mgt
