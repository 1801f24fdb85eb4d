#include "isa.h"
#include "w4a8_linear/op.h"

#if MGT_X86
MGT_TARGET_AMX_BEGIN
#include "simd_scalar.h"
#include "simd_avx512.h"
#include "int4_linear/amx.h"
#include "halves.h"
#include "int4_linear/panel.h"
#include "w4a8_linear/body.h"
#include "w4a8_linear/vnni.h"

namespace mgt {
namespace {

// The zero points are taken off the weights as they are unpacked. 32 x 32 sums at a time leave the tile registers once
// a group, to be added in float32, a few groups at once.
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

  // 1 to 4: the sums of as many groups as have 128 inputs are added to the results at once
  static int64_t num_groups(int64_t group_size) { return std::max(int64_t{1}, 128 / group_size); }

  // from the first input of the groups to their input k, in tiles of 16 rows
  static MGT_INLINE int64_t row_step(const W4A8Groups& groups, int64_t k) {
    const int64_t first = groups.first_input % 64;
    return row_offset<int8_t, 16>(0, first + k, 0) - first;
  }

  // inputs [begin, end), which are of one group
  template <bool kTwoRows>
  static MGT_INLINE void multiply(const W4A8Groups& groups, int64_t begin, int64_t end, int64_t column, int32_t* sums) {
    const int64_t step = tile_bytes(groups.group_size);
    MGT_TILE_BARRIER();
    _tile_zero(0);
    _tile_zero(1);
    if (kTwoRows) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = begin; k < end; k += step) {
      const int8_t* x_q = groups.x_q + row_step(groups, k);
      const uint8_t* panel = groups.panel + (k * kPanelOutputs + 4 * column);
      _tile_loadd(4, x_q, 64);
      _tile_loadd(6, panel, 4 * kPanelOutputs);
      _tile_loadd(7, panel + 64, 4 * kPanelOutputs);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      if (kTwoRows) {
        _tile_loadd(5, x_q + 16 * groups.x_stride, 64);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    }
    _tile_stored(0, sums, 32 * sizeof(int32_t));
    _tile_stored(1, sums + 16, 32 * sizeof(int32_t));
    if (kTwoRows) {
      _tile_stored(2, sums + 16 * 32, 32 * sizeof(int32_t));
      _tile_stored(3, sums + 16 * 32 + 16, 32 * sizeof(int32_t));
    }
  }

  template <int kGroups>
  static MGT_INLINE void add_sums(const W4A8Groups& groups, int64_t num_rows, int64_t column) {
    __m512 scale[kGroups][2];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g)
      for (int half = 0; half < 2; ++half)
        scale[g][half] = _mm512_load_ps(groups.scale + g * kPanelOutputs + column + 16 * half);
    for (int64_t row = 0; row < num_rows; ++row) {
      float* result = groups.results + row * kPanelOutputs + column;
      __m512 sum0 = _mm512_load_ps(result), sum1 = _mm512_load_ps(result + 16);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        const int32_t* sums = groups.sums + (g * kBlock + row) * 32;
        sum0 = _mm512_fmadd_ps(scale[g][0], _mm512_cvtepi32_ps(_mm512_load_si512(sums)), sum0);
        sum1 = _mm512_fmadd_ps(scale[g][1], _mm512_cvtepi32_ps(_mm512_load_si512(sums + 16)), sum1);
      }
      _mm512_store_ps(result, sum0);
      _mm512_store_ps(result + 16, sum1);
    }
  }

  static void add(const W4A8Groups& groups, int64_t num_rows) {
    const int64_t num_inputs = 4 * groups.num_quads;
    for (int64_t column = 0; column < kPanelOutputs; column += 32) {
      for (int64_t g = 0; g < groups.num_groups; ++g) {
        const int64_t begin = g * groups.group_size, end = std::min(begin + groups.group_size, num_inputs);
        int32_t* sums = groups.sums + g * kBlock * 32;
        if (num_rows > 16)
          multiply<true>(groups, begin, end, column, sums);
        else
          multiply<false>(groups, begin, end, column, sums);
      }
      switch (groups.num_groups) {
        case 1: add_sums<1>(groups, num_rows, column); break;
        case 2: add_sums<2>(groups, num_rows, column); break;
        case 3: add_sums<3>(groups, num_rows, column); break;
        default: add_sums<4>(groups, num_rows, column);
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
