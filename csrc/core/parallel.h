// SPDX-License-Identifier: Apache-2.0
// parallel_for: runs on torch's own OpenMP pool when the process has one (csrc/parallel.cpp).
#pragma once

#include <cstdint>

namespace td {

int max_threads();                // what torch.get_num_threads() says in this thread
const char* threading_runtime();  // "openmp" or "std::thread"

// Results of at least this many bytes leave the last cache before anybody reads them: half of its size, 8 MiB at most.
int64_t stream_threshold();

namespace detail {
// Runs fn(context, i) for i in [0, count), count <= max_threads(), each on a thread of its own.
void run_parallel(int count, void (*fn)(void*, int), void* context);
}  // namespace detail

// Cuts [0, n) into at most max_threads() contiguous ranges of at least `grain` items and calls body(begin, end) for
// each. The cut depends on n, grain and the number of threads only. body must not throw.
template <class Body>
inline __attribute__((always_inline)) void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  const int64_t wanted = grain > 0 ? (n + grain - 1) / grain : n;
  const int64_t limit = max_threads();
  const int64_t count = wanted < limit ? wanted : limit;
  if (count <= 1) {
    body(int64_t(0), n);
    return;
  }
  struct Context {
    const Body* body;
    int64_t n, count;
  } context{&body, n, count};
  detail::run_parallel(
      int(count),
      [](void* opaque, int i) {
        const Context& c = *static_cast<Context*>(opaque);
        (*c.body)(c.n* i / c.count, c.n * (i + 1) / c.count);
      },
      &context);
}

}  // namespace td
