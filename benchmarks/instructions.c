/* Counts the instructions that each kernel executes: the processor traps after every one of them, and a signal handler
 * counts. Exact, the same on a busy machine as on a quiet one, and for every instruction set that the processor has.
 *
 * Prints a line for each kernel, "op, variant, dtype, layout, isa" TAB elements TAB instructions: of every instruction
 * set but the scalar one, or of those whose names are given. */
#define _GNU_SOURCE
#include <math.h>
#include <mgt_kernels.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static volatile int64_t num_traps;

static void on_trap(int signal) {
  (void)signal;
  ++num_traps;
}

/* the trap flag of the processor; the handler runs without it */
static void start_counting(void) {
  num_traps = 0;
  __asm__ volatile("pushfq; orq $0x100, (%%rsp); popfq" ::: "memory", "cc");
}

static void stop_counting(void) { __asm__ volatile("pushfq; andq $~0x100, (%%rsp); popfq" ::: "memory", "cc"); }

/* Calls once to settle what is done once, then counts a call. */
#define COUNT(name, isa, num_elements, call)                                                                  \
  do {                                                                                                        \
    mgt_status status = call;                                                                                 \
    if (status == MGT_OK) {                                                                                   \
      start_counting();                                                                                       \
      status = call;                                                                                          \
      stop_counting();                                                                                        \
    }                                                                                                         \
    if (status != MGT_OK) {                                                                                   \
      fprintf(stderr, "%s, %s: status %d\n", name, mgt_isa_name(isa), (int)status);                           \
      exit(1);                                                                                                \
    }                                                                                                         \
    printf("%s, %s\t%lld\t%lld\n", name, mgt_isa_name(isa), (long long)(num_elements), (long long)num_traps); \
    fflush(stdout);                                                                                           \
  } while (0)

enum { NUM_LOGITS = 4096 };

/* about N(0, 4), the same everywhere: the sum of four uniforms */
static float random_logit(uint32_t* state) {
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    *state = *state * 1664525u + 1013904223u;
    sum += (float)(*state >> 8) * 0x1p-24f - 0.5f;
  }
  return sum * 3.46f;
}

static uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)(bits >> 16);
}

/* normal numbers alone, the mantissa cut */
static uint16_t to_float16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const int exponent = (int)(bits >> 23 & 255) - 112;
  return exponent <= 0 ? 0 : (uint16_t)(bits >> 16 & 0x8000u) | (uint16_t)(exponent << 10) | (bits >> 13 & 1023);
}

static void fill(void* data, mgt_dtype dtype, int num, uint32_t state) {
  for (int i = 0; i < num; ++i) {
    const float value = random_logit(&state);
    if (dtype == MGT_FLOAT32) ((float*)data)[i] = value;
    if (dtype == MGT_BFLOAT16) ((uint16_t*)data)[i] = to_bfloat16(value);
    if (dtype == MGT_FLOAT16) ((uint16_t*)data)[i] = to_float16(value);
  }
}

static float logits[NUM_LOGITS], uncond_logits[NUM_LOGITS], logprob[NUM_LOGITS], divergence[NUM_LOGITS];
static int64_t tokens[NUM_LOGITS], token_ids[NUM_LOGITS];
static const mgt_sample_tokens_outputs outputs = {
    .struct_size = sizeof outputs, .token_ids = token_ids, .logprob = logprob};
static int64_t seed = 7, error_index;
/* in the same place in every run: where a vector crosses a line is not what is counted */
static char workspace[1 << 22] __attribute__((aligned(64)));

/* one row of many tokens, where the loop over them is what counts, or as many positions as a vector has lanes */
static mgt_sample_tokens_args draw(mgt_dtype dtype, int position_major, int guided, float noise_scale) {
  const int num_positions = position_major ? 16 : 1;
  mgt_sample_tokens_args args;
  memset(&args, 0, sizeof args);
  args.struct_size = sizeof args;
  args.num_samples = 1;
  args.num_positions = num_positions;
  args.num_tokens = NUM_LOGITS / num_positions;
  args.dtype = dtype;
  args.logits.data = logits;
  args.logits.stride_sample = NUM_LOGITS;
  args.logits.stride_position = position_major ? 1 : args.num_tokens;
  args.logits.stride_token = position_major ? num_positions : 1;
  if (guided) {
    args.uncond_logits = args.logits;
    args.uncond_logits.data = uncond_logits;
  }
  args.tokens = tokens;
  args.seeds = &seed;
  args.mask_token_id = NUM_LOGITS;
  args.guidance_scale = guided ? 3.0f : 1.0f;
  args.noise_scale = noise_scale;
  args.temperature = 1.0f;
  fill(logits, dtype, NUM_LOGITS, 1);
  fill(uncond_logits, dtype, NUM_LOGITS, 2);
  for (int i = 0; i < num_positions; ++i) tokens[i] = NUM_LOGITS;
  return args;
}

static void count_draws(const mgt_context* context) {
  static const char *dtypes[] = {"fp32", "bf16", "fp16"}, *kinds[] = {"flat", "guided", "guided + noise"};
  for (int dtype = 0; dtype < 3; ++dtype)
    for (int position_major = 0; position_major < 2; ++position_major)
      for (int kind = 0; kind < 3; ++kind) {
        /* the dtypes differ in how a logit is read, of which guidance reads two */
        if (dtype && kind != 1) continue;
        const mgt_sample_tokens_args args = draw((mgt_dtype)dtype, position_major, kind > 0, kind == 2 ? 1.0f : 0.0f);
        char name[80];
        snprintf(name, sizeof name, "sample_tokens, %s, %s, %s", kinds[kind], dtypes[dtype],
                 position_major ? "position-major" : "token-major");
        const int64_t num_bytes = mgt_sample_tokens_workspace(context, &args);
        if (num_bytes < 0 || num_bytes > (int64_t)sizeof workspace) exit(1);
        COUNT(name, context->isa, NUM_LOGITS,
              mgt_sample_tokens(context, &args, &outputs, workspace, num_bytes, &error_index));
      }
}

