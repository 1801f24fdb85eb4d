// match_tokens, written once against the lanes of simd_*.h.
//
// Bound by: the fused multiply-adds, one for each source, destination and channel. The products never become a matrix:
// six sources stay in registers against a panel of 16 destinations, and of the sums only the largest is kept. Each sum
// runs over the channels in order, so that its bits do not depend on how many are formed side by side.
#pragma once

namespace mgt {
namespace {

inline const void* token_address(const mgt_match_tokens_args& a, int64_t sample, int64_t position) {
  const int64_t size = a.dtype == MGT_FLOAT32 ? 4 : 2;
  return static_cast<const char*>(a.x) + (sample * a.stride_sample + position * a.stride_token) * size;
}

// calls store(c, vector) for the channels c, c + 1, ... of a token, 16 at a time; zeros past the last
template <class S, class Store>
MGT_INLINE void for_each_channel(const mgt_match_tokens_args& a, int64_t sample, int64_t position, const Store& store) {
  const void* token = token_address(a, sample, position);
  for_dtype(a.dtype, [&](auto dtype) MGT_INLINE_LAMBDA {
    using Element = std::conditional_t<dtype.value == MGT_FLOAT32, float, uint16_t>;
    int64_t c = 0;
    for (; c + 16 <= a.num_channels; c += 16) store(c, load_elements<S, dtype.value>(token, c));
    if (c == a.num_channels) return;
    Element rest[16] = {};
    std::copy(static_cast<const Element*>(token) + c, static_cast<const Element*>(token) + a.num_channels, rest);
    store(c, load_elements<S, dtype.value>(rest, 0));
  });
}

MGT_INLINE float inverse_norm(float sum_of_squares) {
  const float norm = __builtin_sqrtf(sum_of_squares);
  return norm > 0.0f ? 1.0f / norm : 0.0f;
}

template <class S>
int64_t pack_panel(const MatchCall& call, int64_t sample, const MatchSample& state, int64_t panel) {
  using F = typename S::F;
  const mgt_match_tokens_args& a = call.args;
  const int32_t* positions = state.destinations + panel * kPanelTokens;
  float* packed = state.panels + panel * kPanelTokens * a.num_channels;
  const int64_t size = a.dtype == MGT_FLOAT32 ? 4 : 2;
  F sum = S::set(0.0f);
  for (int64_t c = 0; c < a.num_channels; c += 16) {
    const int64_t count = std::min<int64_t>(16, a.num_channels - c);
    F rows[16];
    for (int64_t i = 0; i < kPanelTokens; ++i) {
      const char* token = static_cast<const char*>(token_address(a, sample, positions[i])) + c * size;
      for_dtype(a.dtype, [&](auto dtype) MGT_INLINE_LAMBDA {
        if (count == 16) {
          rows[i] = load_elements<S, dtype.value>(token, 0);
          return;
        }
        char rest[64] = {};
        std::copy(token, token + count * size, rest);
        rows[i] = load_elements<S, dtype.value>(rest, 0);
      });
    }
    S::transpose(rows);
    for (int64_t i = 0; i < count; ++i) {
      S::store(packed + (c + i) * kPanelTokens, rows[i]);
      sum = S::fma(rows[i], rows[i], sum);
    }
  }
  float sums[16];
  S::store(sums, sum);
  int64_t bad = -1;
  for (int64_t i = kPanelTokens - 1; i >= 0; --i) {
    if (!(sums[i] <= std::numeric_limits<float>::max())) bad = positions[i];
    state.inverse[panel * kPanelTokens + i] = inverse_norm(sums[i]);
  }
  return bad;
}

// the largest product of a source so far in each lane, and the panel that it is in
struct Leader {
  alignas(64) float score[16];
  alignas(64) uint32_t panel[16];
};

// the products of a tile and of kPanels neighbouring panels so far
template <int kPanels>
struct Sums {
  alignas(64) float sum[kTileTokens][kPanels][16];
};

// Goes on with the sums of a tile over `count` channels, from which the pointers start. A function of its own: inlined,
// it loses registers to the loops around it, and its sums go to the stack.
template <class S, int kPanels>
MGT_NOINLINE void add_channels(const float* tile, int64_t tile_stride, const float* panels, int64_t panel_floats,
                               int64_t count, Sums<kPanels>& sums) {
  using F = typename S::F;
  F sum[kTileTokens][kPanels];
#pragma GCC unroll 6
  for (int i = 0; i < kTileTokens; ++i)
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) sum[i][p] = S::load(sums.sum[i][p]);
  for (int64_t c = 0; c < count; ++c) {
    F to[kPanels];
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) to[p] = S::load(panels + p * panel_floats + c * kPanelTokens);
#pragma GCC unroll 6
    for (int i = 0; i < kTileTokens; ++i) {
      const F from = S::set(tile[i * tile_stride + c]);
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        sum[i][p] = S::fma(from, to[p], sum[i][p]);
        S::hold(sum[i][p]);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTileTokens; ++i)
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) S::store(sums.sum[i][p], sum[i][p]);
}

