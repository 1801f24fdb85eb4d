// The race that draws a row's token, and the sums that its log-probability and statistics are made of, tile by tile,
// written once against the lanes of simd_*.h.
//
// A tile of 2048 columns stays in the first-level cache: its maximum, then exp for the logsumexp and a test per column
// that rules out nearly all of them before any logarithm is taken.
#pragma once

namespace mgt {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// what is known of a row after some of its tiles; sum is relative to exp(max)
struct RowState {
  float max = -kInfinity;
  float sum[16] = {};
  float best_score = -kInfinity;
  float best_logit = -kInfinity;
  int64_t best_token = -1;
  // words below exp(logit - max) * race_scale can win
  float race_scale = 0.0f;
};

// what statistics need of the same tiles besides
struct RowStatistics {
  bool ranks_second = false;
  // of the largest logit, and what is largest without it
  int64_t argmax = -1;
  float second = -kInfinity;
  // sums of exp(l - max) (l - max)
  float moment[16] = {};
  // the logit of a known token, once its tile has passed
  float known_logit = -kInfinity;
};

inline float gumbel_at(const PhiloxKey& key, int64_t column) {
  const auto block = static_cast<uint32_t>(column / kTileWidth * kWordWidth + column % kWordWidth);
  return gumbel<Lane1>(philox<Lane1>(block, key).word[column / kWordWidth % 4]);
}

// Column j beats the best score b only if E_j <= exp(l_j - b), and E_j >= w_j, so word_j < exp(l_j - b) 2^32 is
// necessary. The slack covers the rounding of the scores, of l - max and of exp; too large a value only costs time.
inline float race_scale(float max, float best_score) {
  const float slack = 2e-5f + 5e-7f * (std::fabs(max) + std::fabs(best_score));
  return std::exp(max - best_score + slack) * kTwoPow32;
}

// true where the token takes the lead
inline bool compete(RowState& row, float logit, float score, int64_t token) {
  const bool wins = score > row.best_score || (score == row.best_score && token < row.best_token);
  if (wins) {
    row.best_score = score;
    row.best_logit = logit;
    row.best_token = token;
    row.race_scale = race_scale(row.max, score);
  }
  return wins;
}

template <class S>
float largest_lane(typename S::F x) {
  float lane[16], max = -kInfinity;
  S::store(lane, x);
  for (const float value : lane) max = Lane1::max(value, max);
  return max;
}

template <class S>
float tile_max(const float* tile, int64_t width) {
  typename S::F max0 = S::set(-kInfinity), max1 = max0, max2 = max0, max3 = max0;
  int64_t j = 0;
  for (; j + 64 <= width; j += 64) {
    max0 = S::max(S::load(tile + j), max0);
    max1 = S::max(S::load(tile + j + 16), max1);
    max2 = S::max(S::load(tile + j + 32), max2);
    max3 = S::max(S::load(tile + j + 48), max3);
  }
  for (; j < width; j += 16) max0 = S::max(S::load(tile + j), max0);
  return largest_lane<S>(S::max(S::max(max0, max1), S::max(max2, max3)));
}

// the largest of a tile without one element of the value of its maximum
template <class S>
float tile_second(const float* tile, int64_t width) {
  typename S::F first0 = S::set(-kInfinity), first1 = first0, second0 = first0, second1 = first0;
  const auto rank = [](typename S::F logits, typename S::F& first, typename S::F& second) {
    second = S::max(S::min(first, logits), second);
    first = S::max(first, logits);
  };
  int64_t j = 0;
  for (; j + 32 <= width; j += 32) {
    rank(S::load(tile + j), first0, second0);
    rank(S::load(tile + j + 16), first1, second1);
  }
  for (; j < width; j += 16) rank(S::load(tile + j), first0, second0);
  rank(first1, first0, second0);
  second0 = S::max(second0, second1);
  float lane[16], first = -kInfinity, second = largest_lane<S>(second0);
  S::store(lane, first0);
  for (const float value : lane) {
    second = Lane1::max(Lane1::min(first, value), second);
    first = Lane1::max(first, value);
  }
  return second;
}

template <class S>
int64_t first_equal(const float* tile, int64_t width, float value) {
  for (int64_t j = 0; j < width; j += 16) {
    const uint32_t hits = S::to_bits(S::equal(S::load(tile + j), S::set(value)));
    if (hits) return j + __builtin_ctz(hits);
  }
  return -1;
}

// Groups of columns this far below the largest logit are left out. Together they add less than num_tokens exp(-28),
// some 7e-13 num_tokens, to a sum of at least 1, and none can win: the best score is at least max - 3.2, the noise at
// most 22.9.
constexpr float kNegligible = 28.0f;

struct Prefetch {
  const char* rows[2];
  int64_t bytes;
};

template <class S, int num_words>
MGT_INLINE typename S::F add_words(const typename S::F* term) {
  if constexpr (num_words == 4) return S::add(S::add(term[0], term[1]), S::add(term[2], term[3]));
  typename S::F sum = term[0];
  for (int w = 1; w < num_words; ++w) sum = S::add(sum, term[w]);
  return sum;
}

// Where exp_nonpositive stays as it is: what is multiplied by exp stays finite, and as good as 0.
constexpr float kLowestShift = -87.0f;

// One column of vectors of a tile: words 0..num_words-1 share a Philox block. kTruncated: logits below `bound` do not
// take part; `negligible` is not below it.
template <class S, int num_words, bool kStatistics, bool kTruncated>
MGT_INLINE typename S::F race(const float* tile, int64_t k, int64_t first_column, typename S::F max,
                              typename S::F negligible, typename S::F bound, const PhiloxKey& key, RowState& row,
                              typename S::F& moment) {
  using F = typename S::F;
  F logit[num_words];
#pragma GCC unroll 4
  for (int w = 0; w < num_words; ++w) logit[w] = S::load(tile + w * kWordWidth + k);
  auto matters = S::not_below(logit[0], negligible);
#pragma GCC unroll 4
  for (int w = 1; w < num_words; ++w) matters = S::mask_or(matters, S::not_below(logit[w], negligible));
  // every path groups the same 16 x num_words columns, so what is left out is the same everywhere; NaN is not below
  if (!S::to_bits(matters)) return S::set(0.0f);

  F exp[num_words], limit[num_words], term[num_words];
  const F scale = S::set(row.race_scale), half = S::set(0.5f);
#pragma GCC unroll 4
  for (int w = 0; w < num_words; ++w) {
    F shifted = S::sub(logit[w], max);
    if constexpr (kStatistics) shifted = S::max(S::set(kLowestShift), shifted);
    exp[w] = exp_nonpositive<S>(shifted);
    if constexpr (kTruncated) exp[w] = S::select(S::less(logit[w], bound), S::set(0.0f), exp[w]);
    if constexpr (kStatistics) term[w] = S::mul(exp[w], shifted);
    limit[w] = S::mul(exp[w], scale);
  }
  auto any = S::less(half, limit[0]);
#pragma GCC unroll 4
  for (int w = 1; w < num_words; ++w) any = S::mask_or(any, S::less(half, limit[w]));
  if (S::to_bits(any)) {
    const auto block = S::sequence(static_cast<uint32_t>(first_column / 4 + k));
    const PhiloxWords<S> words = philox<S>(block, key);
    typename S::M pass[num_words];
#pragma GCC unroll 4
    for (int w = 0; w < num_words; ++w) pass[w] = S::less(S::uint_to_float(words.word[w]), limit[w]);
    auto any_pass = pass[0];
#pragma GCC unroll 4
    for (int w = 1; w < num_words; ++w) any_pass = S::mask_or(any_pass, pass[w]);
    if (__builtin_expect(S::to_bits(any_pass) != 0, 0)) {
      for (int w = 0; w < num_words; ++w) {
        uint32_t lanes = S::to_bits(pass[w]), word[16];
        if (!lanes) continue;
        S::store_u(word, words.word[w]);
        for (; lanes; lanes &= lanes - 1) {
          const int lane = __builtin_ctz(lanes);
          const int64_t column = w * kWordWidth + k + lane;
          compete(row, tile[column], tile[column] + gumbel<Lane1>(word[lane]), first_column + column);
        }
      }
    }
  }
  if constexpr (kStatistics) moment = S::add(moment, add_words<S, num_words>(term));
  return add_words<S, num_words>(exp);
}

// Takes one tile, whose largest logit is max, into the row's state; false where the tile holds NaN or +inf, which
// leaves max, sum and statistics as they were. kTruncated: without what lies below `bound`, which max does not.
template <class S, bool kStatistics, bool kTruncated>
MGT_NOINLINE bool consume_tile(const float* tile, int64_t width, float max, float bound, int64_t first_column,
                               const PhiloxKey& key, bool greedy, const Prefetch& prefetch, RowState& row,
                               RowStatistics& statistics) {
  using F = typename S::F;
  if (max == kInfinity) return false;
  if (max == -kInfinity) {
    for (int64_t j = 0; j < width; j += 16)
      if (S::to_bits(S::is_nan(S::load(tile + j)))) return false;
    return true;
  }
  const float previous_max = row.max;
  float rescale = 1.0f;
  int64_t argmax = statistics.argmax;
  if (max > row.max) {
    rescale = exp_nonpositive<Lane1>(row.max - max);
    row.max = max;
    // the largest logit goes first, which bounds how many of the others are worth a look
    const int64_t column = first_equal<S>(tile, width, max);
    argmax = first_column + column;
    const float noise = greedy ? 0.0f : gumbel_at(key, first_column + column);
    if (!compete(row, max, max + noise, first_column + column)) row.race_scale = race_scale(row.max, row.best_score);
    if (greedy) row.race_scale = 0.0f;
  }
  const F shift = S::set(row.max), bounds = S::set(bound);
  const F negligible = S::set(kTruncated ? std::max(row.max - kNegligible, bound) : row.max - kNegligible);
  F acc = S::set(0.0f), moment = S::set(0.0f);
  const int64_t words = std::min(width, kWordWidth);
  for (int64_t k = 0; k < words; k += 16) {
    for (int64_t offset = k * prefetch.bytes / words; offset < (k + 16) * prefetch.bytes / words; offset += 64) {
      __builtin_prefetch(prefetch.rows[0] + offset, 0, 3);
      __builtin_prefetch(prefetch.rows[1] + offset, 0, 3);
    }
    const auto take = [&](auto num_words) {
      return race<S, num_words(), kStatistics, kTruncated>(tile, k, first_column, shift, negligible, bounds, key, row,
                                                           moment);
    };
    switch ((width - k + kWordWidth - 1) / kWordWidth) {
      case 4: acc = S::add(acc, take(std::integral_constant<int, 4>())); break;
      case 3: acc = S::add(acc, take(std::integral_constant<int, 3>())); break;
      case 2: acc = S::add(acc, take(std::integral_constant<int, 2>())); break;
      default: acc = S::add(acc, take(std::integral_constant<int, 1>()));
    }
  }
  if (S::to_bits(S::is_nan(acc))) {
    row.max = previous_max;
    return false;
  }
  const F sum = S::load(row.sum);
  if constexpr (kStatistics) {
    const float drop = previous_max == -kInfinity ? 0.0f : Lane1::max(kLowestShift, previous_max - row.max);
    const F shifted = S::fma(sum, S::set(drop), S::load(statistics.moment));
    S::store(statistics.moment, S::fma(shifted, S::set(rescale), moment));
    statistics.argmax = argmax;
    if (statistics.ranks_second && max > previous_max) {
      const float second = tile_second<S>(tile, width);
      statistics.second = kTruncated && second < bound ? previous_max : Lane1::max(previous_max, second);
    } else if (statistics.ranks_second) {
      statistics.second = Lane1::max(statistics.second, max);
    }
  }
  S::store(row.sum, S::fma(sum, S::set(rescale), acc));
  return true;
}

// what the lanes hold together, added in one fixed tree
MGT_INLINE float sum_of_lanes(float lane[16]) {
  for (int half_lanes = 8; half_lanes; half_lanes /= 2)
    for (int i = 0; i < half_lanes; ++i) lane[i] += lane[i + half_lanes];
  return lane[0];
}

}  // namespace
}  // namespace mgt
