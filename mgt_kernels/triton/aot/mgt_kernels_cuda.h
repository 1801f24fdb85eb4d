/* The kernels of mgt-kernels on CUDA, compiled ahead of time: raw device pointers and strides; no Python, no Triton, no
 * allocation, no printing. Needs the CUDA driver 12.0 or newer (-lcuda) and a C11 compiler.
 *
 * Every function only enqueues work on a stream of the current context, waits for nothing, may be called from any
 * thread, and returns CUDA_SUCCESS or the reason why it did nothing:
 *   CUDA_ERROR_INVALID_VALUE      a pointer, size, stride or scalar is outside its documented range
 *   CUDA_ERROR_NO_BINARY_FOR_GPU  the current device is of none of the architectures that were exported
 *   CUDA_ERROR_NOT_FOUND          the op, dtype, layout or group size was left out of the export
 * or what the CUDA driver returned, and then the outputs are unspecified. The first launch of a kernel in a context
 * loads its machine code, which a stream capture may not allow: mgt_cuda_load does it beforehand.
 *
 * guidance_scale, noise_scale and temperature are values, which a captured CUDA graph keeps; seeds, step and mask_len
 * are in device memory, and a replayed graph reads them anew.
 *
 * Strides count elements. Random draws are functions of (seed, step, position, token id) alone, so results do not
 * depend on the batch or the device, and token ids equal those of the CPU. Nothing is read back: bad values in device
 * memory have no error, the functions say what comes of them. */
#ifndef MGT_KERNELS_CUDA_H
#define MGT_KERNELS_CUDA_H

#include <cuda.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Loads every exported kernel for the current device into the current context; the one function here that may take
 * milliseconds and wait for the device. Call it once for each context before a CUDA graph is captured there. */
CUresult mgt_cuda_load(void);

typedef enum { MGT_CUDA_FLOAT32 = 0, MGT_CUDA_BFLOAT16 = 1, MGT_CUDA_FLOAT16 = 2 } mgt_cuda_dtype;

/* (B, N, V) logits of one guidance half, in device memory. One of stride_position and stride_token is 1, the same one
 * for both halves; the stride of a dimension of size 1 does not matter. Fastest where data is aligned to 16 bytes, and
 * the other strides and the size of the dimension with unit stride are multiples of 16. */
typedef struct {
  const void* data;
  int64_t stride_sample;
  int64_t stride_position;
  int64_t stride_token;
} mgt_cuda_logits;

typedef struct {
  /* num_samples * num_positions < 2^31 */
  int64_t num_samples;
  /* at most 2^30 */
  int64_t num_positions;
  /* in [1, 2^30] */
  int64_t num_tokens;
  mgt_cuda_dtype dtype;
  mgt_cuda_logits logits;
  /* data NULL: no guidance */
  mgt_cuda_logits uncond_logits;
  /* (B, N) contiguous, in device memory; what is not mask_token_id is known and goes unchecked */
  const int64_t* tokens;
  /* (B), in device memory */
  const int64_t* seeds;
  /* one value in [0, 2^32), in device memory: a replayed CUDA graph reads it anew */
  const int64_t* step;
  /* in [-2^31, 2^31) */
  int64_t mask_token_id;
  /* finite */
  float guidance_scale;
  /* finite, >= 0; 0 adds no noise */
  float noise_scale;
  /* 0 (the likeliest token), or positive with a finite inverse */
  float temperature;
} mgt_cuda_sample_tokens_args;

/* Bytes of device memory that mgt_cuda_sample_tokens needs besides its outputs: a function of the three sizes, 0 where
 * a sample has many positions. */
size_t mgt_cuda_sample_tokens_workspace(const mgt_cuda_sample_tokens_args* args);

/* Draws a token for every masked position and its log-probability.
 *
 * With c = logits, u = uncond_logits, eps ~ N(0, 1) and g ~ Gumbel(0, 1), for each masked position and token j:
 *   l_j     = (u_j + guidance_scale (c_j - u_j) + noise_scale eps_j) / temperature
 *   token   = argmax_j (l_j + g_j)         ties: the lowest id
 *   logprob = l_token - logsumexp(l)       nats
 * Temperature 0 takes the argmax without g, and logprob is that of temperature 1. A logit of -inf in either half
 * forbids its token; mask_token_id is never drawn.
 *
 * token_ids, logprob: (B, N) contiguous, in device memory. Known positions keep their token and get logprob +inf. A bad
 * row (NaN, +inf, or no token allowed) gets mask_token_id and logprob NaN. workspace: device memory, aligned to 4
 * bytes, in use until the work is done; may be NULL if mgt_cuda_sample_tokens_workspace is 0. */
