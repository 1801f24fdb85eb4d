// What a truncated draw keeps of a row: the tokens whose logit is at least a bound, which top_k, top_p and min_p give.
//
// The bound is one of the row's logits, found without a sort and without rounding: top_k counts tokens, top_p adds
// exp(l - max) in whole units of 2^-31. So it depends neither on the order of the additions nor on how it is looked
// for, and every instruction set finds the same. The row waits in its thread's tiles meanwhile.
#pragma once

namespace mgt {
namespace {

static_assert(kTileMaxima == 16 * (kTileWidth / kWordWidth), "a maximum for each lane of each word's vectors");

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

// Calls body(logits) for the vectors of those words of tiles [begin, end) that hold a logit of at least `low`.
template <class S, class Body>
MGT_INLINE void for_each_vector(const StagedRow& row, int64_t begin, int64_t end, float low, const Body& body) {
  const auto lows = S::set(low);
  for (int64_t t = begin; t < end; ++t) {
    const float *tile = row.tile(t), *maxima = row.tile_maxima(t);
    const int64_t width = row.width(t);
    for (int64_t first = 0; first < width; first += kWordWidth) {
      if (!S::to_bits(S::not_below(S::load(maxima + first / kWordWidth * 16), lows))) continue;
      const int64_t last = std::min(first + kWordWidth, width);
      for (int64_t j = first; j < last; j += 16) body(S::load(tile + j));
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
    uint64_t mass[256] = {}, others[256] = {}, above = 0;
    int64_t i = 0;
    // neighbours of one bin do not wait for each other
    for (; i + 2 <= count; i += 2) {
      mass[(high - keys[i]) >> shift] += weights[i];
      others[(high - keys[i + 1]) >> shift] += weights[i + 1];
    }
    for (; i < count; ++i) mass[(high - keys[i]) >> shift] += weights[i];
    for (int bin = 0; bin < 256; ++bin) mass[bin] += others[bin];
    const uint32_t last = (high - low) >> shift;
    uint32_t bin = 0;
    for (; bin < last && above + mass[bin] < target; ++bin) above += mass[bin];
    int64_t num_left = 0;
    for (i = 0; i < count; ++i) {
      const uint32_t key = keys[i];
      keys[num_left] = key, weights[num_left] = weights[i];
      num_left += (high - key) >> shift == bin;
    }
    count = num_left, target -= above;
  }
}

template <class S>
MGT_INLINE typename S::U ordered_keys(typename S::F values) {
  const auto bits = S::bits(S::add(values, S::set(0.0f)));
  return S::bit_xor(bits, S::bit_or(S::template shift_right_signed<31>(bits), S::set_u(0x80000000u)));
}

// Lists the logits from `low` on where the weights will be; returns how many.
template <class S>
int64_t list_logits(const StagedRow& row, float low) {
  auto* listed = reinterpret_cast<float*>(row.weights);
  int64_t count = 0;
  const auto lows = S::set(low);
  for_each_vector<S>(row, 0, row.num_tiles(), low, [&](typename S::F logits) {
    const auto wanted = S::not_below(logits, lows);
    if (S::to_bits(wanted)) count += S::compress(listed + count, logits, wanted);
  });
  return count;
}

// Makes keys of the logits that are listed, each with weight 1.
template <class S>
void count_listed(const StagedRow& row, int64_t count) {
  const auto* listed = reinterpret_cast<const float*>(row.weights);
  for (int64_t i = 0; i < count; i += 16) {
    S::store_u(row.keys + i, ordered_keys<S>(S::load(listed + i)));
    S::store_u(row.weights + i, S::set_u(1u));
  }
}

// Lists the maxima of groups of columns, of at least `wanted` groups where the row has as many; returns how many.
template <class S>
int64_t list_maxima(const StagedRow& row, int64_t wanted) {
  auto* maxima = reinterpret_cast<float*>(row.weights);
  int64_t count = 0;
  for (int64_t t = 0; t < row.num_tiles(); ++t, count += kTileMaxima)
    std::copy(row.tile_maxima(t), row.tile_maxima(t) + kTileMaxima, maxima + count);
  for (; count / 2 >= wanted && count / 2 % 16 == 0; count /= 2)
    for (int64_t i = 0; i < count / 2; i += 16)
      S::store(maxima + i, S::max(S::load(maxima + i), S::load(maxima + count / 2 + i)));
  count_listed<S>(row, count);
  return count;
}

constexpr float kLowestFinite = -std::numeric_limits<float>::max();

// the top_k-th largest logit
template <class S>
float bound_of_top_k(const StagedRow& row, int64_t top_k) {
  const auto rank = static_cast<uint64_t>(top_k);
  // as many groups as top_k have a maximum from here on, so as many logits have
  float low = kLowestFinite;
  const int64_t num_groups = list_maxima<S>(row, 8 * top_k);
  if (num_groups >= top_k) low = std::max(low, value_of_key(border(row.keys, row.weights, num_groups, rank)));
  const int64_t count = list_logits<S>(row, low);
  count_listed<S>(row, count);
  return value_of_key(border(row.keys, row.weights, count, rank));
}

constexpr float kTwoPow31 = 2147483648.0f;
// what lies further below the largest logit weighs nothing: 2^31 exp(-22.2) < 1/2
constexpr float kWeightless = 22.25f;

// exp(l - max) in units of 2^-31, to the nearest
template <class S>
MGT_INLINE typename S::U weigh(typename S::F logits, typename S::F max) {
  return S::to_uint(S::fma(exp_nonpositive<S>(S::sub(logits, max)), S::set(kTwoPow31), S::set(0.5f)));
}

// Makes keys of the logits that are listed, with their weights; returns the sum of those.
template <class S>
uint64_t weigh_listed(const StagedRow& row, int64_t count, float max) {
  auto* listed = reinterpret_cast<float*>(row.weights);
  std::fill(listed + count, listed + (count + 15) / 16 * 16, -kInfinity);
  uint64_t total = 0;
  for (int64_t begin = 0; begin < count; begin += kMaxSummands) {
    typename S::Sum sum = S::no_sum();
    for (int64_t i = begin; i < std::min(begin + kMaxSummands, count); i += 16) {
      const auto logits = S::load(listed + i);
      const auto weights = weigh<S>(logits, S::set(max));
      S::add_to(sum, weights);
      S::store_u(row.keys + i, ordered_keys<S>(logits));
      S::store_u(row.weights + i, weights);
    }
    total += S::total(sum);
  }
  return total;
}

inline uint64_t share_of(uint64_t total, float top_p) {
  const auto target = static_cast<uint64_t>(std::ceil(static_cast<double>(top_p) * static_cast<double>(total)));
  return std::max(uint64_t{1}, std::min(total, target));
}

struct Bracket {
  float low, high;
};

// Lists the logits within a bracket; returns how many, and the sums of the weights of all, and of those above.
template <class S, bool kHasAbove>
int64_t list_bracket(const StagedRow& row, Bracket bracket, float max, uint64_t& total, uint64_t& above) {
  auto* listed = reinterpret_cast<float*>(row.weights);
  int64_t count = 0;
  const auto lows = S::set(bracket.low), highs = S::set(bracket.high);
  total = above = 0;
  constexpr int64_t kTiles = kMaxSummands / kTileWidth;
  for (int64_t begin = 0; begin < row.num_tiles(); begin += kTiles) {
    typename S::Sum all = S::no_sum(), upper = S::no_sum();
    for_each_vector<S>(row, begin, std::min(begin + kTiles, row.num_tiles()), max - kWeightless,
                       [&](typename S::F logits) {
                         const auto weights = weigh<S>(logits, S::set(max));
                         S::add_to(all, weights);
                         auto wanted = S::not_below(logits, lows);
                         if constexpr (kHasAbove) {
                           const auto below = S::less(logits, highs);
                           S::add_to(upper, S::bits(S::select(below, S::set(0.0f), S::from_bits(weights))));
                           wanted = S::mask_and(wanted, below);
                         }
                         // a branch would be mispredicted: a vector in two has one of those that are wanted
                         count += S::compress(listed + count, logits, wanted);
                       });
    total += S::total(all), above += S::total(upper);
  }
  return count;
}

// The weights of logits, added up in bins of falling logits: the first begins at `top`, the last holds all the rest.
struct Bins {
  static constexpr int kCount = 256;
  float top, width;
  // neighbours of one bin do not wait for each other
  uint64_t mass[4][kCount] = {};

  Bins(float top, float width) : top(top), width(width) {}

  // the number of the bin, as an integer
  template <class S>
  MGT_INLINE typename S::U of(typename S::F logits) const {
    // all are in the first bin where the others would be too narrow to have a number
    const float per_unit = width > 1e-30f ? 1.0f / width : 0.0f;
    const auto bins = S::mul(S::sub(S::set(top), logits), S::set(per_unit));
    return S::to_uint(S::min(S::max(bins, S::set(0.0f)), S::set(kCount - 1.0f)));
  }

  template <class S>
  MGT_INLINE void add(typename S::F logits, typename S::U weights) {
    uint32_t weight[16], bin[16];
    S::store_u(weight, weights);
    S::store_u(bin, of<S>(logits));
    for (int lane = 0; lane < 16; ++lane) mass[lane % 4][bin[lane]] += weight[lane];
  }

  // adds the parts up in mass[0]; returns the sum of all
  uint64_t total() {
    uint64_t sum = 0;
    for (int bin = 0; bin < kCount; ++bin) {
      for (int part = 1; part < 4; ++part) mass[0][bin] += mass[part][bin], mass[part][bin] = 0;
      sum += mass[0][bin];
    }
    return sum;
  }
};

// Where the largest eighth of the tokens begins, roughly: few groups of 32 have none of them.
template <class S>
float largest_eighth(const StagedRow& row) {
  auto* listed = reinterpret_cast<float*>(row.weights);
  int64_t count = 0;
  for (int64_t t = 0; t < std::min<int64_t>(row.num_tiles(), 4); ++t, count += kTileMaxima)
    std::copy(row.tile_maxima(t), row.tile_maxima(t) + kTileMaxima, listed + count);
  count_listed<S>(row, count);
  return value_of_key(border(row.keys, row.weights, count, static_cast<uint64_t>(count - count / 64)));
}

// More widen what is listed, fewer make it miss more often.
constexpr float kDeviations = 2.5f;

// A guess, which decides nothing but how long the search takes: where the largest logits below `ceiling` end that have
// `share` of the probability of all below it. None of them has much of it.
template <class S>
Bracket sampled_bracket(const StagedRow& row, float max, float ceiling, float share, float bin_width) {
  if (!(bin_width > 0.0f)) return {-kInfinity, ceiling};
  // a sample tells how the probability is spread
  Bins bins(std::min(ceiling, max), bin_width);
  const int64_t step = 16 * std::min<int64_t>(16, std::max<int64_t>(4, row.num_tokens / 8192));
  for (int64_t t = 0; t < row.num_tiles(); ++t) {
    for (int64_t j = 0; j < row.width(t); j += step) {
      const auto logits = S::load(row.tile(t) + j);
      const auto weights = S::from_bits(weigh<S>(logits, S::set(max)));
      bins.template add<S>(logits, S::bits(S::select(S::less(logits, S::set(ceiling)), weights, S::set(0.0f))));
    }
  }
  const auto edge = [&](int bin) { return bins.top - static_cast<float>(bin) * bin_width; };
  const auto mass = [&](int bin) { return static_cast<float>(bins.mass[0][bin]); };
  const auto total = static_cast<float>(bins.total());
  // no weight of a bin is larger than its edge's
  float squares[Bins::kCount], squares_below = 0.0f;
  float weight = exp_nonpositive<Lane1>(bins.top - max) * kTwoPow31;
  const float ratio = exp_nonpositive<Lane1>(-bin_width);
  for (int bin = 0; bin < Bins::kCount; ++bin, weight *= ratio) squares_below += squares[bin] = mass(bin) * weight;
  Bracket bracket{-kInfinity, ceiling};
  float sum = 0.0f, squares_above = 0.0f;
  for (int bin = 0; bin < Bins::kCount - 1; ++bin) {
    sum += mass(bin);
    squares_above += squares[bin], squares_below -= squares[bin];
    // some standard deviations of (1 - share) times what is above less share times what is below
    const float variance = (1.0f - share) * (1.0f - share) * squares_above + share * share * squares_below;
    const float deviation = kDeviations * std::sqrt(std::max(variance, 0.0f));
    if (sum < share * total - deviation) bracket.high = edge(bin + 1);
    if (sum > share * total + deviation) {
      bracket.low = edge(bin + 1);
      break;
    }
  }
  return bracket;
}

// The bins of `count` listed logits within a bracket.
template <class S>
Bins bins_of_listed(const StagedRow& row, int64_t count, Bracket bracket, float max) {
  auto* listed = reinterpret_cast<float*>(row.weights);
  std::fill(listed + count, listed + (count + 15) / 16 * 16, -kInfinity);
  const float top = std::min(bracket.high, max), bottom = std::max(bracket.low, max - kWeightless);
  Bins bins(top, (top - bottom) / Bins::kCount);
  for (int64_t i = 0; i < count; i += 16) {
    const auto logits = S::load(listed + i);
    bins.template add<S>(logits, weigh<S>(logits, S::set(max)));
  }
  return bins;
}

// The largest of the listed logits such that the weights of those from it on add up to `target`, which all together do.
template <class S>
float border_of_listed(const StagedRow& row, int64_t count, const Bins& bins, float max, uint64_t target) {
  auto* listed = reinterpret_cast<float*>(row.weights);
  int bin = 0;
  for (; bin < Bins::kCount - 1 && bins.mass[0][bin] < target; ++bin) target -= bins.mass[0][bin];
  const auto bins_wanted = S::set(static_cast<float>(bin));
  int64_t num_left = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const auto logits = S::load(listed + i);
    // what fills the last vector weighs nothing
    const auto wanted = S::equal(S::int_to_float(bins.template of<S>(logits)), bins_wanted);
    num_left += S::compress(listed + num_left, logits, wanted);
  }
  weigh_listed<S>(row, num_left, max);
  return value_of_key(border(row.keys, row.weights, num_left, target));
}

// the smallest of the fewest largest logits whose probabilities add up to top_p
template <class S>
float bound_of_top_p(const StagedRow& row, float max, float top_p) {
  uint64_t total = 0, above = 0, listed = 0, target = 0;
  int64_t count = 0;
  Bins bins(max, 0.0f);
  // whether the bound is among the logits of this bracket, which are listed then
  const auto holds_bound = [&](Bracket bracket) {
    count = bracket.high < kInfinity ? list_bracket<S, true>(row, bracket, max, total, above)
                                     : list_bracket<S, false>(row, bracket, max, total, above);
    bins = bins_of_listed<S>(row, count, bracket, max);
    listed = bins.total();
    target = share_of(total, top_p);
    return above < target && above + listed >= target;
  };
  const float eighth = largest_eighth<S>(row), bin_width = (max - eighth) / 64.0f;
  // A sample tells where to look, unless few tokens have most of the probability. Then an eighth of all is listed, and
  // if those have not enough of it, a sample of the others tells.
  Bracket bracket{eighth, kInfinity};
  if (eighth >= max - 10.0f) {
    const Bracket sampled = sampled_bracket<S>(row, max, kInfinity, top_p, bin_width);
    if (sampled.low > -kInfinity && sampled.high < kInfinity) bracket = sampled;
  }
  bool found = holds_bound(bracket);
  if (!found && bracket.high == kInfinity && listed < target) {
    const double share = static_cast<double>(target - listed) / static_cast<double>(total - listed);
    found = holds_bound(sampled_bracket<S>(row, max, eighth, static_cast<float>(share), bin_width));
  }
  if (!found) holds_bound({-kInfinity, kInfinity});
  return border_of_listed<S>(row, count, bins, max, target - above);
}

inline float log_of_share(float share) {
  // log_f32 takes no denormals
  const bool tiny = share < std::numeric_limits<float>::min();
  return tiny ? log_f32<Lane1>(share * 0x1p24f) - 24.0f * kLn2 : log_f32<Lane1>(share);
}

// The smallest logit that the draw keeps of a row whose largest is max.
template <class S>
float kept_from(const mgt_sample_tokens_args& args, const StagedRow& row, float max) {
  float bound = kLowestFinite;
  if (args.top_k > 0 && args.top_k < row.num_tokens) bound = bound_of_top_k<S>(row, args.top_k);
  if (args.top_p > 0.0f && args.top_p < 1.0f) {
    if (bound > kLowestFinite) {
      const int64_t count = list_logits<S>(row, bound);
      const uint64_t target = share_of(weigh_listed<S>(row, count, max), args.top_p);
      bound = value_of_key(border(row.keys, row.weights, count, target));
    } else {
      bound = bound_of_top_p<S>(row, max, args.top_p);
    }
  }
  if (args.min_p > 0.0f) bound = std::max(bound, max + log_of_share(args.min_p));
  return bound;
}

}  // namespace
}  // namespace mgt
