// differential_sample, written once against the lanes of simd_*.h.
//
// Bound by: Philox and two exponentials per column on flat logits, DRAM (both guidance halves once, two bytes of
// history in and two out) on peaked ones. A row stays in the thread's tiles while three things happen: sample_tokens'
// own code stages it and adds up its softmax, tile by tile; then, with its logsumexp known, one pass compares it with
// its history, races p and |p - q| with the same words, and overwrites the history in place.
#pragma once

namespace mgt {
namespace {

// A history code stands for -log q in nats: 2^-11 apart below 24, where q is relatively exact to 2^-12, and 2^-4 apart
// above, up to 1047.9375. The largest also stands for q = 0. Both pieces are straight lines through (24, 49152), so
// that min and max pick the right one.
constexpr uint16_t kLastCode = 65535;
constexpr float kCodesPerNat = 2048.0f, kFarCodesPerNat = 16.0f;
constexpr float kFarOffset = 49152.0f - 24.0f * kFarCodesPerNat;

// adding 2^23 leaves the nearest integer in the low bits of the mantissa
constexpr float kTwoPow23 = 8388608.0f;

template <class S>
MGT_INLINE typename S::U encode(typename S::F minus_log) {
  const auto near = S::fma(minus_log, S::set(kCodesPerNat), S::set(kTwoPow23));
  const auto far = S::fma(minus_log, S::set(kFarCodesPerNat), S::set(kTwoPow23 + kFarOffset));
  return S::bits(S::min(S::min(near, far), S::set(kTwoPow23 + kLastCode)));
}

// log q
template <class S>
MGT_INLINE typename S::F decode(typename S::U code) {
  const auto value = S::int_to_float(code);
  return S::min(S::mul(value, S::set(-1.0f / kCodesPerNat)),
                S::fma(value, S::set(-1.0f / kFarCodesPerNat), S::set(kFarOffset / kFarCodesPerNat)));
}

// Below this, |p - q| summed over a row is what rounding the history can make of p = q: then w = p.
constexpr float kSameDistribution = 0x1p-11f;

// the clipped difference of the published code
constexpr float kLeastDifference = 1e-6f;

// A weight below this is never drawn: what the race would have to take the logarithm of is then a normal float.
constexpr float kLeastWeight = 0x1p-100f;

// Groups of columns whose p and q are both below exp(-40) are left out of D and of the sum of w: with 1048 nats at most
// each, less than num_tokens 5e-15.
constexpr float kNegligibleLog = -40.0f;
// more than any Gumbel noise, and the rounding of scores besides: what misses the best score by more cannot win
constexpr float kLargestGumbel = 23.0f;

// how a row's weights w come about
enum class Weights { none, difference, clipped_difference };

// What compares a row with its history, after some of its columns.
struct DifferenceState {
  float best_score = -kInfinity;
  float best_weight = 0.0f;
  int64_t best_token = -1;
  // words below w * race_scale can win
  float race_scale = kInfinity;

  void compete(float weight, float score, int64_t token) {
    if (score < best_score || (score == best_score && token > best_token)) return;
    best_score = score;
    best_weight = weight;
    best_token = token;
    race_scale = mgt::race_scale(0.0f, score);
  }
};

struct DifferenceSums {
  float divergence[16];
  float weight[16];
};

// one row, its logsumexp known
struct DifferenceRow {
  const float* tile;
  int64_t first_column, num_tokens;
  uint16_t* history;
  // what stands for the last columns where they do not fill a vector
  uint16_t* tail;
  float max, log_sum, inverse_sum;
  bool draws, greedy, stores;