static void count_differential(const mgt_context* context) {
  static uint16_t history[NUM_LOGITS];
  static uint8_t written[1];
  mgt_sample_tokens_args sample = draw(MGT_FLOAT32, 0, 1, 0.0f);
  mgt_differential_sample_args args;
  memset(&args, 0, sizeof args);
  args.struct_size = sizeof args;
  args.sample = &sample;
  args.share = 0.75;
  const int64_t num_bytes = mgt_differential_sample_workspace(context, &args);
  if (num_bytes < 0 || num_bytes > (int64_t)sizeof workspace) exit(1);
  mgt_status status = mgt_differential_sample(context, &args, history, written, token_ids, logprob, divergence,
                                              workspace, num_bytes, &error_index);
  if (status != MGT_OK) exit(1);
  args.has_history = 1;
  sample.step = 1;
  fill(logits, MGT_FLOAT32, NUM_LOGITS, 3);
  COUNT("differential_sample, guided, fp32, token-major", context->isa, NUM_LOGITS,
        mgt_differential_sample(context, &args, history, written, token_ids, logprob, divergence, workspace, num_bytes,
                                &error_index));
}

static void count_masks(const mgt_context* context) {
  enum { NUM_POSITIONS = 1024 };
  static int64_t masked[NUM_POSITIONS];
  int64_t mask_len = NUM_POSITIONS / 2;
  uint32_t state = 1;
  mgt_mask_by_confidence_args args;
  memset(&args, 0, sizeof args);
  args.struct_size = sizeof args;
  args.num_samples = 1;
  args.num_positions = NUM_POSITIONS;
  args.token_ids = token_ids;
  args.logprob = logprob;
  args.mask_len = &mask_len;
  args.seeds = &seed;
  args.mask_token_id = NUM_POSITIONS;
  args.temperature = 2.0f;
  for (int i = 0; i < NUM_POSITIONS; ++i) {
    token_ids[i] = i;
    logprob[i] = -fabsf(random_logit(&state));
  }
  COUNT("mask_by_confidence, guided, fp32, token-major", context->isa, NUM_POSITIONS,
        mgt_mask_by_confidence(context, &args, masked, &error_index));
}

static void count_layers(const mgt_context* context, int eight_bits) {
  enum { M = 16, K = 256, N = 64, GROUPS = K / 128 };
  static float x[M * K], y[M * N], scale[N * GROUPS];
  static uint8_t w_q[N * K / 2], zero_point[N * GROUPS];
  fill(x, MGT_FLOAT32, M * K, 1);
  for (int i = 0; i < N * K / 2; ++i) w_q[i] = (uint8_t)(i * 37);
  for (int i = 0; i < N * GROUPS; ++i) {
    scale[i] = 0.5f;
    zero_point[i] = (uint8_t)(i % 16);
  }
  mgt_int4_linear_args args;
  memset(&args, 0, sizeof args);
  args.struct_size = sizeof args;
  args.num_rows = M;
  args.num_inputs = K;
  args.num_outputs = N;
  args.dtype = MGT_FLOAT32;
  args.x = x;
  args.x_stride = K;
  args.w_q = w_q;
  args.scale = scale;
  args.scale_dtype = MGT_FLOAT32;
  args.zero_point = zero_point;
  args.group_size = 128;
  const int64_t num_bytes =
      eight_bits ? mgt_w4a8_linear_workspace(context, &args) : mgt_w4a16_linear_workspace(context, &args);
  if (num_bytes < 0 || num_bytes > (int64_t)sizeof workspace) exit(1);
  if (eight_bits)
    COUNT("w4a8_linear, group 128, fp32, token-major", context->isa, M * K * N,
          mgt_w4a8_linear(context, &args, NULL, 0, y, workspace, num_bytes, &error_index));
  else
    COUNT("w4a16_linear, group 128, fp32, token-major", context->isa, M * K * N,
          mgt_w4a16_linear(context, &args, y, workspace, num_bytes, &error_index));
}

/* whether an op has a kernel of this very instruction set here */
static int has_kernel(const char* op, mgt_isa isa) {
  mgt_isa resolved, kernel;
  return mgt_resolve_isa(isa, &resolved) == MGT_OK && mgt_kernel_isa(op, isa, &kernel) == MGT_OK && kernel == isa;
}

int main(int argc, char** argv) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = on_trap;
  sigaction(SIGTRAP, &action, NULL);
  for (int isa = MGT_ISA_AVX2; isa <= MGT_ISA_AMX; ++isa) {
    const mgt_context context = {(mgt_isa)isa, 1, NULL};
    int wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted |= strcmp(argv[i], mgt_isa_name(context.isa)) == 0;
    if (!wanted) continue;
    if (has_kernel("sample_tokens", context.isa)) count_draws(&context);
    if (has_kernel("differential_sample", context.isa)) count_differential(&context);
    if (has_kernel("mask_by_confidence", context.isa)) count_masks(&context);
    if (has_kernel("w4a8_linear", context.isa)) count_layers(&context, 1);
    if (has_kernel("w4a16_linear", context.isa)) count_layers(&context, 0);
  }
  return 0;
}
