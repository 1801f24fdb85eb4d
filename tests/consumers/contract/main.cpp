// What the header promises of every op: the same results on one thread, on the library's own threads, on a pool that
// the caller lends, and in calls at the same time; no allocation where the caller lends a pool; nothing printed.
//
// -DSTACK_BYTES=65536 gives every thread but the first a stack of that many bytes.
// Prints "lent pool: N allocations" and "own threads: N allocations"; without COUNT_ALLOCATIONS both are 0.
#include <mgt_kernels.h>
#include <pthread.h>

#include <array>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {
std::atomic<long> num_allocations{0};
std::atomic<bool> counting{false};
}  // namespace

#ifdef COUNT_ALLOCATIONS
// glibc's own, under the names that the whole process calls
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
static void count() {
  if (counting) ++num_allocations;
}
void* malloc(size_t size) {
  count();
  return __libc_malloc(size);
}
void* calloc(size_t number, size_t size) {
  count();
  return __libc_calloc(number, size);
}
void* realloc(void* pointer, size_t size) {
  count();
  return __libc_realloc(pointer, size);
}
void* aligned_alloc(size_t alignment, size_t size) {
  count();
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** pointer, size_t alignment, size_t size) {
  count();
  *pointer = __libc_memalign(alignment, size);
  return *pointer == nullptr;
}
}
#endif

namespace {

constexpr int kThreads = 3;

// threads that sleep between calls; one call at a time
class Pool {
 public:
  Pool() {
    for (int i = 1; i < kThreads; ++i) threads_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      body_ = nullptr;
      ++turn_;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(void (*body)(void*), void* data) {
    const std::lock_guard<std::mutex> one_call(calls_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      data_ = data;
      num_running_ = kThreads - 1;
      ++turn_;
    }
    changed_.notify_all();
    body(data);
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return num_running_ == 0; });
  }

 private:
  void work() {
    long seen = 0;
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return turn_ != seen; });
      seen = turn_;
      if (!body_) return;
      const auto body = body_;
      void* data = data_;
      lock.unlock();
      body(data);
      lock.lock();
      if (--num_running_ == 0) changed_.notify_all();
    }
  }

  std::mutex calls_, mutex_;
  std::condition_variable changed_;
  std::vector<std::thread> threads_;
  void (*body_)(void*) = nullptr;
  void* data_ = nullptr;
  int num_running_ = 0;
  long turn_ = 0;
};

void run_on_pool(void (*body)(void*), void* data, unsigned, unsigned) {
  static Pool pool;
  pool.run(body, data);
}

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// One round of every op, in memory that is there before the first.
class Round {
 public:
  explicit Round(const mgt_context& context) : context_(context) {
    for (size_t i = 0; i < logits_.size(); ++i) logits_[i] = static_cast<float>(i * 7919 % 1009) * 0.01f;
    for (size_t i = 0; i < uncond_.size(); ++i) uncond_[i] = static_cast<float>(i * 104729 % 997) * 0.01f;
    // finite in both formats of 16 bits
    for (size_t i = 0; i < halves_.size(); ++i) halves_[i] = static_cast<uint16_t>(0x3000 + i * 7919 % 0x1000);
    for (size_t i = 0; i < x_.size(); ++i) x_[i] = static_cast<float>(i * 31 % 101) - 50.0f;
    for (size_t i = 0; i < w_q_.size(); ++i) w_q_[i] = static_cast<uint8_t>(37 * i);
    layer_.struct_size = sizeof layer_;
    layer_.num_rows = kRows;
    layer_.num_inputs = kInputs;
    layer_.num_outputs = kOutputs;
    layer_.dtype = layer_.scale_dtype = MGT_FLOAT32;
    layer_.x = x_.data();
    layer_.x_stride = kInputs;
    layer_.w_q = w_q_.data();
    layer_.scale = scale_.data();
    layer_.zero_point = zero_point_.data();
    layer_.group_size = 128;
    for (size_t i = 0; i < some_tokens_.size(); i += 3) some_tokens_[i] = static_cast<int64_t>(i);
    for (size_t i = 0; i < bias_.size(); ++i) bias_[i] = i % 7 ? static_cast<float>(i % 5) * 0.25f : -INFINITY;
    grid_.struct_size = sizeof grid_;
    grid_.num_samples = 2;
    grid_.height = kHeight;
    grid_.width = kWidth;
    grid_.num_channels = kChannels;
    grid_.stride_sample = kGridTokens * kChannels;
    grid_.stride_token = kChannels;
    grid_.num_merged = kMerged;
    grid_.seeds = grid_seeds_;
    const mgt_sample_tokens_args by_token = draw(false), by_position = draw(true);
    const mgt_sample_tokens_args truncated_by_token = truncated_draw(false),
                                 truncated_by_position = truncated_draw(true);
    const mgt_differential_sample_args differential = differential_draw(by_token),
                                       differential_by_position = differential_draw(by_position);
    for (const int64_t size :
         {mgt_sample_tokens_workspace(&context_, &by_token), mgt_sample_tokens_workspace(&context_, &by_position),
          mgt_sample_tokens_workspace(&context_, &truncated_by_token),
          mgt_sample_tokens_workspace(&context_, &truncated_by_position),
          mgt_differential_sample_workspace(&context_, &differential),
          mgt_differential_sample_workspace(&context_, &differential_by_position),
          mgt_match_tokens_workspace(&context_, &grid_), mgt_w4a8_linear_workspace(&context_, &layer_),
          mgt_w4a16_linear_workspace(&context_, &layer_)}) {
      require(size >= 0, "a workspace has no size");
      if (static_cast<size_t>(size) > workspace_.size()) workspace_.resize(static_cast<size_t>(size));
    }
  }

