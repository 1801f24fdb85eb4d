/* A C99 program on the library: draws one sample, plainly and then in two steps of differential sampling, and prints
 * the token ids and log-probabilities. */
#include <stdio.h>
#include <stdlib.h>

#include "mgt_kernels.h"

enum { POSITIONS = 5, TOKENS = 40 };

static int differential_steps(const mgt_context* context, mgt_sample_tokens_args sample, float* logits) {
  static uint16_t history[POSITIONS * TOKENS];
  uint8_t written[POSITIONS];
  int64_t token_ids[POSITIONS], error_index = -1, workspace_bytes;
  float logprob[POSITIONS], divergence[POSITIONS];
  mgt_differential_sample_args args = {0};
  void* workspace;
  int i, step;
  args.struct_size = sizeof args;
  args.sample = &sample;
  args.variant = MGT_DIFFERENTIAL_PAPER;
  args.share = 0.75;
  workspace_bytes = mgt_differential_sample_workspace(context, &args);
  if (workspace_bytes < 0) return 5;
  workspace = malloc((size_t)workspace_bytes);
  for (step = 0; step < 2; ++step) {
    sample.step = step;
    args.has_history = step;
    for (i = 0; i < POSITIONS * TOKENS; ++i) logits[i] = (float)(i % (7 - step)) * 0.5f;
    if (mgt_differential_sample(context, &args, history, written, token_ids, logprob, divergence, workspace,
                                workspace_bytes, &error_index) != MGT_OK)
      return 6;
    for (i = 0; i < POSITIONS; ++i) printf("%d %a\n", (int)token_ids[i], logprob[i]);
  }
  if (mgt_differential_sample(context, &args, history, written, token_ids, logprob, divergence, workspace,
                              workspace_bytes - 1, &error_index) != MGT_INVALID_ARGUMENT)
    return 7;
  args.share = 1.5;
  if (mgt_differential_sample_workspace(context, &args) != -1) return 8;
  if (mgt_differential_sample(context, &args, history, written, token_ids, logprob, divergence, workspace,
                              workspace_bytes, &error_index) != MGT_INVALID_ARGUMENT)
    return 9;
  free(workspace);
  return 0;
}

int main(void) {
  float logits[POSITIONS * TOKENS];
  int64_t tokens[POSITIONS], token_ids[POSITIONS], seed = 7, error_index = -1;
  float logprob[POSITIONS];
  mgt_context context = {MGT_ISA_AUTO, 2, NULL};
  mgt_sample_tokens_args args = {0};
  mgt_sample_tokens_outputs outputs = {0};
  mgt_status status;
  void* workspace;
  int64_t workspace_bytes;
  int i, failed;
  for (i = 0; i < POSITIONS * TOKENS; ++i) logits[i] = (float)(i % 7) * 0.5f;
  for (i = 0; i < POSITIONS; ++i) tokens[i] = i == 2 ? 11 : TOKENS;
  args.struct_size = sizeof args;
  args.num_samples = 1;
  args.num_positions = POSITIONS;
  args.num_tokens = TOKENS;
  args.dtype = MGT_FLOAT32;
  args.logits.data = logits;
  args.logits.stride_sample = POSITIONS * TOKENS;
  args.logits.stride_position = TOKENS;
  args.logits.stride_token = 1;
  args.tokens = tokens;
  args.seeds = &seed;
  args.mask_token_id = TOKENS;
  args.step = 3;
  args.temperature = 1.0f;
  outputs.struct_size = sizeof outputs;
  outputs.token_ids = token_ids;
  outputs.logprob = logprob;
  workspace_bytes = mgt_sample_tokens_workspace(&context, &args);
  if (workspace_bytes < 0) return 10;
  workspace = malloc((size_t)workspace_bytes);
  status = mgt_sample_tokens(&context, &args, &outputs, workspace, workspace_bytes, &error_index);
  if (status != MGT_OK) return 1;
  for (i = 0; i < POSITIONS; ++i) printf("%d %a\n", (int)token_ids[i], logprob[i]);
  failed = differential_steps(&context, args, logits);
  if (failed) return failed;

  logits[4 * TOKENS] = logits[0] / logits[0]; /* 0 / 0 is NaN */
  status = mgt_sample_tokens(&context, &args, &outputs, workspace, workspace_bytes, &error_index);
  if (status != MGT_BAD_LOGITS || error_index != 4) return 2;
  if (mgt_sample_tokens(&context, &args, &outputs, workspace, workspace_bytes - 1, NULL) != MGT_INVALID_ARGUMENT)
    return 11;
  args.temperature = -1.0f;
  if (mgt_sample_tokens_workspace(&context, &args) != -1) return 3;
  if (mgt_sample_tokens(NULL, &args, &outputs, workspace, workspace_bytes, NULL) != MGT_INVALID_ARGUMENT) return 4;
  free(workspace);
  return 0;
}