  const uint16_t* code(int64_t column) const {
    return column < num_tokens / 16 * 16 ? history + column : tail + column % 16;
  }
  // the codes of 16 columns from this one on
  uint16_t* codes(int64_t column) const { return column + 16 <= num_tokens ? history + column : tail; }
};

// the weights of a vector; a token that is forbidden now has none, whatever its q
template <class S, Weights weights>
MGT_INLINE typename S::F weigh(typename S::F logit, typename S::F p, typename S::F q) {
  const auto difference = S::sub(p, q);
  const auto forbidden = S::equal(logit, S::set(-kInfinity));
  if constexpr (weights == Weights::clipped_difference)
    return S::select(forbidden, S::set(0.0f), S::max(difference, S::set(kLeastDifference)));
  return S::select(forbidden, S::set(0.0f), S::from_bits(S::bit_and(S::bits(difference), S::set_u(0x7fffffffu))));
}

// Below this, exp stays where it is: products with it are normal floats still, and nothing sees the difference.
constexpr float kLowestLog = -70.0f;

// exp(log), which is raised to kLowestLog
template <class S>
MGT_INLINE typename S::F clamped_exp(typename S::F& log) {
  log = S::max(S::set(kLowestLog), log);
  return exp_nonpositive<S>(log);
}

// Kahan's: a weight of 1 among thousands of 1e-6 would round each of them the same way.
template <class S>
struct CompensatedSum {
  typename S::F sum, excess;
};

template <class S>
MGT_INLINE void add_compensated(CompensatedSum<S>& total, typename S::F term) {
  const auto corrected = S::sub(term, total.excess);
  const auto sum = S::add(total.sum, corrected);
  total.excess = S::sub(S::sub(sum, total.sum), corrected);
  total.sum = sum;
}

// one column of vectors of a tile: words 0..num_words-1 share a Philox block
template <class S, Weights weights, int num_words>
MGT_INLINE void compare(const DifferenceRow& row, int64_t k, const PhiloxKey& key, RowState& plain,
                        DifferenceState& different, typename S::F& divergence, CompensatedSum<S>& weight_sum) {
  using F = typename S::F;
  constexpr bool has_weights = weights != Weights::none;
  // log p = shifted - log_sum
  F logit[num_words], shifted[num_words], log_q[num_words];
  const F log_sum = S::set(row.log_sum);
#pragma GCC unroll 4
  for (int w = 0; w < num_words; ++w) {
    logit[w] = S::load(row.tile + w * kWordWidth + k);
    shifted[w] = S::sub(logit[w], S::set(row.max));
    uint16_t* codes = row.codes(row.first_column + w * kWordWidth + k);
    if constexpr (has_weights) log_q[w] = decode<S>(S::load_u16(codes));
    if (row.stores) S::store_low16(codes, encode<S>(S::sub(log_sum, shifted[w])));
  }

  // every path groups the same 16 x num_words columns, so what is left out is the same everywhere
  if constexpr (weights != Weights::clipped_difference) {
    float lowest = kNegligibleLog;
    if (row.draws && !row.greedy) {
      lowest = std::min(lowest, (plain.best_score - row.max) - kLargestGumbel);
      if constexpr (has_weights) lowest = std::min(lowest, different.best_score - kLargestGumbel);
    }
    const F negligible = S::set(lowest);
    // log p <= shifted
    F largest = has_weights ? S::max(shifted[0], log_q[0]) : shifted[0];
#pragma GCC unroll 4
    for (int w = 1; w < num_words; ++w)
      largest = S::max(largest, has_weights ? S::max(shifted[w], log_q[w]) : shifted[w]);
    if (!S::to_bits(S::not_below(largest, negligible))) return;
  }

  F limit[num_words], weight[num_words], term[num_words];
  const F plain_scale = S::set(plain.race_scale), scale = S::set(different.race_scale);
  const F inverse_sum = S::set(row.inverse_sum);
#pragma GCC unroll 4
  for (int w = 0; w < num_words; ++w) {
    const F exp = clamped_exp<S>(shifted[w]);
    limit[w] = S::mul(exp, plain_scale);
    if constexpr (has_weights) {
      const F p = S::mul(exp, inverse_sum);
      term[w] = S::mul(p, S::sub(S::sub(shifted[w], log_sum), log_q[w]));
      weight[w] = weigh<S, weights>(logit[w], p, clamped_exp<S>(log_q[w]));
      limit[w] = S::max(S::mul(weight[w], scale), limit[w]);
    }
  }
  if constexpr (has_weights) {
    divergence = S::add(divergence, add_words<S, num_words>(term));
    add_compensated<S>(weight_sum, add_words<S, num_words>(weight));
  }
  if (!row.draws) return;

  if (row.greedy) {
    if constexpr (has_weights) {
      for (int w = 0; w < num_words; ++w) {
        uint32_t lanes = S::to_bits(S::not_below(weight[w], S::set(different.best_weight)));
        float value[16];
        if (lanes) S::store(value, weight[w]);
        for (; lanes; lanes &= lanes - 1) {
          const int lane = __builtin_ctz(lanes);
          if (value[lane] >= kLeastWeight)
            different.compete(value[lane], value[lane], row.first_column + w * kWordWidth + k + lane);
        }
      }
    }
    return;
  }
  const F half = S::set(0.5f);
  auto any = S::less(half, limit[0]);
#pragma GCC unroll 4
  for (int w = 1; w < num_words; ++w) any = S::mask_or(any, S::less(half, limit[w]));
  if (!S::to_bits(any)) return;
  const auto block = S::sequence(static_cast<uint32_t>(row.first_column / 4 + k));
  const PhiloxWords<S> words = philox<S>(block, key);
  typename S::M pass[num_words];
#pragma GCC unroll 4
  for (int w = 0; w < num_words; ++w) pass[w] = S::less(S::uint_to_float(words.word[w]), limit[w]);
  auto any_pass = pass[0];
#pragma GCC unroll 4
  for (int w = 1; w < num_words; ++w) any_pass = S::mask_or(any_pass, pass[w]);
  if (__builtin_expect(S::to_bits(any_pass) == 0, 1)) return;
  for (int w = 0; w < num_words; ++w) {
    uint32_t lanes = S::to_bits(pass[w]), word[16];
    float value[16];
    if (!lanes) continue;
    S::store_u(word, words.word[w]);
    if constexpr (has_weights) S::store(value, weight[w]);
    for (; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      const int64_t column = w * kWordWidth + k + lane, token = row.first_column + column;
      const float noise = gumbel<Lane1>(word[lane]);
      compete(plain, row.tile[column], row.tile[column] + noise, token);
      if constexpr (has_weights)
        if (value[lane] >= kLeastWeight) different.compete(value[lane], log_f32<Lane1>(value[lane]) + noise, token);
    }
  }
}

// The token of the largest logit leads the race of the weights too, which bounds how many others are worth a look.
template <Weights weights>
void lead(const DifferenceRow& row, const PhiloxKey& key, const RowState& plain, DifferenceState& different) {
  float shifted = plain.best_logit - row.max, log_q = decode<Lane1>(*row.code(plain.best_token));
  const float p = clamped_exp<Lane1>(shifted) * row.inverse_sum, q = clamped_exp<Lane1>(log_q);
  const float weight = weigh<Lane1, weights>(plain.best_logit, p, q);
  if (weight < kLeastWeight) return;
  const float score = row.greedy ? weight : log_f32<Lane1>(weight) + gumbel_at(key, plain.best_token);
  different.compete(weight, score, plain.best_token);
}

// Compares a row with its history and replaces that.
template <class S, Weights weights>
void compare_row(DifferenceRow row, const float* tiles, int64_t tile_pitch, const PhiloxKey& key, RowState& plain,
                 DifferenceState& different, DifferenceSums& sums) {
  using F = typename S::F;
  F divergence = S::set(0.0f);
  CompensatedSum<S> weight_sum{S::set(0.0f), S::set(0.0f)};
  if constexpr (weights != Weights::none)
    if (row.draws) lead<weights>(row, key, plain, different);
  for (row.first_column = 0; row.first_column < row.num_tokens; row.first_column += kTileWidth) {
    row.tile = tiles + row.first_column / kTileWidth * tile_pitch;
    const int64_t width = std::min(kTileWidth, row.num_tokens - row.first_column);
    const int64_t words = std::min(width, kWordWidth);
    const auto take = [&](auto num_words, int64_t k) {
      compare<S, weights, num_words()>(row, k, key, plain, different, divergence, weight_sum);
    };
    for (int64_t k = 0; k < words; k += 16) {
      switch ((width - k + kWordWidth - 1) / kWordWidth) {
        case 4: take(std::integral_constant<int, 4>(), k); break;
        case 3: take(std::integral_constant<int, 3>(), k); break;
        case 2: take(std::integral_constant<int, 2>(), k); break;
        default: take(std::integral_constant<int, 1>(), k);
      }
    }
  }
  S::store(sums.divergence, divergence);
  S::store(sums.weight, weight_sum.sum);
}

// The published code's aliasing: a selected row leaves its weights behind as the distribution to compare with.
template <class S>
void edit_history(DifferenceRow row, const float* tiles, int64_t tile_pitch, bool selected) {
  for (int64_t column = 0; column < row.num_tokens; column += 16) {
    const auto logit = S::load(tiles + column / kTileWidth * tile_pitch + column % kTileWidth);
    auto shifted = S::sub(logit, S::set(row.max));
    uint16_t* codes = row.codes(column);
    auto minus_log = S::sub(S::set(row.log_sum), shifted);
    if (selected) {
      auto log_q = decode<S>(S::load_u16(codes));
      const auto p = S::mul(clamped_exp<S>(shifted), S::set(row.inverse_sum)), q = clamped_exp<S>(log_q);
      const auto weight = weigh<S, Weights::clipped_difference>(logit, p, q);
      minus_log = S::select(S::less(S::set(0.0f), weight), S::sub(S::set(0.0f), log_f32<S>(weight)), S::set(kInfinity));
      // w <= 1 up to the rounding of p
      minus_log = S::max(S::set(0.0f), minus_log);
    }
    S::store_low16(codes, encode<S>(minus_log));
  }
}

template <class S>
void finish_row(const DifferentialCall& call, DifferentialPass pass, int64_t index, int64_t position, uint64_t seed,
                const float* tiles, int64_t tile_pitch, bool masked, RowState& plain) {
  const mgt_differential_sample_args& args = call.args;
  const mgt_sample_tokens_args& sample = call.sample;
  const int64_t num_tokens = sample.num_tokens;
  const bool greedy = sample.temperature == 0.0f;
  const bool has_history = args.has_history && call.written[index];
  const bool keeps_history = args.aliased_history && args.has_history;
  const float sum = sum_of_lanes(plain.sum);
  uint16_t tail[16];
  uint16_t* history = call.history + index * num_tokens;
  const int64_t full = num_tokens / 16 * 16;
  std::fill(tail, tail + 16, kLastCode);
  if (has_history) std::copy(history + full, history + num_tokens, tail);
  const DifferenceRow row{nullptr,    0,      num_tokens, history,       tail, plain.max, log_f32<Lane1>(sum),
                          1.0f / sum, masked, greedy,     !keeps_history};
  DifferentialChoice& choice = call.choices[index];

  if (pass == DifferentialPass::edit_history) {
    edit_history<S>(row, tiles, tile_pitch, has_history && choice.selected);
    std::copy(tail, tail + (num_tokens - full), history + full);
    call.written[index] = 1;
    return;
  }

  const PhiloxKey key(seed, static_cast<uint32_t>(position), static_cast<uint32_t>(sample.step), kStreamToken);
  if (!greedy) {
    // the largest logit leads the race, which bounds how many of the others are worth a look
    plain.best_score = plain.max + gumbel_at(key, plain.best_token);
    plain.race_scale = race_scale(plain.max, plain.best_score);
  }
  DifferenceState different;
  DifferenceSums sums;
  if (!has_history)
    compare_row<S, Weights::none>(row, tiles, tile_pitch, key, plain, different, sums);
  else if (args.variant == MGT_DIFFERENTIAL_OFFICIAL)
    compare_row<S, Weights::clipped_difference>(row, tiles, tile_pitch, key, plain, different, sums);
  else
    compare_row<S, Weights::difference>(row, tiles, tile_pitch, key, plain, different, sums);
  if (!keeps_history) {
    std::copy(tail, tail + (num_tokens - full), history + full);
    call.written[index] = 1;
  }

  if (masked) {
    call.token_ids[index] = plain.best_token;
    call.logprob[index] = (plain.best_logit - plain.max) - row.log_sum;
  }
  choice = {call.logprob[index], static_cast<int32_t>(call.token_ids[index]), 0};
  call.divergence[index] = kInfinity;
  if (!has_history) return;
  call.divergence[index] = sum_of_lanes(sums.divergence);
  const float weight_sum = sum_of_lanes(sums.weight);
  if (masked && (args.variant == MGT_DIFFERENTIAL_OFFICIAL || weight_sum >= kSameDistribution)) {
    choice.token = static_cast<int32_t>(different.best_token);
    choice.logprob = log_f32<Lane1>(different.best_weight / weight_sum);
  }
}

template <class S, mgt_dtype dtype>
int64_t differential_groups(const DifferentialCall& call, DifferentialPass pass, int64_t begin, int64_t end,
                            float* tile_memory) {
  const mgt_sample_tokens_args& args = call.sample;
  const bool by_row = token_major(args);
  const int64_t group_size = by_row ? 1 : kGroupPositions;
  const int64_t num_groups = groups_per_sample(args);
  // the published code ranks known positions too, so it reads them
  const bool reads_known = call.args.variant == MGT_DIFFERENTIAL_OFFICIAL;
  // tile t of position i of the group is tiles[t * group_size + i]
  auto* tiles = reinterpret_cast<float (*)[kTileWidth]>(tile_memory);
  const int64_t tile_pitch = group_size * kTileWidth;
  RowState rows[kGroupPositions];
  RowStatistics no_statistics;
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
      reads[i] = reads_known || tokens[i] == args.mask_token_id;
      any |= reads[i];
      rows[i] = RowState{};
      good[i] = true;
      if (pass == DifferentialPass::edit_history) continue;
      call.token_ids[first_row + i] = tokens[i];
      call.logprob[first_row + i] = kInfinity;
      call.divergence[first_row + i] = kInfinity;
      if (!reads[i]) call.written[first_row + i] = 0;
    }
    if (!any) continue;

