// match_tokens: what an entry of an instruction set works on.
#pragma once

#include "mgt_kernels.h"

namespace mgt {

// destinations side by side in the lanes of a panel, and sources that a kernel compares with it at once
constexpr int64_t kPanelTokens = 16;
constexpr int64_t kTileTokens = 6;
// tiles that meet a panel while it is in the cache
constexpr int64_t kTiles = 4;
constexpr int64_t kSourcesAtOnce = kTiles * kTileTokens;
constexpr int64_t kChannelsAtOnce = 256;
// panels come in pairs, which kernels with large registers take together
constexpr int64_t kPanelPair = 2;

// One sample: lists of its tokens, and what is known of them so far. Everything lies in the workspace.
struct MatchSample {
  // positions in rising order; past num_destinations the last one again, up to a whole pair of panels
  int32_t* destinations;
  int32_t* sources;
  // (panels, channels, 16): the destinations' channels, float32
  float* panels;
  // (16 panels): 1 / norm of a destination, 0 where the norm is
  float* inverse;
  // (num_sources): the largest cosine, and the index in destinations of the first that has it
  float* cosine;
  int32_t* nearest;
};

struct MatchCall {
  const mgt_match_tokens_args& args;
  int64_t num_destinations, num_sources, num_panels;
  // floats from row to row of a tile
  int64_t tile_stride;
};

struct MatchTokens {
  // Fills panel `panel` of a sample; returns the first position whose channels have no finite sum of squares, or -1.
  int64_t (*pack)(const MatchCall& call, int64_t sample, const MatchSample& state, int64_t panel);
  // Compares the sources [begin, end), at most kSourcesAtOnce, with all panels; `tile` is a thread's own. Returns as
  // pack.
  int64_t (*compare)(const MatchCall& call, int64_t sample, const MatchSample& state, int64_t begin, int64_t end,
                     float* tile);
};

extern const MatchTokens match_tokens_scalar, match_tokens_avx2, match_tokens_avx512;

}  // namespace mgt
