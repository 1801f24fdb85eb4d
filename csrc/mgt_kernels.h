/* The C ABI of mgt-kernels: raw pointers, seeds and strides; no Python, no torch, no allocation, no printing, no
 * exceptions.
 *
 * Every function is re-entrant, only reads what is not named an output, and returns MGT_OK or the reason why it did
 * nothing useful. A size, offset or product of sizes that does not fit 63 bits, in bytes, is an invalid argument.
 * Threads need 64 KiB of stack. Strides count elements; a dimension of size 1 is never stepped along, so that any
 * stride of it will do.
 *
 * A structure of arguments or outputs begins with its size, its sizeof in the header that the caller is compiled with;
 * another size is an invalid argument. Start from zeros: a zero means what each member says of it, and a later version
 * that adds members at the end takes the sizes of before, and zero for what they lack.
 *
 * Random draws are functions of (seed, step, position, token id) alone, so results do not depend on the batch, the
 * number of threads or the instruction set. Nor do they depend on the floating-point state of the calling thread or of
 * a lent pool's threads (MXCSR: rounding mode, flushing of denormals, traps): each op sets it aside and puts it back.
 * One thing is the processor's: the dot products of bfloat16 of mgt_w4a16_linear on MGT_ISA_AVX512_BF16 and MGT_ISA_AMX
 * take denormals for zero and flush sums below 2^-126, whatever that state is.
 */
#ifndef MGT_KERNELS_H
#define MGT_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define MGT_API __attribute__((visibility("default")))
#else
#define MGT_API
#endif

#define MGT_VERSION "0.1.0"

/* C++ may then hold, and pass, a number that is not in the list: it is refused, not undefined. */
#if defined(__cplusplus)
#define MGT_INT32 : int32_t
#else
#define MGT_INT32
#endif

typedef enum MGT_INT32 {
  MGT_OK = 0,
  /* a pointer, size, stride or scalar is outside its documented range */
  MGT_INVALID_ARGUMENT = 1,
  /* the instruction set asked for (by argument or by MGT_ISA) is unknown or missing on this processor */
  MGT_ISA_UNAVAILABLE = 2,
  /* logits of a position that is read hold NaN or +inf, overflow to +inf under guidance, noise or temperature, or
   * forbid every token; error_index is its row b * N + n */
  MGT_BAD_LOGITS = 3,
  /* a known token whose log-probability is asked for is outside [0, num_tokens); error_index is its row b * N + n */
  MGT_BAD_TOKEN = 4,
  /* mask_len is outside [0, masked positions of the sample]; error_index is the sample */
  MGT_BAD_MASK_LEN = 5,
  /* a masked position's logprob is NaN; error_index is its row b * N + n */
  MGT_BAD_LOGPROB = 6,
  /* a row of activations holds NaN or inf, or rounds to inf, or, for mgt_match_tokens, has a sum of squares that
   * float32 cannot hold; error_index is the row */
  MGT_BAD_ACTIVATION = 7,
  /* a count is negative or, by MGT_COMMIT_COUNT, more than compete; error_index is the sample */
  MGT_BAD_COUNT = 8,
  /* a competing position's score is NaN; error_index is its row b * N + n */
  MGT_BAD_SCORE = 9,
  /* a window is not within [0, num_positions), or ends before it starts; error_index is the sample */
  MGT_BAD_WINDOW = 10,
  /* starts do not rise from 0 to num_tokens, or a row or a member is out of range; error_index is the sample */
  MGT_BAD_MATCH = 11
} mgt_status;

/* What a kernel may use, each more than the one before; an op without a kernel of that name runs the best one below. */
typedef enum MGT_INT32 {
  MGT_ISA_AUTO = 0,
  MGT_ISA_SCALAR = 1,
  MGT_ISA_AVX2 = 2,
  MGT_ISA_AVX512 = 3,
  MGT_ISA_AVX512_VNNI = 4,
  MGT_ISA_AVX512_BF16 = 5,
  MGT_ISA_AMX = 6
} mgt_isa;

typedef enum MGT_INT32 { MGT_FLOAT32 = 0, MGT_BFLOAT16 = 1, MGT_FLOAT16 = 2 } mgt_dtype;

/* Runs body(data) on num_threads threads and returns when all have. The signature is GOMP_parallel's, so that a caller
 * can lend the thread pool of the OpenMP runtime it already has; flags is 0. Correct for any number of runs of body
 * >= 1. */
