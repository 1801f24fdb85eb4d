// Runs a body over [0, count) in chunks that threads take from a shared counter. Compiled at the baseline only.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "entry.h"
#include "mgt_kernels.h"

namespace mgt {

// threads of our own for one call, for callers that lend no pool; the calling thread is one of them
inline void parallel_with_own_threads(void (*body)(void*), void* data, unsigned num_threads, unsigned) {
  std::vector<std::thread> helpers;
  try {
    for (unsigned i = 1; i < num_threads; ++i) helpers.emplace_back(body, data);
  } catch (...) {
    // no thread, or no memory for one: fewer threads share the same counter, so the result is the same
  }
  body(data);
  for (std::thread& helper : helpers) helper.join();
}

// The threads that a call may use. A system refuses to start thousands of them, and OpenMP runtimes then end the
// process.
inline int64_t max_workers(const mgt_context& context) {
  static const int64_t most = std::max<int64_t>(16, std::thread::hardware_concurrency());
  return std::min<int64_t>(context.num_threads, most);
}

// `count` pieces of work, handed out `chunk_size` at a time to `num_workers` workers
struct Chunks {
  int64_t count, chunk_size, num_workers;
  Chunks(const mgt_context& context, int64_t count, int64_t chunk_size)
      : count(count),
        chunk_size(chunk_size),
        num_workers(
            std::max(int64_t{1}, std::min(max_workers(context), count / chunk_size + (count % chunk_size != 0)))) {}
};

// chunk(begin, end, worker): calls with the same worker never overlap, and worker < chunks.num_workers
template <class Chunk>
void parallel_chunks(const mgt_context& context, const Chunks& chunks, const Chunk& chunk) {
  struct Work {
    const Chunk& chunk;
    const Chunks& chunks;
    std::atomic<int64_t> next, next_worker;
  } work{chunk, chunks, {0}, {0}};
  const auto body = [](void* data) {
    Work& shared = *static_cast<Work*>(data);
    // a lent pool may run the body more often than it was asked to; the first runs do the work
    const int64_t worker = shared.next_worker.fetch_add(1, std::memory_order_relaxed);
    if (worker >= shared.chunks.num_workers) return;
    const FloatState state;
    for (;;) {
      const int64_t begin = shared.next.fetch_add(shared.chunks.chunk_size, std::memory_order_relaxed);
      if (begin >= shared.chunks.count) return;
      shared.chunk(begin, std::min(begin + shared.chunks.chunk_size, shared.chunks.count), worker);
    }
  };
  if (chunks.num_workers == 1) return body(&work);
  const mgt_parallel parallel = context.parallel ? context.parallel : parallel_with_own_threads;
  parallel(body, &work, static_cast<unsigned>(chunks.num_workers), 0);
}

}  // namespace mgt