  void run() {
    const auto workspace_bytes = static_cast<int64_t>(workspace_.size());
    for (const bool position_major : {false, true}) {
      const mgt_sample_tokens_args args = draw(position_major);
      const mgt_sample_tokens_outputs drawn =
          draws(ids_.data() + position_major * kPositions, logprob_.data() + position_major * kPositions);
      check(mgt_sample_tokens(&context_, &args, &drawn, workspace_.data(), workspace_bytes, nullptr));
    }
    for (const bool position_major : {false, true}) {
      mgt_sample_tokens_args args = draw(position_major);
      args.tokens = some_tokens_.data();
      args.first_positions = &first_position_;
      args.guidance_scales = &guidance_scale_;
      args.token_bias = bias_.data();
      args.rows = MGT_ROWS_ALL;
      check(mgt_sample_tokens(&context_, &args, &statistics_[position_major].outputs, workspace_.data(),
                              workspace_bytes, nullptr));
    }
    for (const bool position_major : {false, true}) {
      const mgt_sample_tokens_args args = truncated_draw(position_major);
      check(mgt_sample_tokens(&context_, &args, &truncated_[position_major].outputs, workspace_.data(), workspace_bytes,
                              nullptr));
    }
    for (const bool position_major : {false, true}) {
      for (const mgt_dtype dtype : {MGT_BFLOAT16, MGT_FLOAT16}) {
        mgt_sample_tokens_args args = draw(position_major);
        args.dtype = dtype;
        args.logits.data = args.uncond_logits.data = halves_.data();
        const mgt_sample_tokens_outputs drawn = draws(half_ids_.data(), half_logprob_.data());
        check(mgt_sample_tokens(&context_, &args, &drawn, workspace_.data(), workspace_bytes, nullptr));
      }
    }
    mgt_mask_by_confidence_args mask{};
    mask.struct_size = sizeof mask;
    mask.num_samples = 1;
    mask.num_positions = kPositions;
    mask.token_ids = ids_.data();
    mask.logprob = logprob_.data();
    mask.mask_len = &mask_len_;
    mask.seeds = &seed_;
    mask.mask_token_id = kTokens;
    mask.temperature = 2.0f;
    check(mgt_mask_by_confidence(&context_, &mask, masked_.data(), nullptr));
    for (int step = 0; step < 3; ++step) {
      mgt_sample_tokens_args sample = draw(step == 2);
      sample.step = step;
      sample.guidance_scale += static_cast<float>(step);
      mgt_differential_sample_args args = differential_draw(sample);
      args.has_history = step;
      check(mgt_differential_sample(&context_, &args, history_.data(), written_.data(), differential_ids_.data(),
                                    differential_logprob_.data(), divergence_.data(), workspace_.data(),
                                    workspace_bytes, nullptr));
    }
    for (const mgt_dtype dtype : {MGT_FLOAT32, MGT_BFLOAT16, MGT_FLOAT16}) match_and_merge(dtype);
    check(mgt_w4a8_linear(&context_, &layer_, nullptr, 0, y8_.data(), workspace_.data(), workspace_bytes, nullptr));
    check(mgt_w4a16_linear(&context_, &layer_, y16_.data(), workspace_.data(), workspace_bytes, nullptr));
  }