typedef void (*mgt_parallel)(void (*body)(void* data), void* data, unsigned num_threads, unsigned flags);

typedef struct {
  mgt_isa isa;
  /* at least 1; the larger of 16 and the number of processors is the most that are used */
  int32_t num_threads;
  /* NULL: the call starts its own threads and joins them */
  mgt_parallel parallel;
} mgt_context;

/* (B, N, V) logits of one guidance half. One of stride_position and stride_token is 1, the same in both halves; the
 * other strides are any, 0 and negative ones too. */
typedef struct {
  const void* data;
  int64_t stride_sample;
  int64_t stride_position;
  int64_t stride_token;
} mgt_logits;

/* How a second unconditional half v joins u, the first, with c the conditional logits; scales of 1 change nothing. */
typedef enum MGT_INT32 {
  /* g = u + guidance_scale (c - u), then v + second_guidance_scale (g - v) */
  MGT_GUIDANCE_NESTED = 0,
  /* c + (guidance_scale - 1) (c - u) + (second_guidance_scale - 1) (c - v) */
  MGT_GUIDANCE_DUAL = 1
} mgt_guidance;

/* Of which distribution the log-probabilities and statistics of a truncated draw are. */
typedef enum MGT_INT32 {
  /* of what is kept, renormalised */
  MGT_LOGPROB_OF_KEPT = 0,
  /* of all tokens, as if nothing were left out */
  MGT_LOGPROB_OF_FULL = 1
} mgt_logprob_of;

/* The positions whose logits are read. */
typedef enum MGT_INT32 { MGT_ROWS_MASKED = 0, MGT_ROWS_KNOWN = 1, MGT_ROWS_ALL = 2 } mgt_rows;

typedef struct {
  uint32_t struct_size;
  mgt_dtype dtype;
  int64_t num_samples;
  /* below 2^32 */
  int64_t num_positions;
  /* within [1, 2^31) */
  int64_t num_tokens;
  mgt_logits logits;
  /* data NULL: no guidance */
  mgt_logits uncond_logits;
  /* data NULL: one half of guidance at most; else uncond_logits is there too */
  mgt_logits second_uncond_logits;
  /* (B, N) contiguous; known ones are any number where their log-probability is not asked for */
  const int64_t* tokens;
  /* (B) */
  const int64_t* seeds;
  /* (B): the place in its sequence of a sample's first position, which random draws are functions of, so that a part
   * of a sequence draws what the whole does; within [0, 2^32 - num_positions]. NULL: all 0 */
  const int64_t* first_positions;
  /* (B), finite, in the place of guidance_scale and second_guidance_scale; or NULL */
  const float* guidance_scales;
  const float* second_guidance_scales;
  /* (V), added to the guided logits of every position; -inf forbids a token. Or NULL */
  const float* token_bias;
  /* any; a token of the codebook that is the mask's is never drawn */
  int64_t mask_token_id;
  /* in [0, 2^32) */
  int64_t step;
  /* finite */
  float guidance_scale;
  /* finite, at least 0 */
  float noise_scale;
  /* 0, or finite with a finite inverse */
  float temperature;
  mgt_rows rows;
  /* finite */
  float second_guidance_scale;
  mgt_guidance guidance;
  /* c: every logit l of every half becomes c tanh(l / c) first; finite, above 0, with a finite 2 / c. 0: none does */
  float softcap;
  /* What follows truncates the draw: with l the logits after guidance, token_bias, noise and temperature, the tokens
   * below the largest of three bounds are not drawn. Those at a bound are: equal ones all stay or all go. */
  mgt_logprob_of logprob_of;
  /* the top_k largest l; within [1, num_tokens]. 0: all */
  int64_t top_k;
  /* of what top_k leaves, the fewest largest l whose probabilities add up to top_p; within (0, 1]. 0: all. A token
   * counts exp(l - max l) in whole units of 2^-31, so that sums are exact */
  float top_p;
  /* p of at least min_p times the largest p; within [0, 1) */
  float min_p;
} mgt_sample_tokens_args;

/* What one read of the logits gives of a position, each (B, N) contiguous; NULL where it is not asked for, but
 * token_ids, which every call gives. With l the logits after guidance, token_bias, noise and temperature (0 counts as
 * 1), p = softmax(l), over the tokens that a truncated draw keeps or over all (logprob_of), in nats. Positions that are
 * not read get +inf, and their own token for argmax. */
