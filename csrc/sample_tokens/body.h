// sample_tokens, written once against the lanes of simd_*.h.
//
// Bound by: DRAM reads of both guidance halves while the draw stays cheap (peaked logits), by Philox's multiplications
// on flat logits, by Philox and Box-Muller with noise on. A row passes through in tiles of 2048 columns that stay in
// L1: guided logits, their maximum, then exp for the logsumexp and a test per column that rules out nearly all of them
// before any logarithm is taken.
#pragma once

namespace mgt {
namespace {

static_assert(kTileWidth == kRowTileFloats, "the workspace holds whole tiles");

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

// one column of vectors of a tile: words 0..num_words-1 share a Philox block
template <class S, int num_words, bool kStatistics>
MGT_INLINE typename S::F race(const float* tile, int64_t k, int64_t first_column, typename S::F max,
                              typename S::F negligible, const PhiloxKey& key, RowState& row, typename S::F& moment) {
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
// leaves max, sum and statistics as they were.
template <class S, bool kStatistics>
bool consume_tile(const float* tile, int64_t width, float max, int64_t first_column, const PhiloxKey& key, bool greedy,
                  const Prefetch& prefetch, RowState& row, RowStatistics& statistics) {
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
  const F shift = S::set(row.max), negligible = S::set(row.max - kNegligible);
  F acc = S::set(0.0f), moment = S::set(0.0f);
  const int64_t words = std::min(width, kWordWidth);
  for (int64_t k = 0; k < words; k += 16) {
    for (int64_t offset = k * prefetch.bytes / words; offset < (k + 16) * prefetch.bytes / words; offset += 64) {
      __builtin_prefetch(prefetch.rows[0] + offset, 0, 3);
      __builtin_prefetch(prefetch.rows[1] + offset, 0, 3);
    }
    const auto take = [&](auto num_words) {
      return race<S, num_words(), kStatistics>(tile, k, first_column, shift, negligible, key, row, moment);
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
    if (statistics.ranks_second)
      statistics.second = max > previous_max ? Lane1::max(previous_max, tile_second<S>(tile, width))
                                             : Lane1::max(statistics.second, max);
  }
  S::store(row.sum, S::fma(sum, S::set(rescale), acc));
  return true;
}

// The bias of a forbidden token wins over whatever its logit is.
template <class S>
void add_bias(const float* bias, int64_t width, float* tile) {
  const auto forbidding = S::set(-kInfinity);
  int64_t j = 0;
  for (; j + 16 <= width; j += 16) {
    const auto added = S::load(bias + j);
    S::store(tile + j, S::select(S::equal(added, forbidding), forbidding, S::add(S::load(tile + j), added)));
  }
  for (; j < width; ++j) tile[j] = bias[j] == -kInfinity ? bias[j] : tile[j] + bias[j];
}

template <class S>
void multiply(float* tile, int64_t width, float factor) {
  for (int64_t j = 0; j < width; j += 16) S::store(tile + j, S::mul(S::load(tile + j), S::set(factor)));
}

MGT_INLINE float load_element(const void* data, int64_t index, mgt_dtype dtype) {
  if (dtype == MGT_FLOAT32) return static_cast<const float*>(data)[index];
  const uint16_t raw = static_cast<const uint16_t*>(data)[index];
  return dtype == MGT_BFLOAT16 ? bfloat16_to_float(raw) : half_to_float(raw);
}

template <class S, mgt_dtype dtype>
MGT_INLINE typename S::F load_vector(const void* data, int64_t index) {
  if constexpr (dtype == MGT_FLOAT32)
    return S::load(static_cast<const float*>(data) + index);
  else
    return S::load(static_cast<const uint16_t*>(data) + index, dtype);
}

// kNegative: the scale is below 0, which would make -inf, a forbidden token, of a conditional logit of +inf
template <class S, bool kNegative = false>
MGT_INLINE typename S::F guide(typename S::F cond, typename S::F uncond, typename S::F scale) {
  const auto guided = S::fma(scale, S::sub(cond, uncond), uncond);
  if constexpr (kNegative) return S::select(S::equal(cond, S::set(kInfinity)), cond, guided);
  return guided;
}

// where a sample's logits of one guidance half start, and their strides
struct Half {
  const void* data;
  int64_t stride_position, stride_token;
};

struct Source {
  Half cond, uncond;
  bool guided;
  mgt_dtype dtype;
  float guidance_scale;
  // of the sample, for random draws
  int64_t first_position;
};

inline Source source_of(const mgt_sample_tokens_args& args, int64_t sample) {
  const auto half = [&](const mgt_logits& logits) {
    const int64_t size = args.dtype == MGT_FLOAT32 ? 4 : 2;
    return Half{static_cast<const char*>(logits.data) + sample * logits.stride_sample * size, logits.stride_position,
                logits.stride_token};
  };
  Source source{half(args.logits),
                {},
                args.uncond_logits.data != nullptr,
                args.dtype,
                args.guidance_scales ? args.guidance_scales[sample] : args.guidance_scale,
                args.first_positions ? args.first_positions[sample] : 0};
  source.uncond = source.guided ? half(args.uncond_logits) : source.cond;
  return source;
}

// one element by the rules: -inf in either half forbids the token, whatever guidance would make of it
MGT_INLINE float guided_element(const Source& source, int64_t position, int64_t column) {
  const auto at = [&](const Half& half) {
    return load_element(half.data, position * half.stride_position + column * half.stride_token, source.dtype);
  };
  const float cond = at(source.cond);
  if (!source.guided) return cond;
  const float uncond = at(source.uncond);
  if (cond == -kInfinity || uncond == -kInfinity) return -kInfinity;
  return guide<Lane1, true>(cond, uncond, source.guidance_scale);
}

inline void stage_by_element(const Source& source, int64_t position, int64_t first_column, int64_t width, float* tile) {
  for (int64_t j = 0; j < width; ++j) tile[j] = guided_element(source, position, first_column + j);
}

// Returns the largest logit: this pass over a tile is the one that waits for memory, so a maximum costs nothing.
template <class S, mgt_dtype dtype, bool kNegative>
float stage_token_major(const Source& source, int64_t position, int64_t first_column, int64_t width, float* tile) {
  using F = typename S::F;
  const int64_t cond = position * source.cond.stride_position + first_column;
  const int64_t uncond = position * source.uncond.stride_position + first_column;
  const F scale = S::set(source.guidance_scale);
  // copies stay in registers, as what is stored could else be the source
  const void *cond_data = source.cond.data, *uncond_data = source.uncond.data;
  const bool guided = source.guided;
  F max0 = S::set(-kInfinity), max1 = max0;
  const auto stage = [&](int64_t j, F& max) {
    F logits = load_vector<S, dtype>(cond_data, cond + j);
    if (guided) logits = guide<S, kNegative>(logits, load_vector<S, dtype>(uncond_data, uncond + j), scale);
    S::store(tile + j, logits);
    max = S::max(logits, max);
  };
  int64_t j = 0;
  for (; j + 32 <= width; j += 32) stage(j, max0), stage(j + 16, max1);
  for (; j + 16 <= width; j += 16) stage(j, max0);
  stage_by_element(source, position, first_column + j, width - j, tile + j);
  float max = largest_lane<S>(S::max(max0, max1));
  for (; j < width; ++j) max = Lane1::max(tile[j], max);
  return max;
}

// Neighbouring positions together: a cache line of the logits holds one column of 16 of them, and a memory page, which
// the next column has left, is worth several lines.
template <class S, mgt_dtype dtype, bool kNegative>
void stage_position_major(const Source& source, int64_t position, int64_t count, int64_t first_column, int64_t width,
                          float (*tiles)[kTileWidth]) {
  const auto scale = S::set(source.guidance_scale);
  const Half source_cond = source.cond, source_uncond = source.uncond;
  const bool guided = source.guided;
  const int64_t even_count = count / 16 * 16, even_width = width / 16 * 16;
  for (int64_t j = 0; j < even_width; j += 16) {
    for (int64_t p = 0; p < even_count; p += 16) {
      typename S::F rows[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t column = first_column + j + i;
        const auto load = [&](const Half& half) {
          return load_vector<S, dtype>(half.data, position + p + column * half.stride_token);
        };
        rows[i] = guided ? guide<S, kNegative>(load(source_cond), load(source_uncond), scale) : load(source_cond);
      }
      S::transpose(rows);
      for (int i = 0; i < 16; ++i) S::store(tiles[p + i] + j, rows[i]);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t j = i < even_count ? even_width : 0;
    stage_by_element(source, position + i, first_column + j, width - j, tiles[i] + j);
  }
}

// One tile of each row of a group. Returns the largest logit of a single row, NaN for several.
template <class S, mgt_dtype dtype>
float stage(const Source& source, bool by_row, int64_t position, int64_t count, int64_t first_column, int64_t width,
            float (*tiles)[kTileWidth]) {
  const auto stage_guided = [&](auto negative) {
    if (by_row) return stage_token_major<S, dtype, negative()>(source, position, first_column, width, tiles[0]);
    stage_position_major<S, dtype, negative()>(source, position, count, first_column, width, tiles);
    return std::numeric_limits<float>::quiet_NaN();
  };
  return source.guidance_scale < 0.0f ? stage_guided(std::true_type()) : stage_guided(std::false_type());
}

// What happens to the staged logits of one row before they compete; `max` is theirs, or NaN where it is not known yet.
// Returns the largest logit.
template <class S>
float finish_tile(const mgt_sample_tokens_args& args, const PhiloxKey& noise_key, int64_t first_column, int64_t width,
                  float* tile, float max) {
  for (int64_t j = width; j % 16; ++j) tile[j] = -kInfinity;
  const bool noisy = args.noise_scale != 0.0f;
  const bool tempered = args.temperature != 0.0f && args.temperature != 1.0f;
  const bool holds_mask = args.mask_token_id >= first_column && args.mask_token_id < first_column + width;
  if (args.token_bias) add_bias<S>(args.token_bias + first_column, width, tile);
  if (noisy) add_noise<S>(tile, width, first_column, noise_key, args.noise_scale);
  if (tempered) multiply<S>(tile, width, 1.0f / args.temperature);
  if (holds_mask) tile[args.mask_token_id - first_column] = -kInfinity;
  return args.token_bias || noisy || tempered || holds_mask || max != max ? tile_max<S>(tile, width) : max;
}

// Takes one staged tile of a row into the row's state; false where its logits are bad.
template <class S, bool kStatistics>
bool take_tile(const mgt_sample_tokens_args& args, const Source& source, uint64_t seed, int64_t position,
               int64_t first_column, int64_t width, float staged_max, bool greedy, const Prefetch& prefetch,
               float* tile, RowState& row, RowStatistics& statistics) {
  const auto position32 = static_cast<uint32_t>(source.first_position + position);
  const auto step = static_cast<uint32_t>(args.step);
  const PhiloxKey noise_key(seed, position32, step, kStreamNoise), token_key(seed, position32, step, kStreamToken);
  const auto take = [&](float max) {
    max = finish_tile<S>(args, noise_key, first_column, width, tile, max);
    return consume_tile<S, kStatistics>(tile, width, max, first_column, token_key, greedy, prefetch, row, statistics);
  };
  if (take(staged_max)) return true;
  // NaN or +inf: of forbidden tokens (then the rules give -inf, at the price of a slow reading) or of bad logits
  stage_by_element(source, position, first_column, width, tile);
  return take(std::numeric_limits<float>::quiet_NaN());
}

// what the lanes hold together, added in one fixed tree
MGT_INLINE float sum_of_lanes(float lane[16]) {
  for (int half_lanes = 8; half_lanes; half_lanes /= 2)
    for (int i = 0; i < half_lanes; ++i) lane[i] += lane[i + half_lanes];
  return lane[0];
}

// the tile that this row, or the next position where that is read too, reads next: fetched while the current one
// computes
template <mgt_dtype dtype>
Prefetch next_tile(const mgt_sample_tokens_args& args, const Source& source, const int64_t* tokens, int64_t position,
                   int64_t column) {
  if (column >= args.num_tokens) {
    column = 0;
    position += 1;
    if (position >= args.num_positions || !is_read(args, tokens[1])) return {{nullptr, nullptr}, 0};
  }
  const int64_t size = dtype == MGT_FLOAT32 ? 4 : 2;
  const auto start = [&](const Half& half) {
    return static_cast<const char*>(half.data) + (position * half.stride_position + column) * size;
  };
  return {{start(source.cond), start(source.uncond)}, std::min(kTileWidth, args.num_tokens - column) * size};
}

// What lies below is what is left of forbidden tokens, 87 exp(-87) each.
constexpr float kLeastEntropy = 0x1p-80f;

struct Outputs {
  const mgt_sample_tokens_outputs& asked;

  // whether the tiles are to be asked for more than the draw needs
  bool needs_statistics() const { return asked.argmax || asked.margin || asked.entropy || asked.known_logprob; }

  // a row as it stays where its logits are not read
  void begin(int64_t row, int64_t token) const {
    asked.token_ids[row] = token;
    if (asked.argmax) asked.argmax[row] = token;
    for (float* statistic : {asked.logprob, asked.max_logprob, asked.margin, asked.entropy, asked.logsumexp,
                             asked.known_logprob, asked.logit})
      if (statistic) statistic[row] = kInfinity;
  }

  // a row that was read; draws: it is masked
  void finish(int64_t row, bool draws, float temperature, RowState& state, RowStatistics& statistics) const {
    const float sum = sum_of_lanes(state.sum), log_sum = log_f32<Lane1>(sum);
    if (draws) {
      asked.token_ids[row] = state.best_token;
      if (asked.logprob) asked.logprob[row] = (state.best_logit - state.max) - log_sum;
      if (asked.logit) asked.logit[row] = temperature == 0.0f ? state.best_logit : state.best_logit * temperature;
    } else if (asked.known_logprob) {
      asked.known_logprob[row] = (statistics.known_logit - state.max) - log_sum;
    }
    if (asked.argmax) asked.argmax[row] = statistics.argmax;
    if (asked.max_logprob) asked.max_logprob[row] = -log_sum;
    if (asked.margin) asked.margin[row] = (1.0f - exp_nonpositive<Lane1>(statistics.second - state.max)) / sum;
    if (asked.entropy) {
      const float entropy = log_sum - sum_of_lanes(statistics.moment) / sum;
      asked.entropy[row] = entropy > kLeastEntropy ? entropy : 0.0f;
    }
    if (asked.logsumexp) asked.logsumexp[row] = state.max + log_sum;
  }
};

template <class S, mgt_dtype dtype, bool kStatistics>
int64_t sample_groups(const mgt_sample_tokens_args& args, const Outputs& outputs, int64_t begin, int64_t end,
                      float* tile_memory) {
  const bool by_row = token_major(args);
  const int64_t group_size = by_row ? 1 : kGroupPositions;
  const int64_t num_groups = groups_per_sample(args);
  auto* tiles = reinterpret_cast<float (*)[kTileWidth]>(tile_memory);
  RowState rows[kGroupPositions];
  RowStatistics statistics[kStatistics ? kGroupPositions : 1];
  bool good[kGroupPositions];
  int64_t bad_row = -1;

  for (int64_t group = begin; group < end; ++group) {
    const int64_t sample = group / num_groups;
    const int64_t first = group % num_groups * group_size;
    const int64_t count = std::min(group_size, args.num_positions - first);
    const int64_t* tokens = args.tokens + sample * args.num_positions + first;
    const int64_t first_row = sample * args.num_positions + first;
    bool reads[kGroupPositions], any = false;
    for (int64_t i = 0; i < count; ++i) {
      reads[i] = is_read(args, tokens[i]);
      any |= reads[i];
      outputs.begin(first_row + i, tokens[i]);
    }
    if (!any) continue;

    const Source source = source_of(args, sample);
    const auto seed = static_cast<uint64_t>(args.seeds[sample]);
    std::fill(rows, rows + count, RowState{});
    if constexpr (kStatistics)
      std::fill(statistics, statistics + count, RowStatistics{outputs.asked.margin != nullptr});
    std::fill(good, good + count, true);

    for (int64_t first_column = 0; first_column < args.num_tokens; first_column += kTileWidth) {
      const int64_t width = std::min(kTileWidth, args.num_tokens - first_column);
      const float staged_max = stage<S, dtype>(source, by_row, first, count, first_column, width, tiles);
      const Prefetch prefetch = by_row ? next_tile<dtype>(args, source, tokens, first, first_column + width)
                                       : Prefetch{{nullptr, nullptr}, 0};
      for (int64_t i = 0; i < count; ++i) {
        if (!reads[i] || !good[i]) continue;
        // nothing is drawn at a known position
        const bool greedy = args.temperature == 0.0f || tokens[i] != args.mask_token_id;
        RowStatistics& own = statistics[kStatistics ? i : 0];
        good[i] = take_tile<S, kStatistics>(args, source, seed, first + i, first_column, width, staged_max, greedy,
                                            prefetch, tiles[i], rows[i], own);
        if (kStatistics && tokens[i] >= first_column && tokens[i] < first_column + width)
          own.known_logit = tiles[i][tokens[i] - first_column];
      }
    }

    for (int64_t i = 0; i < count; ++i) {
      if (!reads[i]) continue;
      if (good[i] && rows[i].best_token >= 0)
        outputs.finish(first_row + i, tokens[i] == args.mask_token_id, args.temperature, rows[i],
                       statistics[kStatistics ? i : 0]);
      else if (bad_row < 0)
        bad_row = first_row + i;
    }
  }
  return bad_row;
}

template <class S>
int64_t sample_tokens(const mgt_sample_tokens_args& args, const mgt_sample_tokens_outputs& asked, int64_t begin,
                      int64_t end, float* tiles) {
  const Outputs outputs{asked};
  const auto sample = [&](auto dtype) {
    constexpr mgt_dtype kDtype = dtype();
    if (outputs.needs_statistics()) return sample_groups<S, kDtype, true>(args, outputs, begin, end, tiles);
    return sample_groups<S, kDtype, false>(args, outputs, begin, end, tiles);
  };
  switch (args.dtype) {
    case MGT_BFLOAT16: return sample(std::integral_constant<mgt_dtype, MGT_BFLOAT16>());
    case MGT_FLOAT16: return sample(std::integral_constant<mgt_dtype, MGT_FLOAT16>());
    default: return sample(std::integral_constant<mgt_dtype, MGT_FLOAT32>());
  }
}

}  // namespace
}  // namespace mgt
