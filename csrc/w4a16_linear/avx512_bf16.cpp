#include "isa.h"
#include "w4a16_linear/op.h"

#if MGT_X86
MGT_TARGET_AVX512_BF16_BEGIN
#include "simd_scalar.h"
#include "simd_avx512.h"
#include "halves.h"
#include "int4_linear/panel.h"
#include "w4a16_linear/body.h"
#include "w4a16_linear/pack_bf16.h"

namespace mgt {
namespace {

struct Bf16Tile {
  using Row = uint16_t;
  using Session = NoSession;
  static constexpr int64_t kBlock = 24;
  static constexpr int64_t kTileRows = 1;
  static MGT_INLINE __m512i pack(__m512 first, __m512 second) { return pack_bfloat16(first, second); }
  static MGT_INLINE __m512 dot(__m512 sum, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }

  template <int R>
  static MGT_INLINE void add_rows(const W4A16Pairs<uint16_t>& pairs, int64_t first) {
    __m512 sum[R][4];
    float* results = pairs.results + first * kPanelOutputs;
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_load_ps(results + r * kPanelOutputs + 16 * c);
    const uint16_t* x = pairs.x + first * pairs.x_stride;
    const uint32_t* panel = pairs.panel;
    for (int64_t pair = 0; pair < pairs.num_pairs; ++pair, panel += kPanelOutputs, x += 2) {
      const __m512i w0 = _mm512_load_si512(panel), w1 = _mm512_load_si512(panel + 16);
      const __m512i w2 = _mm512_load_si512(panel + 32), w3 = _mm512_load_si512(panel + 48);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        int32_t word;
        std::memcpy(&word, x + r * pairs.x_stride, 4);
        const __m512i both = _mm512_set1_epi32(word);
        sum[r][0] = dot(sum[r][0], w0, both);
        sum[r][1] = dot(sum[r][1], w1, both);
        sum[r][2] = dot(sum[r][2], w2, both);
        sum[r][3] = dot(sum[r][3], w3, both);
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        MGT_HOLD(sum[r][0]);
        MGT_HOLD(sum[r][1]);
        MGT_HOLD(sum[r][2]);
        MGT_HOLD(sum[r][3]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) _mm512_store_ps(results + r * kPanelOutputs + 16 * c, sum[r][c]);
  }

  static void add(const W4A16Pairs<uint16_t>& pairs, int64_t num_rows) {
    for_rows<6>(num_rows, [&](auto rows, int64_t first) { add_rows<decltype(rows)::value>(pairs, first); });
  }
};

}  // namespace

const Int4LinearKernel w4a16_linear_avx512_bf16 = {prepare_w4a16<Avx512, uint16_t>, multiply_w4a16<Avx512, Bf16Tile>, 2,
                                                   2};

}  // namespace mgt

MGT_TARGET_END
#endif