typedef struct {
  uint32_t struct_size;
  /* the drawn token of a masked position that is read; the others keep theirs */
  int64_t* token_ids;
  /* log p of the drawn token; +inf at known positions */
  float* logprob;
  /* the token with the largest l, the lowest of equal ones */
  int64_t* argmax;
  /* log p of argmax */
  float* max_logprob;
  /* p of argmax less the p of what is largest without it */
  float* margin;
  /* -sum p log p, at least 0 */
  float* entropy;
  /* log sum exp(l) */
  float* logsumexp;
  /* log p of a known position's token; +inf at masked positions */
  float* known_logprob;
  /* l of the drawn token before temperature; +inf at known positions */
  float* logit;
} mgt_sample_tokens_outputs;

/* Bytes of workspace that mgt_sample_tokens needs for these arguments and context->num_threads; -1 where they are
 * invalid. Nothing is read: all that counts of the pointers is which halves of guidance have data that is NULL. */
MGT_API int64_t mgt_sample_tokens_workspace(const mgt_context* context, const mgt_sample_tokens_args* args);

/* Draws a token for every masked position that is read, and gives what is asked of all that are (spec: "guided, noisy
 * draw with confidence", "statistics of the row").
 *
 * workspace: at least mgt_sample_tokens_workspace bytes, of any alignment. On an error the outputs are unspecified and
 * error_index, if not NULL, names the first bad row.
 *
 * The score of a token is its logit l, after guidance, noise and temperature, plus Gumbel noise within [-3.2, 22.9],
 * rounded to float32, which is 2^(k - 23) apart for |l| within [2^k, 2^(k + 1)). Up to |l| = 2^10 the rounding (2^-13)
 * is not seen; at 2^20 scores are 1/8 apart; from 2^29 (5.4e8) on the noise is rounded away, and of equal logits the
 * lowest id always wins. Subtract the row's largest logit where logits may be that large: no probability changes. */
MGT_API mgt_status mgt_sample_tokens(const mgt_context* context, const mgt_sample_tokens_args* args,
                                     const mgt_sample_tokens_outputs* outputs, void* workspace, int64_t workspace_bytes,
                                     int64_t* error_index);

typedef enum MGT_INT32 {
  /* ranks masked positions; weights |p - q|; selects round(share * masked positions), halves away from zero */
  MGT_DIFFERENTIAL_PAPER = 0,
  /* ranks all positions, reading known ones too; weights max(p - q, 1e-6); selects floor(share * positions) */
  MGT_DIFFERENTIAL_OFFICIAL = 1
} mgt_differential_variant;

typedef struct {
  uint32_t struct_size;
  mgt_differential_variant variant;
  /* its rows are MGT_ROWS_MASKED, and nothing of it truncates */
  const mgt_sample_tokens_args* sample;
  /* MGT_DIFFERENTIAL_OFFICIAL only: selected rows leave their weights in the history instead of p */
  int32_t aliased_history;
  /* 0: nothing has been written to history and written yet, so this is a plain step */
  int32_t has_history;
  /* in [0, 1] */
  double share;
} mgt_differential_sample_args;

/* Bytes of workspace that mgt_differential_sample needs, as mgt_sample_tokens_workspace says. */
MGT_API int64_t mgt_differential_sample_workspace(const mgt_context* context, const mgt_differential_sample_args* args);

/* mgt_sample_tokens, but for the share of positions that changed least since the previous step, which are drawn from
 * the difference of both distributions (spec: "differential sampling").
 *
 * history: (B, N, V) contiguous, in and out: 16-bit codes c of -log q, the distribution of the previous step. c / 2048
 * nats for c < 49152, 24 + (c - 49152) / 16 nats above; 65535 also stands for q = 0. written: (B, N) contiguous, in and
 * out: 1 where the row of history holds the previous step's distribution. Rows that this step does not read are left as
 * they are, and their written becomes 0. A row without history is drawn from p and ranks last.
 * token_ids, logprob, divergence: (B, N) contiguous. divergence is KL(p || q) in nats, +inf where there is none.
 * workspace: at least mgt_differential_sample_workspace bytes, of any alignment.
 * On an error the outputs, history and written are unspecified, and error_index, if not NULL, names the first bad row.
 */
