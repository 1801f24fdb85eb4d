// Runs a body over [0, count) in chunks that threads take from a shared counter. Compiled at the baseline, in capi.cpp
// only.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

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

// chunk(begin, end, worker): calls with the same worker never overlap, and worker < context.num_threads
template <class Chunk>
void parallel_chunks_by_worker(const mgt_context& context, int64_t count, int64_t chunk_size, const Chunk& chunk) {
  struct Work {
    const Chunk& chunk;
    int64_t count, chunk_size, num_workers;
    std::atomic<int64_t> next, next_worker;
  } work{chunk, count, chunk_size, context.num_threads, {0}, {0}};
  const auto body = [](void* data) {
    Work& shared = *static_cast<Work*>(data);
    // a lent pool may run the body more often than it was asked to; the first runs do the work
    const int64_t worker = shared.next_worker.fetch_add(1, std::memory_order_relaxed);
    if (worker >= shared.num_workers) return;
    for (;;) {
      const int64_t begin = shared.next.fetch_add(shared.chunk_size, std::memory_order_relaxed);
      if (begin >= shared.count) return;
      shared.chunk(begin, std::min(begin + shared.chunk_size, shared.count), worker);
    }
  };
  const int64_t num_chunks = (count + chunk_size - 1) / chunk_size;
  const auto num_threads = static_cast<unsigned>(std::min<int64_t>(context.num_threads, num_chunks));
  if (num_threads <= 1) return body(&work);
  const mgt_parallel parallel = context.parallel ? context.parallel : parallel_with_own_threads;
  parallel(body, &work, num_threads, 0);
}

template <class Chunk>
void parallel_chunks(const mgt_context& context, int64_t count, int64_t chunk_size, const Chunk& chunk) {
  parallel_chunks_by_worker(context, count, chunk_size,
                            [&](int64_t begin, int64_t end, int64_t) { chunk(begin, end); });
}

}  // namespace mgt