CUresult mgt_cuda_sample_tokens(const mgt_cuda_sample_tokens_args* args, int64_t* token_ids, float* logprob,
                                void* workspace, size_t workspace_bytes, CUstream stream);

typedef enum { MGT_CUDA_DIFFERENTIAL_PAPER = 0, MGT_CUDA_DIFFERENTIAL_OFFICIAL = 1 } mgt_cuda_differential_variant;

typedef struct {
  /* num_tokens: at most 2^27 - 2^11 */
  mgt_cuda_sample_tokens_args sample;
  mgt_cuda_differential_variant variant;
  /* MGT_CUDA_DIFFERENTIAL_OFFICIAL only: selected rows leave their weights in the history instead of p */
  int32_t aliased_history;
  /* 0: the first step of a generation, which is a plain one; nothing of the state but its seeds is read */
  int32_t has_history;
  /* in [0, 1] */
  double share;
} mgt_cuda_differential_sample_args;

/* What a generation carries from step to step, in device memory; the same for all its steps. */
typedef struct {
  /* (B, N, V) contiguous: 16-bit codes c of -log q, the distribution of the previous step. c / 2048 nats for c < 49152,
   * 24 + (c - 49152) / 16 nats above; 65535 also stands for q = 0. Fastest where it is aligned to 16 bytes */
  uint16_t* history;
  /* (B, N) contiguous: 1 where the row of history holds the previous step's distribution */
  uint8_t* written;
  /* (B): the seeds of the generation */
  const int64_t* seeds;
  /* one value: the index of the step that history is of */
  int64_t* step;
} mgt_cuda_differential_state;

/* Bytes of device memory that mgt_cuda_differential_sample needs besides its outputs and state: a function of the three
 * sizes, has_history and aliased_history. 0 where they are invalid, or nothing is to be done. */
size_t mgt_cuda_differential_sample_workspace(const mgt_cuda_differential_sample_args* args);

/* mgt_cuda_sample_tokens, but for the share of positions that changed least since the previous step, which are drawn
 * from the difference of both distributions. With p = softmax(l), q the previous step's p, for each position:
 *   D       = sum_j p_j (log p_j - log q_j)                  nats
 *   w_j     = |p_j - q_j|                                    MGT_CUDA_DIFFERENTIAL_PAPER
 *   w_j     = max(p_j - q_j, 1e-6)                           MGT_CUDA_DIFFERENTIAL_OFFICIAL
 *   token   = argmax_j (log w_j + g_j)                       if selected, and else mgt_cuda_sample_tokens'
 *   logprob = log(w_token / sum_j w_j)                       if selected
 * PAPER ranks the M masked positions by D and selects the round(share M) smallest; OFFICIAL ranks all N and selects the
 * floor(share N) smallest. Ties: the lower position. Temperature 0 takes the argmax of w.
 *
 * token_ids, logprob: as of mgt_cuda_sample_tokens; divergence: (B, N) contiguous, D, +inf where a row has no history.
 * A row without a history is drawn from p and ranks last. A bad row ranks last, gets mask_token_id, and NaN for logprob
 * and divergence, and counts as not written. So do all rows of a sample whose seed is not the state's; and all rows if
 * the step is not one more than the state's, but then the state stays as it is.
 * workspace: device memory, aligned to 16 bytes, in use until the work is done; may be NULL if its size is 0. */
CUresult mgt_cuda_differential_sample(const mgt_cuda_differential_sample_args* args,
                                      const mgt_cuda_differential_state* state, int64_t* token_ids, float* logprob,
                                      float* divergence, void* workspace, size_t workspace_bytes, CUstream stream);

typedef struct {
  /* below 2^31 */
  int64_t num_samples;
  /* at most 2^30 */
  int64_t num_positions;
  /* (B, N) contiguous, in device memory: the drawn token and its log-probability, +inf where the token is known */
  const int64_t* token_ids;
  const float* logprob;
  /* (B), in device memory: how many positions stay masked */
  const int64_t* mask_len;
  /* (B), in device memory */
  const int64_t* seeds;
  /* one value in [0, 2^32), in device memory */
  const int64_t* step;
  /* in [-2^31, 2^31) */
  int64_t mask_token_id;
  /* of the confidence noise: finite, >= 0 */
  float temperature;
} mgt_cuda_mask_by_confidence_args;

/* Masks the mask_len positions with the lowest confidence, logprob + temperature g, g ~ Gumbel(0, 1), again; among ties
 * lower positions first.
 *
 * tokens: (B, N) contiguous, in device memory, may not alias an input. Known positions are never masked, also where
 * mask_len is larger than the number of others; a logprob of NaN is masked first. */