MGT_API mgt_status mgt_differential_sample(const mgt_context* context, const mgt_differential_sample_args* args,
                                           uint16_t* history, uint8_t* written, int64_t* token_ids, float* logprob,
                                           float* divergence, void* workspace, int64_t workspace_bytes,
                                           int64_t* error_index);

typedef struct {
  uint32_t struct_size;
  /* finite, at least 0 */
  float temperature;
  int64_t num_samples;
  /* below 2^32 */
  int64_t num_positions;
  /* (B, N) contiguous: the drawn token and its log-probability, +inf where the token is known */
  const int64_t* token_ids;
  const float* logprob;
  /* (B): how many positions stay masked, within [0, masked positions of the sample] */
  const int64_t* mask_len;
  /* (B) */
  const int64_t* seeds;
  int64_t mask_token_id;
  /* in [0, 2^32) */
  int64_t step;
} mgt_mask_by_confidence_args;

/* Masks the mask_len least confident of the masked positions again, exactly as many. The confidence is logprob +
 * temperature * Gumbel noise; of equal ones the lower position counts as the less confident.
 * tokens: (B, N) contiguous, may not alias an input. */
MGT_API mgt_status mgt_mask_by_confidence(const mgt_context* context, const mgt_mask_by_confidence_args* args,
                                          int64_t* tokens, int64_t* error_index);

/* How many of the competing positions become known: the first in the order of falling confidence. */
typedef enum MGT_INT32 {
  /* exactly counts */
  MGT_COMMIT_COUNT = 0,
  /* all whose confidence is at least value */
  MGT_COMMIT_THRESHOLD = 1,
  /* the most for each of which confidence >= 1 - value / (n + 1), n its place in the order, from 1 on; score is a
   * probability */
  MGT_COMMIT_FACTOR = 2,
  /* the most whose entropies, without the largest, add up to at most value; score is an entropy in nats, of which whole
   * units of 2^-36 within [0, 64] count, and the confidence is -score; for at most 2^20 positions */
  MGT_COMMIT_ENTROPY_BOUND = 3
} mgt_commit_rule;

typedef struct {
  /* sizeof(mgt_commit_tokens_args) */
  uint32_t struct_size;
  mgt_commit_rule rule;
  int64_t num_samples;
  /* below 2^32 */
  int64_t num_positions;
  /* (B, N) contiguous: the drawn token and its score, higher is sooner; +inf counts as the largest float */
  const int64_t* token_ids;
  const float* score;
  /* (B, N) contiguous: what was there before; positions that hold mask_token_id, within the window, compete */
  const int64_t* tokens;
  /* (B): exactly how many become known by MGT_COMMIT_COUNT, within [0, competing positions]; by the other rules at
   * least how many, or all where fewer compete */
  const int64_t* counts;
  /* (B): the window [start, end) of each sample, or NULL for 0 and for num_positions */
  const int64_t* starts;
  const int64_t* ends;
  /* (B) */
  const int64_t* seeds;
  int64_t mask_token_id;
  /* in [0, 2^32) */
  int64_t step;
  /* of the rule: finite, and at least 0 by MGT_COMMIT_FACTOR and MGT_COMMIT_ENTROPY_BOUND */
  float value;
  /* finite, at least 0 */
  float temperature;
  /* (B, N) contiguous, or both NULL: a known token of the window that is not argmax becomes it where max_logprob >
   * replace_above */
  const int64_t* argmax;
  const float* max_logprob;
  /* (B, N) contiguous, or NULL: any other known token of the window is masked where known_logprob < mask_below */
  const float* known_logprob;
  /* not NaN */
  float replace_above;
  float mask_below;
} mgt_commit_tokens_args;

typedef struct {
  /* sizeof(mgt_commit_tokens_outputs) */
  uint32_t struct_size;
  /* (B, N) contiguous, may not alias an input */
  int64_t* tokens;
  /* (B), or NULL: 1 where no position of the window holds mask_token_id any more, else 0 */
  uint8_t* done;
} mgt_commit_tokens_outputs;

/* Makes competing positions known, those of the highest confidence, by a rule; the others stay masked. The confidence
 * is score + temperature * Gumbel noise, the noise of mgt_mask_by_confidence; of equal ones the higher position comes
 * first. On an error nothing is written. */
MGT_API mgt_status mgt_commit_tokens(const mgt_context* context, const mgt_commit_tokens_args* args,
                                     const mgt_commit_tokens_outputs* outputs, int64_t* error_index);