// Lets the cosines of a tile, whose sums are whole, take the lead where they are larger.
template <class S, int kPanels>
MGT_INLINE void take_lead(const MatchSample& state, int64_t first_panel, const Sums<kPanels>& sums, Leader* leaders) {
  using F = typename S::F;
  for (int i = 0; i < kTileTokens; ++i) {
    F best = S::load(leaders[i].score);
    F where = S::from_bits(S::load_u(leaders[i].panel));
    for (int p = 0; p < kPanels; ++p) {
      const F score = S::mul(S::load(sums.sum[i][p]), S::load(state.inverse + (first_panel + p) * kPanelTokens));
      const auto better = S::less(best, score);
      best = S::select(better, score, best);
      where = S::select(better, S::from_bits(S::set_u(static_cast<uint32_t>(first_panel + p))), where);
    }
    S::store(leaders[i].score, best);
    S::store_u(leaders[i].panel, S::bits(where));
  }
}

template <class S, int kPanels>
int64_t compare_sources(const MatchCall& call, int64_t sample, const MatchSample& state, int64_t begin, int64_t end,
                        float* tile) {
  static_assert(kPanelPair % kPanels == 0, "panels come in pairs");
  const mgt_match_tokens_args& a = call.args;
  const int64_t count = end - begin, num_tiles = (count + kTileTokens - 1) / kTileTokens;
  Leader leaders[kSourcesAtOnce];
  for (int64_t i = 0; i < num_tiles * kTileTokens; ++i) {
    // rows past the end are compared, and never looked at
    const int64_t source = state.sources[std::min(begin + i, end - 1)];
    float* row = tile + i * call.tile_stride;
    for_each_channel<S>(a, sample, source, [&](int64_t c, typename S::F x) MGT_INLINE_LAMBDA { S::store(row + c, x); });
    std::fill(leaders[i].score, leaders[i].score + 16, -std::numeric_limits<float>::infinity());
    std::fill(leaders[i].panel, leaders[i].panel + 16, 0u);
  }
  for (int64_t panel = 0; panel < call.num_panels; panel += kPanels) {
    Sums<kPanels> sums[kTiles] = {};
    const int64_t panel_floats = kPanelTokens * a.num_channels;
    const float* panels = state.panels + panel * panel_floats;
    // so many channels of a panel and of the tiles stay in the first cache
    for (int64_t c = 0; c < a.num_channels; c += kChannelsAtOnce)
      for (int64_t t = 0; t < num_tiles; ++t)
        add_channels<S, kPanels>(tile + t * kTileTokens * call.tile_stride + c, call.tile_stride,
                                 panels + c * kPanelTokens, panel_floats, std::min(kChannelsAtOnce, a.num_channels - c),
                                 sums[t]);
    for (int64_t t = 0; t < num_tiles; ++t) take_lead<S, kPanels>(state, panel, sums[t], leaders + t * kTileTokens);
  }

  int64_t bad = -1;
  for (int64_t first = num_tiles * kTileTokens - kTileTokens; first >= 0; first -= kTileTokens) {
    // the norms of a tile, whose sums wait for each other less than those of one source
    float sum[kTileTokens] = {};
    for (int64_t c = 0; c < a.num_channels; ++c)
      for (int i = 0; i < kTileTokens; ++i) {
        const float x = tile[(first + i) * call.tile_stride + c];
        sum[i] = Lane1::fma(x, x, sum[i]);
      }
    for (int64_t i = std::min(kTileTokens, count - first) - 1; i >= 0; --i) {
      if (!(sum[i] <= std::numeric_limits<float>::max())) bad = state.sources[begin + first + i];
      const Leader& leader = leaders[first + i];
      int lane = 0;
      for (int other = 1; other < 16; ++other) {
        const bool tied = leader.score[other] == leader.score[lane];
        if (leader.score[other] > leader.score[lane] || (tied && leader.panel[other] < leader.panel[lane]))
          lane = other;
      }
      state.cosine[begin + first + i] = leader.score[lane] * inverse_norm(sum[i]);
      state.nearest[begin + first + i] = static_cast<int32_t>(leader.panel[lane] * kPanelTokens) + lane;
    }
  }
  return bad;
}

}  // namespace
}  // namespace mgt
