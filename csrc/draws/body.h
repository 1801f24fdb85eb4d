// philox and gaussian, written once against the lanes of simd_*.h.
//
// Bound by: Philox's multiplications; gaussian also by Box-Muller.
#pragma once

namespace mgt {
namespace {

inline PhiloxKey key_of(const DrawPoint& point) {
  return PhiloxKey(static_cast<uint64_t>(point.seed), point.position, point.step, point.stream);
}

template <class S>
void draw_words(const DrawPoint& point, int64_t first_block, int64_t num_blocks, uint32_t* words) {
  const PhiloxKey key = key_of(point);
  for (int64_t first = 0; first < num_blocks; first += 16) {
    const PhiloxWords<S> drawn = philox<S>(S::sequence(static_cast<uint32_t>(first_block + first)), key);
    for (int w = 0; w < 4; ++w) {
      uint32_t word[16];
      S::store_u(word, drawn.word[w]);
      std::copy(word, word + std::min<int64_t>(16, num_blocks - first), words + w * num_blocks + first);
    }
  }
}

template <class S>
void draw_gaussian(const DrawPoint& point, int64_t num_tokens, float* noise) {
  alignas(64) float tile[kTileWidth];
  for (int64_t first_column = 0; first_column < num_tokens; first_column += kTileWidth) {
    const int64_t width = std::min(kTileWidth, num_tokens - first_column);
    std::fill(tile, tile + kTileWidth, 0.0f);
    add_noise<S>(tile, width, first_column, key_of(point), 1.0f);
    std::copy(tile, tile + width, noise + first_column);
  }
}

}  // namespace
}  // namespace mgt