typedef struct {
  uint32_t struct_size;
  /* of x and y: MGT_FLOAT32 or MGT_BFLOAT16 */
  mgt_dtype dtype;
  int64_t num_rows;
  /* within [1, 2^31) */
  int64_t num_inputs;
  int64_t num_outputs;
  /* (num_rows, num_inputs), unit stride over inputs */
  const void* x;
  /* from row to row, at least num_inputs */
  int64_t x_stride;
  /* (num_outputs, 32 ceil(num_inputs / 64)) contiguous: byte 32 c + j of a row holds input 64 c + j in its low nibble
   * and input 64 c + 32 + j in its high one */
  const uint8_t* w_q;
  /* (num_outputs, ceil(num_inputs / group_size)) contiguous, positive; MGT_FLOAT32 or MGT_FLOAT16 */
  const void* scale;
  /* as scale, within [0, 15]; a weight is (w_q - zero_point) * scale */
  const uint8_t* zero_point;
  /* (num_outputs), or NULL */
  const float* bias;
  /* a multiple of 32 within [32, 16384] */
  int64_t group_size;
  mgt_dtype scale_dtype;
} mgt_int4_linear_args;

/* Bytes of workspace for these sizes and context; -1 where they are invalid or the instruction set is missing. */
MGT_API int64_t mgt_w4a8_linear_workspace(const mgt_context* context, const mgt_int4_linear_args* args);
MGT_API int64_t mgt_w4a16_linear_workspace(const mgt_context* context, const mgt_int4_linear_args* args);

/* A linear layer in 8-bit integers: x_q = clamp(round(x * (1 / x_scale)), -128, 127), sums over a group exact in 32
 * bits, then y = x_scale * sum_g scale_g sum_g + bias in float32, groups in order. The same bits on every instruction
 * set.
 *
 * x_scale: (num_x_scales), positive, normal; num_x_scales divides num_rows, and each of as many equal runs of rows has
 * its own. num_x_scales 0: the largest magnitude of each row / 127. y: (num_rows, num_outputs) contiguous.
 * workspace: at least mgt_w4a8_linear_workspace bytes, of any alignment. On an error y is unspecified, and error_index,
 * if not NULL, names the first bad row. */
MGT_API mgt_status mgt_w4a8_linear(const mgt_context* context, const mgt_int4_linear_args* args, const float* x_scale,
                                   int64_t num_x_scales, void* y, void* workspace, int64_t workspace_bytes,
                                   int64_t* error_index);

/* A linear layer on activations and weights rounded to bfloat16, accumulated in float32. */
MGT_API mgt_status mgt_w4a16_linear(const mgt_context* context, const mgt_int4_linear_args* args, void* y,
                                    void* workspace, int64_t workspace_bytes, int64_t* error_index);

typedef struct {
  /* sizeof(mgt_match_tokens_args) */
  uint32_t struct_size;
  /* of x */
  mgt_dtype dtype;
  int64_t num_samples;
  /* of the grid of tokens: even, their product below 2^31 */
  int64_t height;
  int64_t width;
  /* at least 1 */
  int64_t num_channels;
  /* (B, height width, C), unit stride over channels; any other strides */
  const void* x;
  int64_t stride_sample;
  int64_t stride_token;
  /* within [0, 3/4 height width], or -1: all whose cosine is at least threshold */
  int64_t num_merged;
  /* (B), or NULL: the top left token of each cell is the destination */
  const int64_t* seeds;
  /* in [0, 2^32) */
  int64_t step;
  /* where num_merged is -1: within [-1, 1] */
  float threshold;
} mgt_match_tokens_args;

typedef struct {
  /* sizeof(mgt_match_tokens_outputs) */
  uint32_t struct_size;
  /* (B, N) contiguous: the row of each token among the merged ones */
  int64_t* rows;
  /* (B, N) contiguous: the tokens of row 0, of row 1, ..., each row's in reading order */
  int64_t* members;
  /* (B, N + 1) contiguous: where each row's begin in members; N past the last row */
  int64_t* starts;
  /* (B): how many rows there are */
  int64_t* num_rows;
} mgt_match_tokens_outputs;

/* Bytes of workspace for these sizes and context; -1 where they are invalid. */
MGT_API int64_t mgt_match_tokens_workspace(const mgt_context* context, const mgt_match_tokens_args* args);

