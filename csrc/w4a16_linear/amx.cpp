#include "isa.h"
#include "w4a16_linear/op.h"

#if MGT_X86
MGT_TARGET_AMX_BEGIN
#include "simd_scalar.h"
#include "simd_avx512.h"
#include "int4_linear/amx.h"
#include "halves.h"
#include "int4_linear/panel.h"
#include "w4a16_linear/body.h"
#include "w4a16_linear/pack_bf16.h"

namespace mgt {
namespace {

struct AmxTile {
  using Row = uint16_t;
  using Session = TileSession;
  static constexpr int64_t kBlock = 64;
  static constexpr int64_t kTileRows = 16;
  static constexpr int64_t kStride = kPanelOutputs * sizeof(float);
  static MGT_INLINE __m512i pack(__m512 first, __m512 second) { return pack_bfloat16(first, second); }

  template <bool kTwoRows>
  static MGT_INLINE void multiply(const W4A16Pairs<uint16_t>& pairs, int64_t column) {
    float* results = pairs.results + column;
    MGT_TILE_BARRIER();
    _tile_loadd(0, results, kStride);
    _tile_loadd(1, results + 16, kStride);
    if (kTwoRows) {
      _tile_loadd(2, results + 16 * kPanelOutputs, kStride);
      _tile_loadd(3, results + 16 * kPanelOutputs + 16, kStride);
    }
    for (int64_t pair = 0; pair < pairs.num_pairs; pair += 16) {
      _tile_loadd(4, pairs.x + 32 * pair, 64);
      _tile_loadd(6, pairs.panel + pair * kPanelOutputs + column, 4 * kPanelOutputs);
      _tile_loadd(7, pairs.panel + pair * kPanelOutputs + column + 16, 4 * kPanelOutputs);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (kTwoRows) {
        _tile_loadd(5, pairs.x + 16 * pairs.x_stride + 32 * pair, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, results, kStride);
    _tile_stored(1, results + 16, kStride);
    if (kTwoRows) {
      _tile_stored(2, results + 16 * kPanelOutputs, kStride);
      _tile_stored(3, results + 16 * kPanelOutputs + 16, kStride);
    }
  }

  static void add(W4A16Pairs<uint16_t> pairs, int64_t num_rows) {
    for (; num_rows > 0; num_rows -= 32) {
      add_32(pairs, num_rows);
      pairs.x += 32 * pairs.x_stride;
      pairs.results += 32 * kPanelOutputs;
    }
  }

  static MGT_INLINE void add_32(const W4A16Pairs<uint16_t>& pairs, int64_t num_rows) {
    for (int64_t column = 0; column < kPanelOutputs; column += 32) {
      if (num_rows > 16)
        multiply<true>(pairs, column);
      else
        multiply<false>(pairs, column);
    }
  }
};

}  // namespace

const Int4LinearKernel w4a16_linear_amx = {prepare_w4a16<Avx512, uint16_t, 16>, multiply_w4a16<Avx512, AmxTile>, 2, 2};

}  // namespace mgt

MGT_TARGET_END
#endif
