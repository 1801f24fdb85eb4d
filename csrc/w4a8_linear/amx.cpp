#include "isa.h"
#include "w4a8_linear/op.h"

#if MGT_X86
MGT_TARGET_AMX_BEGIN
#include "simd_scalar.h"
#include "simd_avx512.h"
#include "int4_linear/amx.h"
#include "int4_linear/panel.h"
#include "w4a8_linear/body.h"
#include "w4a8_linear/vnni.h"

namespace mgt {
namespace {

// The zero points are taken off the weights as they are unpacked. 32 x 32 sums at a time leave the tile registers once
// a group, to be added in float32.
struct AmxTile {
  static int64_t tile_bytes(int64_t group_size) { return group_size % 64 == 0 ? 64 : 32; }
  struct Session : TileSession {
    explicit Session(int64_t group_size) : TileSession(tile_bytes(group_size)) {}
  };
  static constexpr bool kSignedWeights = true;
  static constexpr int64_t kBlock = 32;
  static constexpr int64_t kTileRows = 16;
  // in each byte
  static int32_t zero_point(int32_t value) { return value * 0x01010101; }

  // from the first input of the group to its input k, in tiles of 16 rows
  static MGT_INLINE int64_t row_step(const W4A8Group& group, int64_t k) {
    const int64_t first = group.first_input % 64;
    return row_offset<int8_t, 16>(0, first + k, 0) - first;
  }

  template <bool kTwoRows>
  static MGT_INLINE void multiply(const W4A8Group& group, int64_t column) {
    const int64_t step = tile_bytes(group.group_size);
    _tile_zero(0);
    _tile_zero(1);
    if (kTwoRows) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < 4 * group.num_quads; k += step) {
      const int8_t* x_q = group.x_q + row_step(group, k);
      _tile_loadd(4, x_q, 64);
      _tile_loadd(6, group.panel + (k * kPanelOutputs + 4 * column), 4 * kPanelOutputs);
      _tile_loadd(7, group.panel + (k * kPanelOutputs + 4 * column + 64), 4 * kPanelOutputs);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      if (kTwoRows) {
        _tile_loadd(5, x_q + 16 * group.x_stride, 64);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    }
    _tile_stored(0, group.sums, 32 * sizeof(int32_t));
    _tile_stored(1, group.sums + 16, 32 * sizeof(int32_t));
    if (kTwoRows) {
      _tile_stored(2, group.sums + 16 * 32, 32 * sizeof(int32_t));
      _tile_stored(3, group.sums + 16 * 32 + 16, 32 * sizeof(int32_t));
    }
  }

  static void add(const W4A8Group& group, int64_t num_rows) {
    for (int64_t column = 0; column < kPanelOutputs; column += 32) {
      if (num_rows > 16)
        multiply<true>(group, column);
      else
        multiply<false>(group, column);
      const __m512 scale0 = _mm512_load_ps(group.scale + column), scale1 = _mm512_load_ps(group.scale + column + 16);
      for (int64_t row = 0; row < num_rows; ++row) {
        float* result = group.results + row * kPanelOutputs + column;
        const int32_t* sums = group.sums + row * 32;
        const __m512 sum0 = _mm512_cvtepi32_ps(_mm512_load_si512(sums));
        const __m512 sum1 = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 16));
        _mm512_store_ps(result, _mm512_fmadd_ps(scale0, sum0, _mm512_load_ps(result)));
        _mm512_store_ps(result + 16, _mm512_fmadd_ps(scale1, sum1, _mm512_load_ps(result + 16)));
      }
    }
  }
};

// A tile register is mostly empty then, and its sums still leave it once a group: vector registers give the same bits
// sooner.
bool has_few_rows(const Int4LinearCall& call) { return call.args.num_rows <= 8; }

int64_t prepare(const Int4LinearCall& call, int64_t begin, int64_t end) {
  return has_few_rows(call) ? prepare_w4a8<Avx512>(call, begin, end)
                            : prepare_w4a8<Avx512, 16, false>(call, begin, end);
}

void multiply(const Int4LinearCall& call, int64_t panel, int64_t begin, int64_t end, void* scratch) {
  if (has_few_rows(call))
    multiply_w4a8<Avx512, VnniTile>(call, panel, begin, end, scratch);
  else
    multiply_w4a8<Avx512, AmxTile>(call, panel, begin, end, scratch);
}

}  // namespace

const Int4LinearKernel w4a8_linear_amx = {prepare, multiply, 1, 1};

}  // namespace mgt

MGT_TARGET_END
#endif