  bool operator==(const Round& other) const {
    return ids_ == other.ids_ && logprob_ == other.logprob_ && masked_ == other.masked_ && history_ == other.history_ &&
           written_ == other.written_ && differential_ids_ == other.differential_ids_ &&
           differential_logprob_ == other.differential_logprob_ && divergence_ == other.divergence_ &&
           statistics_[0] == other.statistics_[0] && statistics_[1] == other.statistics_[1] &&
           truncated_[0] == other.truncated_[0] && truncated_[1] == other.truncated_[1] &&
           half_ids_ == other.half_ids_ && half_logprob_ == other.half_logprob_ && match_ == other.match_ &&
           merged_ == other.merged_ && unmerged_ == other.unmerged_ && y8_ == other.y8_ && y16_ == other.y16_;
  }

 private:
#ifdef STACK_BYTES
  // more than a tile
  static constexpr int64_t kTokens = 2100;
#else
  static constexpr int64_t kTokens = 530;
#endif
  static constexpr int64_t kPositions = 70, kRows = 70, kInputs = 256, kOutputs = 96;

  // tokens of a grid, of both samples
  static constexpr int64_t kHeight = 12, kWidth = 14, kGridTokens = kHeight * kWidth, kChannels = 45;
  static constexpr int64_t kMerged = kGridTokens / 2, kMergedRows = kGridTokens - kMerged;

  void match_and_merge(mgt_dtype dtype) {
    grid_.dtype = dtype;
    grid_.x = dtype == MGT_FLOAT32 ? static_cast<const void*>(logits_.data()) : halves_.data();
    int64_t* rows = match_[dtype].data();
    int64_t *members = rows + 2 * kGridTokens, *starts = members + 2 * kGridTokens;
    const mgt_match_tokens_outputs match{sizeof match, rows, members, starts, starts + 2 * (kGridTokens + 1)};
    check(mgt_match_tokens(&context_, &grid_, &match, workspace_.data(), static_cast<int64_t>(workspace_.size()),
                           nullptr));
    const mgt_merge_tokens_args merge{sizeof merge,       dtype,     2,       kGridTokens,
                                      kMergedRows,        kChannels, grid_.x, grid_.stride_sample,
                                      grid_.stride_token, members,   starts};
    check(mgt_merge_tokens(&context_, &merge, merged_[dtype].data(), nullptr));
    const mgt_unmerge_tokens_args unmerge{
        sizeof unmerge,          dtype,     2,   kGridTokens, kMergedRows, kChannels, merged_[dtype].data(),
        kMergedRows * kChannels, kChannels, rows};
    check(mgt_unmerge_tokens(&context_, &unmerge, unmerged_[dtype].data(), nullptr));
  }

  static void check(mgt_status status) { require(status == MGT_OK, "an op failed"); }

  mgt_sample_tokens_args draw(bool position_major) const {
    mgt_sample_tokens_args args{};
    args.struct_size = sizeof args;
    args.num_samples = 1;
    args.num_positions = kPositions;
    args.num_tokens = kTokens;
    args.dtype = MGT_FLOAT32;
    const int64_t stride_position = position_major ? 1 : kTokens, stride_token = position_major ? kPositions : 1;
    args.logits = {logits_.data(), kPositions * kTokens, stride_position, stride_token};
    args.uncond_logits = {uncond_.data(), kPositions * kTokens, stride_position, stride_token};
    args.tokens = tokens_.data();
    args.seeds = &seed_;
    args.mask_token_id = kTokens;
    args.guidance_scale = 2.0f;
    args.noise_scale = 0.5f;
    args.temperature = 1.0f;
    return args;
  }

  // capped, guided twice, and some tokens left out
  mgt_sample_tokens_args truncated_draw(bool position_major) const {
    mgt_sample_tokens_args args = draw(position_major);
    args.second_uncond_logits = args.logits;
    args.second_uncond_logits.data = uncond_.data();
    args.second_guidance_scale = 1.5f;
    args.guidance = MGT_GUIDANCE_DUAL;
    args.softcap = 8.0f;
    args.top_k = 300;
    args.top_p = 0.95f;
    args.min_p = 1e-4f;
    return args;
  }

  static mgt_differential_sample_args differential_draw(const mgt_sample_tokens_args& sample) {
    mgt_differential_sample_args args{};
    args.struct_size = sizeof args;
    args.sample = &sample;
    args.share = 0.5;
    return args;
  }

  static mgt_sample_tokens_outputs draws(int64_t* token_ids, float* logprob) {
    mgt_sample_tokens_outputs outputs{};
    outputs.struct_size = sizeof outputs;
    outputs.token_ids = token_ids;
    outputs.logprob = logprob;
    return outputs;
  }