    const Source source = source_of(args, sample);
    const auto seed = static_cast<uint64_t>(args.seeds[sample]);
    for (int64_t first_column = 0; first_column < args.num_tokens; first_column += kTileWidth) {
      const int64_t width = std::min(kTileWidth, args.num_tokens - first_column);
      auto* tile = tiles + first_column / kTileWidth * group_size;
      const float staged_max = stage<S, dtype>(source, by_row, first, count, first_column, width, tile);
      const Prefetch prefetch = by_row ? next_tile<dtype>(args, source, tokens, first, first_column + width)
                                       : Prefetch{{nullptr, nullptr}, 0};
      // greedy: the race waits for the history, so that both distributions share its random words
      for (int64_t i = 0; i < count; ++i)
        if (reads[i] && good[i])
          good[i] = take_tile<S, false>(args, source, seed, first + i, first_column, width, staged_max, true, prefetch,
                                        tile[i], rows[i], no_statistics);
    }

    for (int64_t i = 0; i < count; ++i) {
      if (!reads[i]) continue;
      if (good[i] && rows[i].best_token >= 0)
        finish_row<S>(call, pass, first_row + i, source.first_position + first + i, seed, tiles[i], tile_pitch,
                      tokens[i] == args.mask_token_id, rows[i]);
      else if (bad_row < 0)
        bad_row = first_row + i;
    }
  }
  return bad_row;
}

template <class S>
int64_t differential_sample(const DifferentialCall& call, DifferentialPass pass, int64_t begin, int64_t end,
                            float* tiles) {
  switch (call.sample.dtype) {
    case MGT_BFLOAT16: return differential_groups<S, MGT_BFLOAT16>(call, pass, begin, end, tiles);
    case MGT_FLOAT16: return differential_groups<S, MGT_FLOAT16>(call, pass, begin, end, tiles);
    default: return differential_groups<S, MGT_FLOAT32>(call, pass, begin, end, tiles);
  }
}

}  // namespace
}  // namespace mgt