CUresult mgt_cuda_mask_by_confidence(const mgt_cuda_mask_by_confidence_args* args, int64_t* tokens, CUstream stream);

/* Weights (N, K) in 4 bits, w = (w_q - zero_point) * scale, and what they are multiplied with. Known from the CPU:
 * mgt_int4_linear_args of mgt_kernels.h. All pointers are to device memory. */
typedef struct {
  /* at most 2^30 */
  int64_t num_rows;
  /* in [1, 2^30] */
  int64_t num_inputs;
  /* at most 2^30 */
  int64_t num_outputs;
  /* of y: MGT_CUDA_FLOAT32 or MGT_CUDA_BFLOAT16 */
  mgt_cuda_dtype dtype;
  /* (num_rows, num_inputs), unit stride over inputs. mgt_cuda_w4a8_linear: of dtype; mgt_cuda_w4a16_linear: bfloat16,
   * whatever dtype is. Fastest where x is aligned to 16 bytes, and x_stride and num_inputs are multiples of 16 */
  const void* x;
  /* from row to row, at least num_inputs; does not matter for one row */
  int64_t x_stride;
  /* (num_outputs, 32 ceil(num_inputs / 64)) contiguous, aligned to 16 bytes: byte 32 c + j of a row holds input
   * 64 c + j in its low nibble and input 64 c + 32 + j in its high one; inputs past the last one are 0 */
  const uint8_t* w_q;
  /* (num_outputs, ceil(num_inputs / group_size)) contiguous, positive; MGT_CUDA_FLOAT32 or MGT_CUDA_FLOAT16 */
  const void* scale;
  mgt_cuda_dtype scale_dtype;
  /* as scale, in [0, 15] */
  const uint8_t* zero_point;
  /* one that was exported: a multiple of 32 in [32, 16384]. A group is computed whole: where a single one holds all
   * inputs, num_inputs rounded up to a multiple of 32 is the faster size */
  int64_t group_size;
  /* (num_outputs), or NULL */
  const float* bias;
} mgt_cuda_int4_linear_args;

/* Both layers compute a tile of outputs per program: 16 rows x 16 outputs of up to 16 rows, else 64 (W4A8) or 128
 * (W4A16) rows x 128 outputs. 2^31 programs or more: CUDA_ERROR_INVALID_VALUE. */

/* Bytes of device memory that mgt_cuda_w4a8_linear needs besides its outputs: a function of the sizes alone. 0 where
 * they are invalid, or nothing is to be done. */
size_t mgt_cuda_w4a8_linear_workspace(const mgt_cuda_int4_linear_args* args);

/* A linear layer in 8-bit integers. For each row m and output n, with the inputs k of group g:
 *   x_q[m, k] = clamp(round(x[m, k] * (1 / x_scale[m])), -128, 127)     halves to even, in float32
 *   sum[m, g] = sum_k x_q[m, k] (w_q[n, k] - zero_point[n, g])          exact in 32 bits
 *   y[m, n]   = x_scale[m] * sum_g scale[n, g] sum[m, g] + bias[n]      fused float32, g in order
 * so y has the bits of the CPU's.
 *
 * x_scale: (num_x_scales) in device memory, positive and normal; num_x_scales divides num_rows, and each of as many
 * equal runs of rows has its own. num_x_scales 0: the largest magnitude of each row / 127. y: (num_rows, num_outputs)
 * contiguous. A row that holds NaN or inf becomes NaN. workspace: device memory, aligned to 16 bytes, in use until the
 * work is done. CUDA_ERROR_INVALID_VALUE also where num_rows times the number of groups, each rounded up, is 2^31 or
 * more. */
CUresult mgt_cuda_w4a8_linear(const mgt_cuda_int4_linear_args* args, const float* x_scale, int64_t num_x_scales,
                              void* y, void* workspace, size_t workspace_bytes, CUstream stream);

/* A linear layer on bfloat16, accumulated in float32:
 *   y[m, n] = sum_k x[m, k] bfloat16((w_q[n, k] - zero_point[n, g]) scale[n, g]) + bias[n]
 * Activations of another type are to be rounded to bfloat16 first. y: (num_rows, num_outputs) contiguous. A sum that is
 * NaN or inf becomes NaN. */
CUresult mgt_cuda_w4a16_linear(const mgt_cuda_int4_linear_args* args, void* y, CUstream stream);

#ifdef __cplusplus
}
#endif
#endif
