// Gaussian noise on a tile of logits: column c of a position takes its word of stream 1 (philox.h), words 0 and 1 of a
// block make one Box-Muller pair and words 2 and 3 the other.
#pragma once

namespace mgt {
namespace {

template <class S>
void add_noise(float* tile, int64_t width, int64_t first_column, const PhiloxKey& key, float noise_scale) {
  using F = typename S::F;
  const F scale = S::set(noise_scale);
  const int64_t words = std::min(width, kWordWidth);
  for (int64_t k = 0; k < words; k += 16) {
    const PhiloxWords<S> words4 = philox<S>(S::sequence(static_cast<uint32_t>(first_column / 4 + k)), key);
    for (int pair = 0; pair < 4 && pair * kWordWidth + k < width; pair += 2) {
      F noise[2];
      gaussian_pair<S>(words4.word[pair], words4.word[pair + 1], noise[0], noise[1]);
      for (int i = 0; i < 2 && (pair + i) * kWordWidth + k < width; ++i) {
        float* logits = tile + (pair + i) * kWordWidth + k;
        S::store(logits, S::fma(scale, noise[i], S::load(logits)));
      }
    }
  }
}

}  // namespace
}  // namespace mgt
