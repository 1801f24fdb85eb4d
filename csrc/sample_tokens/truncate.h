// What a truncated draw keeps of a row: the tokens whose logit is at least a bound, which top_k, top_p and min_p give.
//
// The bound is one of the row's logits, found without a sort and without rounding: top_k counts tokens, top_p adds
// exp(l - max) in whole units of 2^-31. So it depends neither on the order of the additions nor on how it is looked
// for, and every instruction set finds the same. The row waits in its thread's tiles meanwhile.
#pragma once

namespace mgt {
namespace {

// columns of a tile and lanes of a vector give this many groups, whose maxima tell what may be left aside unseen
constexpr int64_t kTileMaxima = 16 * (kTileWidth / kWordWidth);

// one row's logits, and a scratch of its thread for num_tokens keys and weights
struct StagedRow {
  float (*tiles)[kTileWidth];
  float (*maxima)[kTileMaxima];
  // from one tile of the row to the next
  int64_t pitch;
  int64_t num_tokens;
  uint32_t *keys, *weights;

  int64_t num_tiles() const { return row_tiles(num_tokens); }
  float* tile(int64_t t) const { return tiles[t * pitch]; }
  float* tile_maxima(int64_t t) const { return maxima[t * pitch]; }
  int64_t width(int64_t t) const { return std::min(kTileWidth, num_tokens - t * kTileWidth); }
};

// Fills in the maxima of a tile; false where it holds NaN or +inf.
template <class S>
bool survey_tile(const float* tile, int64_t width, float* maxima) {
  const auto infinity = S::set(kInfinity);
  auto bad = S::less(infinity, infinity);
  for (int64_t first = 0; first < kTileWidth; first += kWordWidth) {
    auto max0 = S::set(-kInfinity), max1 = max0;
    const int64_t end = std::min(first + kWordWidth, width);
    int64_t j = first;
    for (; j + 32 <= end; j += 32) {
      const auto logits0 = S::load(tile + j), logits1 = S::load(tile + j + 16);
      bad = S::mask_or(bad, S::mask_or(S::not_below(logits0, infinity), S::not_below(logits1, infinity)));
      max0 = S::max(logits0, max0), max1 = S::max(logits1, max1);
    }
    for (; j < end; j += 16) {
      const auto logits = S::load(tile + j);
      bad = S::mask_or(bad, S::not_below(logits, infinity));
      max0 = S::max(logits, max0);
    }
    S::store(maxima + first / kWordWidth * 16, S::max(max0, max1));
  }
  return S::to_bits(bad) == 0;
}

template <class S>
typename S::F tile_largest(const float* maxima) {
  return S::max(S::max(S::load(maxima), S::load(maxima + 16)), S::max(S::load(maxima + 32), S::load(maxima + 48)));
}

// Calls body(logits) for the vectors of those words of a row's tiles that hold a logit of at least `low`.
template <class S, class Body>
MGT_INLINE void for_each_vector(const StagedRow& row, float low, const Body& body) {
  const auto lows = S::set(low);
  for (int64_t t = 0; t < row.num_tiles(); ++t) {
    const float *tile = row.tile(t), *maxima = row.tile_maxima(t);
    const int64_t width = row.width(t);
    for (int64_t first = 0; first < width; first += kWordWidth) {
      if (!S::to_bits(S::not_below(S::load(maxima + first / kWordWidth * 16), lows))) continue;
      const int64_t end = std::min(first + kWordWidth, width);
      for (int64_t j = first; j < end; j += 16) body(S::load(tile + j));
    }
  }
}

// The largest key such that the weights of the keys from it on add up to `target`, or the smallest where all together
// do not. What the lists hold afterwards is of no use.
inline uint32_t border(uint32_t* keys, uint32_t* weights, int64_t count, uint64_t target) {
  for (;;) {
    uint32_t low = keys[0], high = keys[0];
    for (int64_t i = 1; i < count; ++i) low = std::min(low, keys[i]), high = std::max(high, keys[i]);
    if (low == high) return low;
    // 256 bins at most, falling keys in rising bins
    const int num_bits = 32 - __builtin_clz(high - low), shift = num_bits > 8 ? num_bits - 8 : 0;
    uint64_t mass[256] = {}, above = 0;
    for (int64_t i = 0; i < count; ++i) mass[(high - keys[i]) >> shift] += weights[i];
    const uint32_t last = (high - low) >> shift;
    uint32_t bin = 0;
    for (; bin < last && above + mass[bin] < target; ++bin) above += mass[bin];
    int64_t num_left = 0;
    for (int64_t i = 0; i < count; ++i) {
      if ((high - keys[i]) >> shift != bin) continue;
      keys[num_left] = keys[i], weights[num_left] = weights[i];
      ++num_left;
    }
    count = num_left, target -= above;
  }
}

// Lists the keys of the logits from `low` on, each with weight 1; returns how many.
template <class S>
int64_t list_from(const StagedRow& row, float low) {
  int64_t count = 0;
  const auto lows = S::set(low);
  for_each_vector<S>(row, low, [&](typename S::F logits) {
    uint32_t lanes = S::to_bits(S::not_below(logits, lows));
    if (!lanes) return;
    float value[16];
    S::store(value, logits);
    for (; lanes; lanes &= lanes - 1) row.keys[count++] = ordered_key(value[__builtin_ctz(lanes)]);
  });
  std::fill(row.weights, row.weights + count, 1u);
  return count;
}

// The maxima of groups of columns, of at least `wanted` groups where the row has as many; returns how many.
template <class S>
int64_t list_maxima(const StagedRow& row, int64_t wanted) {
  auto* maxima = reinterpret_cast<float*>(row.weights);
  int64_t count = 0;
  for (int64_t t = 0; t < row.num_tiles(); ++t, count += kTileMaxima)
    std::copy(row.tile_maxima(t), row.tile_maxima(t) + kTileMaxima, maxima + count);
  for (; count / 2 >= wanted && count / 2 % 16 == 0; count /= 2)
    for (int64_t i = 0; i < count / 2; i += 16)
      S::store(maxima + i, S::max(S::load(maxima + i), S::load(maxima + count / 2 + i)));
  for (int64_t i = 0; i < count; ++i) row.keys[i] = ordered_key(maxima[i]);
  std::fill(row.weights, row.weights + count, 1u);
  return count;
}

constexpr float kLowestFinite = -std::numeric_limits<float>::max();

// the top_k-th largest logit
template <class S>
float bound_of_top_k(const StagedRow& row, int64_t top_k) {
  // as many groups as top_k have a maximum from here on, so as many logits have
  float low = kLowestFinite;
  const int64_t num_groups = list_maxima<S>(row, 8 * top_k);
  if (num_groups >= top_k)
    low = std::max(low, value_of_key(border(row.keys, row.weights, num_groups, static_cast<uint64_t>(top_k))));
  const int64_t count = list_from<S>(row, low);
  return value_of_key(border(row.keys, row.weights, count, static_cast<uint64_t>(top_k)));
}

constexpr float kTwoPow31 = 2147483648.0f;
// what lies further below the largest logit weighs nothing: 2^31 exp(-22.2) < 1/2
constexpr float kWeightless = 22.25f;
constexpr float kBinsPerNat = 16.0f;
constexpr int kLastBin = 22 * 16 + 15;

// exp(l - max) in units of 2^-31, to the nearest
template <class S>
MGT_INLINE typename S::U weigh(typename S::F below_max) {
  return S::to_uint(S::fma(exp_nonpositive<S>(below_max), S::set(kTwoPow31), S::set(0.5f)));
}

// The bin of a logit, rising as logits fall.
template <class S>
MGT_INLINE typename S::U bin_of(typename S::F below_max) {
  const auto bins = S::mul(below_max, S::set(-kBinsPerNat));
  return S::to_uint(S::min(bins, S::set(static_cast<float>(kLastBin))));
}

inline uint64_t share_of(uint64_t total, float top_p) {
  const auto target = static_cast<uint64_t>(std::ceil(static_cast<double>(top_p) * static_cast<double>(total)));
  return std::max(uint64_t{1}, std::min(total, target));
}

// What top_p keeps of the logits that are listed: those of `count` keys, the largest of which is max's.
template <class S>
float bound_of_listed_top_p(const StagedRow& row, int64_t count, float max, float top_p) {
  uint64_t total = 0;
  for (int64_t i = 0; i < count; i += 16) {
    float value[16];
    for (int64_t lane = 0; lane < 16; ++lane) value[lane] = i + lane < count ? value_of_key(row.keys[i + lane]) : max;
    uint32_t weight[16];
    S::store_u(weight, weigh<S>(S::sub(S::load(value), S::set(max))));
    for (int64_t lane = 0; lane < std::min<int64_t>(16, count - i); ++lane)
      total += row.weights[i + lane] = weight[lane];
  }
  return value_of_key(border(row.keys, row.weights, count, share_of(total, top_p)));
}

struct Histogram {
  // four, so that neighbours of one bin do not wait for each other
  uint64_t mass[4][kLastBin + 1];
};

// Adds the weights of all logits up, in bins those from `low` on; returns the sum of all.
template <class S>
uint64_t fill_histogram(const StagedRow& row, float max, float low, Histogram& histogram) {
  using U = typename S::U;
  std::memset(&histogram, 0, sizeof histogram);
  const auto maxima = S::set(max), lows = S::set(low);
  const U half = S::set_u(0xffffu);
  U upper = S::set_u(0u), lower = upper;
  uint64_t total = 0;
  int64_t num_vectors = 0;
  const auto flush = [&] {
    uint32_t sums[2][16];
    S::store_u(sums[0], upper), S::store_u(sums[1], lower);
    for (int lane = 0; lane < 16; ++lane) total += (uint64_t{sums[0][lane]} << 16) + sums[1][lane];
    upper = lower = S::set_u(0u);
    num_vectors = 0;
  };
  for_each_vector<S>(row, max - kWeightless, [&](typename S::F logits) {
    const auto below_max = S::sub(logits, maxima);
    const U weights = weigh<S>(below_max);
    upper = S::add_u(upper, S::template shift_right<16>(weights));
    lower = S::add_u(lower, S::bit_and(weights, half));
    // halves of 16 bits: 2^16 of them fit
    if (++num_vectors == 1 << 15) flush();
    uint32_t lanes = S::to_bits(S::not_below(logits, lows));
    if (!lanes) return;
    uint32_t bin[16], weight[16];
    S::store_u(bin, bin_of<S>(below_max)), S::store_u(weight, weights);
    if (lanes == 0xffffu) {
      for (int lane = 0; lane < 16; ++lane) histogram.mass[lane % 4][bin[lane]] += weight[lane];
      return;
    }
    for (; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      histogram.mass[lane % 4][bin[lane]] += weight[lane];
    }
  });
  flush();
  return total;
}

// Where the largest eighth of the tokens begins, roughly: few groups of 32 have none of them.
template <class S>
float largest_eighth(const StagedRow& row) {
  const int64_t num_tiles = std::min<int64_t>(row.num_tiles(), 8);
  const int64_t count = num_tiles * kTileMaxima;
  for (int64_t i = 0; i < count; ++i) row.keys[i] = ordered_key(row.tile_maxima(i / kTileMaxima)[i % kTileMaxima]);
  std::fill(row.weights, row.weights + count, 1u);
  return value_of_key(border(row.keys, row.weights, count, static_cast<uint64_t>(count - count / 64)));
}

// the smallest of the fewest largest logits whose probabilities add up to top_p
template <class S>
float bound_of_top_p(const StagedRow& row, float max, float top_p) {
  // All weights are added in vectors; one by one into bins only as far as top_p is likely to reach, which is all the
  // way on rows so flat that an eighth of the tokens is within 8 nats of the largest.
  Histogram histogram;
  float low = largest_eighth<S>(row);
  if (!(low < max - 8.0f)) low = -kInfinity;
  uint64_t total = fill_histogram<S>(row, max, low, histogram);
  const uint64_t target = share_of(total, top_p);
  const auto crossing = [&](uint64_t& above) {
    for (int bin = 0; bin <= kLastBin; ++bin) {
      uint64_t mass = 0;
      for (const auto& copy : histogram.mass) mass += copy[bin];
      if (above + mass >= target) return bin;
      above += mass;
    }
    return -1;
  };
  // the bin of `low` is not whole, and the ones before it are
  const int last_whole = low == -kInfinity ? kLastBin : static_cast<int>(bin_of<Lane1>(low - max)) - 1;
  uint64_t above = 0;
  int bin = crossing(above);
  if (bin < 0 || bin > last_whole) {
    fill_histogram<S>(row, max, -kInfinity, histogram);
    above = 0;
    bin = crossing(above);
  }
  int64_t count = 0;
  const auto maxima = S::set(max);
  const auto highest = S::set(-static_cast<float>(bin) / kBinsPerNat);
  const auto lowest = S::set(bin == kLastBin ? -kInfinity : -static_cast<float>(bin + 1) / kBinsPerNat);
  for_each_vector<S>(row, max - kWeightless, [&](typename S::F logits) {
    const auto below_max = S::sub(logits, maxima);
    uint32_t lanes = S::to_bits(S::less(lowest, below_max)) & ~S::to_bits(S::less(highest, below_max));
    if (!lanes) return;
    float value[16];
    uint32_t weight[16];
    S::store(value, logits), S::store_u(weight, weigh<S>(below_max));
    for (; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      row.keys[count] = ordered_key(value[lane]), row.weights[count] = weight[lane];
      ++count;
    }
  });
  return value_of_key(border(row.keys, row.weights, count, target - above));
}

// The smallest logit that the draw keeps of a row whose largest is max.
template <class S>
float kept_from(const mgt_sample_tokens_args& args, const StagedRow& row, float max) {
  float bound = kLowestFinite;
  if (args.top_k > 0 && args.top_k < row.num_tokens) bound = bound_of_top_k<S>(row, args.top_k);
  if (args.top_p > 0.0f && args.top_p < 1.0f) {
    if (bound > kLowestFinite)
      bound = bound_of_listed_top_p<S>(row, list_from<S>(row, bound), max, args.top_p);
    else
      bound = bound_of_top_p<S>(row, max, args.top_p);
  }
  if (args.min_p > 0.0f) bound = std::max(bound, max + log_f32<Lane1>(args.min_p));
  return bound;
}

// Forbids what lies below `bound`; returns the largest logit that is left.
template <class S>
float truncate_tile(float* tile, int64_t width, float bound) {
  const auto bounds = S::set(bound), forbidding = S::set(-kInfinity);
  auto max = forbidding;
  for (int64_t j = 0; j < width; j += 16) {
    const auto logits = S::load(tile + j);
    const auto kept = S::select(S::less(logits, bounds), forbidding, logits);
    S::store(tile + j, kept);
    max = S::max(kept, max);
  }
  return largest_lane<S>(max);
}

}  // namespace
}  // namespace mgt
