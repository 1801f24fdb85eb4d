// sample_tokens, written once against the lanes of simd_*.h.
//
// Bound by: DRAM reads of both guidance halves while the draw stays cheap (peaked logits), by Philox's multiplications
// on flat logits, by Philox and Box-Muller with noise on. A row passes through in tiles of 2048 columns that stay in
// L1: guided logits, their maximum, then exp for the logsumexp and a test per column that rules out nearly all of them
// before any logarithm is taken.
#pragma once

namespace mgt {
namespace {

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

// As sample_groups, with every row staged whole before it is drawn from, because what is kept is known only then.
template <class S, mgt_dtype dtype, bool kStatistics>
int64_t sample_truncated_groups(const mgt_sample_tokens_args& args, const Outputs& outputs, int64_t begin, int64_t end,
                                float* memory) {
  const bool by_row = token_major(args);
  const int64_t group_size = by_row ? 1 : kGroupPositions;
  const int64_t num_groups = groups_per_sample(args), num_tiles = row_tiles(args.num_tokens);
  const bool full = args.logprob_of == MGT_LOGPROB_OF_FULL;
  auto* tiles = reinterpret_cast<float (*)[kTileWidth]>(memory);
  auto* maxima = reinterpret_cast<float (*)[kTileMaxima]>(tiles + num_tiles * group_size);
  auto* keys = reinterpret_cast<uint32_t*>(maxima + num_tiles * group_size);
  uint32_t* weights = keys + num_tiles * kTileWidth;
  int64_t bad_row = -1;

  for (int64_t group = begin; group < end; ++group) {
    const int64_t sample = group / num_groups;
    const int64_t first = group % num_groups * group_size;
    const int64_t count = std::min(group_size, args.num_positions - first);
    const int64_t* tokens = args.tokens + sample * args.num_positions + first;
    const int64_t first_row = sample * args.num_positions + first;
    bool reads[kGroupPositions], good[kGroupPositions], any = false;
    for (int64_t i = 0; i < count; ++i) {
      reads[i] = good[i] = is_read(args, tokens[i]);
      any |= reads[i];
      outputs.begin(first_row + i, tokens[i]);
    }
    if (!any) continue;

    const Source source = source_of(args, sample);
    const auto seed = static_cast<uint64_t>(args.seeds[sample]);
    const auto step = static_cast<uint32_t>(args.step);
    const auto place = [&](int64_t i) { return static_cast<uint32_t>(source.first_position + first + i); };
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t first_column = t * kTileWidth, width = std::min(kTileWidth, args.num_tokens - first_column);
      const float staged_max =
          stage<S, dtype>(source, by_row, first, count, first_column, width, tiles + t * group_size);
      for (int64_t i = 0; i < count; ++i) {
        if (!good[i]) continue;
        const PhiloxKey noise_key(seed, place(i), step, kStreamNoise);
        float *tile = tiles[t * group_size + i], *tile_maxima = maxima[t * group_size + i];
        finish_tile<S>(args, noise_key, first_column, width, tile, staged_max);
        if (survey_tile<S>(tile, width, tile_maxima)) continue;
        stage_by_element(source, first + i, first_column, width, tile);
        finish_tile<S>(args, noise_key, first_column, width, tile, staged_max);
        good[i] = survey_tile<S>(tile, width, tile_maxima);
      }
    }

    for (int64_t i = 0; i < count; ++i) {
      if (!reads[i]) continue;
      const StagedRow row{tiles + i, maxima + i, group_size, args.num_tokens, keys, weights};
      float max = -kInfinity;
      const auto tile_max_of = [&](int64_t t) { return largest_lane<S>(tile_largest<S>(row.tile_maxima(t))); };
      for (int64_t t = 0; good[i] && t < num_tiles; ++t) max = std::max(max, tile_max_of(t));
      if (max == -kInfinity) {
        if (bad_row < 0) bad_row = first_row + i;
        continue;
      }
      const float bound = kept_from<S>(args, row, max);
      const PhiloxKey token_key(seed, place(i), step, kStreamToken);
      const bool greedy = args.temperature == 0.0f || tokens[i] != args.mask_token_id;
      RowState kept, all;
      RowStatistics statistics{outputs.asked.margin != nullptr}, unused;
      for (int64_t t = 0; t < num_tiles; ++t) {
        const int64_t first_column = t * kTileWidth, width = row.width(t);
        const float *tile = row.tile(t), tile_max = tile_max_of(t);
        // staging a row waits for memory, and the race does not
        const Prefetch prefetch = by_row && reads_next(args, tokens, first)
                                      ? tile_at<dtype>(args, source, first + 1, first_column)
                                      : Prefetch{{nullptr, nullptr}, 0};
        const auto take = [&](float from, bool draws, RowState& state, RowStatistics& own) {
          if (tile_max < from) return;
          consume_tile<S, kStatistics, true>(tile, width, tile_max, from, first_column, token_key, greedy || !draws,
                                             prefetch, state, own);
          if (!kStatistics || tokens[i] < first_column || tokens[i] >= first_column + width) return;
          const float known_logit = tile[tokens[i] - first_column];
          if (known_logit >= from) own.known_logit = known_logit;
        };
        if (full) take(-kInfinity, false, all, statistics);
        take(bound, true, kept, full ? unused : statistics);
      }
      if (full) {
        kept.max = all.max;
        std::copy(all.sum, all.sum + 16, kept.sum);
      }
      outputs.finish(first_row + i, tokens[i] == args.mask_token_id, args.temperature, kept, statistics);
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
    const auto sample_rows = [&](auto statistics) {
      if (truncates(args)) return sample_truncated_groups<S, kDtype, statistics()>(args, outputs, begin, end, tiles);
      return sample_groups<S, kDtype, statistics()>(args, outputs, begin, end, tiles);
    };
    return outputs.needs_statistics() ? sample_rows(std::true_type()) : sample_rows(std::false_type());
  };
  switch (args.dtype) {
    case MGT_BFLOAT16: return sample(std::integral_constant<mgt_dtype, MGT_BFLOAT16>());
    case MGT_FLOAT16: return sample(std::integral_constant<mgt_dtype, MGT_FLOAT16>());
    default: return sample(std::integral_constant<mgt_dtype, MGT_FLOAT32>());
  }
}

}  // namespace
}  // namespace mgt