/* Finds the tokens that are most like another one (spec: "TomeMGT"). One token of each 2 x 2 cell is a destination: the
 * corner word >> 30, word the first of the cell's Philox words in stream 4. Each other token has the largest cosine to
 * a destination, of equal ones the lowest; the num_merged with the largest cosine, of equal ones the lower first, join
 * that destination's row. The kept tokens' rows are 0, 1, ... in reading order. Sums are float32, over the channels in
 * order.
 * workspace: at least mgt_match_tokens_workspace bytes, of any alignment. On an error the outputs are unspecified, and
 * error_index, if not NULL, names the first bad row b * N + n. */
MGT_API mgt_status mgt_match_tokens(const mgt_context* context, const mgt_match_tokens_args* args,
                                    const mgt_match_tokens_outputs* outputs, void* workspace, int64_t workspace_bytes,
                                    int64_t* error_index);

typedef struct {
  /* sizeof(mgt_merge_tokens_args) */
  uint32_t struct_size;
  /* of x and y */
  mgt_dtype dtype;
  int64_t num_samples;
  int64_t num_tokens;
  /* M, at most num_tokens */
  int64_t num_rows;
  int64_t num_channels;
  /* (B, N, C), unit stride over channels; any other strides */
  const void* x;
  int64_t stride_sample;
  int64_t stride_token;
  /* as mgt_match_tokens writes them: (B, N) and (B, N + 1) contiguous */
  const int64_t* members;
  const int64_t* starts;
} mgt_merge_tokens_args;

/* The mean of each row's tokens, in float32, in the order of members; 0 of none. y: (B, M, C) contiguous, may not alias
 * an input. On MGT_BAD_MATCH nothing is written. */
MGT_API mgt_status mgt_merge_tokens(const mgt_context* context, const mgt_merge_tokens_args* args, void* y,
                                    int64_t* error_index);

typedef struct {
  /* sizeof(mgt_unmerge_tokens_args) */
  uint32_t struct_size;
  /* of x and y */
  mgt_dtype dtype;
  int64_t num_samples;
  int64_t num_tokens;
  /* M, at most num_tokens */
  int64_t num_rows;
  int64_t num_channels;
  /* (B, M, C), unit stride over channels; any other strides */
  const void* x;
  int64_t stride_sample;
  int64_t stride_token;
  /* (B, N) contiguous, as mgt_match_tokens writes them */
  const int64_t* rows;
} mgt_unmerge_tokens_args;

/* Each token's row. y: (B, N, C) contiguous, may not alias an input. On MGT_BAD_MATCH nothing is written. */
MGT_API mgt_status mgt_unmerge_tokens(const mgt_context* context, const mgt_unmerge_tokens_args* args, void* y,
                                      int64_t* error_index);

/* Philox4x32-7 words of the counters (first_block + i, position, step, stream). words: (4, num_blocks), word by word.
 * first_block + num_blocks: at most 2^32. */
MGT_API mgt_status mgt_philox(const mgt_context* context, int64_t seed, uint32_t position, uint32_t step,
                              uint32_t stream, int64_t first_block, int64_t num_blocks, uint32_t* words);

/* N(0, 1) draws of tokens 0..num_tokens-1 at one position: the noise that mgt_sample_tokens adds. noise: (num_tokens),
 * below 2^31 of them. */
MGT_API mgt_status mgt_gaussian(const mgt_context* context, int64_t seed, uint32_t position, uint32_t step,
                                int64_t num_tokens, float* noise);

/* The instruction set that `requested` stands for on this processor. MGT_ISA_AUTO is the one that the environment
 * variable MGT_ISA names, or the best. The variable is read once, by the first call that asks for MGT_ISA_AUTO:
 * changing it afterwards has no effect. */
MGT_API mgt_status mgt_resolve_isa(mgt_isa requested, mgt_isa* isa);

/* The kernel that an op ("sample_tokens", "w4a8_linear", ...) runs where `isa` may be used. "amx" uses tile registers
 * for more than 8 rows, vector registers for fewer. */
MGT_API mgt_status mgt_kernel_isa(const char* op, mgt_isa isa, mgt_isa* kernel);

/* "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"; NULL for anything else */
MGT_API const char* mgt_isa_name(mgt_isa isa);

MGT_API const char* mgt_version(void);

#ifdef __cplusplus
}
#endif
#endif