  // all that a draw can give, in memory of its own
  struct Statistics {
    Statistics() {
      outputs = draws(integers.data(), floats.data());
      outputs.argmax = integers.data() + kPositions;
      float* next = floats.data();
      for (float** statistic : {&outputs.max_logprob, &outputs.margin, &outputs.entropy, &outputs.logsumexp,
                                &outputs.known_logprob, &outputs.logit})
        *statistic = next += kPositions;
    }
    Statistics(const Statistics&) = delete;
    bool operator==(const Statistics& other) const { return integers == other.integers && floats == other.floats; }

    std::vector<int64_t> integers = std::vector<int64_t>(2 * kPositions);
    std::vector<float> floats = std::vector<float>(7 * kPositions);
    mgt_sample_tokens_outputs outputs;
  };

  template <class T>
  static std::array<T, 3> three(const T& each) {
    return {each, each, each};
  }

  mgt_context context_;
  mgt_int4_linear_args layer_{};
  mgt_match_tokens_args grid_{};
  int64_t grid_seeds_[2] = {7, -7};
  // of each dtype, in as many bytes as the largest takes
  std::array<std::vector<int64_t>, 3> match_ = three(std::vector<int64_t>(6 * kGridTokens + 4));
  std::array<std::vector<float>, 3> merged_ = three(std::vector<float>(2 * kMergedRows * kChannels)),
                                    unmerged_ = three(std::vector<float>(2 * kGridTokens * kChannels));
  int64_t first_position_ = 1000;
  float guidance_scale_ = 1.5f;
  Statistics statistics_[2], truncated_[2];
  int64_t seed_ = 7, mask_len_ = kPositions / 2;
  std::vector<float> logits_ = std::vector<float>(kPositions * kTokens), uncond_ = logits_;
  std::vector<uint16_t> halves_ = std::vector<uint16_t>(kPositions * kTokens);
  std::vector<int64_t> tokens_ = std::vector<int64_t>(kPositions, kTokens), masked_ = tokens_,
                       differential_ids_ = tokens_;
  std::vector<int64_t> some_tokens_ = tokens_;
  std::vector<float> bias_ = std::vector<float>(kTokens);
  std::vector<int64_t> half_ids_ = std::vector<int64_t>(kPositions);
  std::vector<float> half_logprob_ = std::vector<float>(kPositions);
  std::vector<int64_t> ids_ = std::vector<int64_t>(2 * kPositions);
  std::vector<float> logprob_ = std::vector<float>(2 * kPositions);
  std::vector<float> differential_logprob_ = std::vector<float>(kPositions), divergence_ = differential_logprob_;
  std::vector<uint16_t> history_ = std::vector<uint16_t>(kPositions * kTokens);
  std::vector<uint8_t> written_ = std::vector<uint8_t>(kPositions);
  std::vector<float> x_ = std::vector<float>(kRows * kInputs), y8_ = std::vector<float>(kRows * kOutputs), y16_ = y8_;
  std::vector<uint8_t> w_q_ = std::vector<uint8_t>(kOutputs * kInputs / 2);
  std::vector<float> scale_ = std::vector<float>(kOutputs * kInputs / 128, 0.125f);
  std::vector<uint8_t> zero_point_ = std::vector<uint8_t>(kOutputs * kInputs / 128, 8);
  std::vector<char> workspace_;
};

}  // namespace

int main() {
#ifdef STACK_BYTES
  pthread_attr_t small;
  pthread_attr_init(&small);
  require(pthread_attr_setstacksize(&small, STACK_BYTES) == 0 && pthread_setattr_default_np(&small) == 0,
          "no threads with such stacks");
#endif
  const mgt_context one{MGT_ISA_AUTO, 1, nullptr};
  const mgt_context own{MGT_ISA_AUTO, kThreads, nullptr}, lent{MGT_ISA_AUTO, kThreads, run_on_pool};
  Round expected(one);
  expected.run();
  for (const mgt_context& context : {lent, own}) {
    Round round(context);
    round.run();
    require(round == expected, "results differ on several threads");
    num_allocations = 0;
    counting = true;
    round.run();
    counting = false;
    std::printf("%s: %ld allocations\n", context.parallel ? "lent pool" : "own threads", num_allocations.load());
  }
  Round rounds[] = {Round(lent), Round(own), Round(one)};
  std::vector<std::thread> callers;
  for (Round& round : rounds) callers.emplace_back([&round] { round.run(); });
  for (std::thread& caller : callers) caller.join();
  for (const Round& round : rounds) require(round == expected, "results differ in calls at the same time");
}
