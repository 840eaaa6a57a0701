// SPDX-License-Identifier: Apache-2.0
// Threads for the CPU kernels. Torch has an OpenMP pool that is already awake; a second pool would compete with it for
// the same cores. So its entry points are looked up in the running process (any runtime with the GNU interface will
// do), and only a process without one gets plain threads.
#include "core/parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace td {
namespace {

struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;

  OpenMp() {
    const auto find = [](const char* name) { return dlsym(RTLD_DEFAULT, name); };
    parallel = reinterpret_cast<decltype(parallel)>(find("GOMP_parallel"));
    thread_num = reinterpret_cast<decltype(thread_num)>(find("omp_get_thread_num"));
    num_threads = reinterpret_cast<decltype(num_threads)>(find("omp_get_num_threads"));
    max_threads = reinterpret_cast<decltype(max_threads)>(find("omp_get_max_threads"));
    in_parallel = reinterpret_cast<decltype(in_parallel)>(find("omp_in_parallel"));
  }
  bool found() const { return parallel && thread_num && num_threads && max_threads && in_parallel; }
};

const OpenMp& openmp() {
  static const OpenMp instance;
  return instance;
}

struct Job {
  void (*fn)(void*, int);
  void* context;
  int count;
};

void openmp_body(void* opaque) {
  const Job& job = *static_cast<Job*>(opaque);
  // The runtime may give fewer threads than asked for.
  const int step = openmp().num_threads();
  for (int i = openmp().thread_num(); i < job.count; i += step) job.fn(job.context, i);
}

// Size of the last cache that a core reaches. The C library's figure comes last: on some machines it is the sum over
// all the dies of a package, most of which a core never uses.
int64_t last_cache_bytes() {
  for (int index = 4; index >= 2; --index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    int64_t size = 0;
    char unit = ' ';
    if (file >> size && size > 0) return (file >> unit && unit == 'K') ? size << 10 : (unit == 'M' ? size << 20 : size);
  }
#if defined(_SC_LEVEL3_CACHE_SIZE)
  if (const long size = sysconf(_SC_LEVEL3_CACHE_SIZE); size > 0) return size;
#endif
  return 32 << 20;
}

}  // namespace

int max_threads() {
  if (openmp().found()) return openmp().in_parallel() ? 1 : openmp().max_threads();
  static const int count = [] {
    const char* text = std::getenv("OMP_NUM_THREADS");
    const int wanted = text ? std::atoi(text) : 0;
    const int cores = int(std::thread::hardware_concurrency());
    return wanted > 0 ? wanted : (cores > 0 ? cores : 1);
  }();
  return count;
}

int64_t stream_threshold() {
  // A large last cache is that of many cores, and a few of them find little of it free: results of 19 MB took up to
  // half of the time past the caches where others were busy (300 MB for all), and no more where nobody was.
  static const int64_t bytes = std::min<int64_t>(last_cache_bytes() / 2, 8 << 20);
  return bytes;
}

const char* threading_runtime() {
  return openmp().found() ? "openmp" : "std::thread";
}

namespace detail {

void run_parallel(int count, void (*fn)(void*, int), void* context) {
  if (openmp().found()) {
    Job job{fn, context, count};
    openmp().parallel(openmp_body, &job, unsigned(count), 0);
    return;
  }
  std::vector<std::thread> threads;
  threads.reserve(size_t(count - 1));
  for (int i = 1; i < count; ++i) threads.emplace_back(fn, context, i);
  fn(context, 0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace detail
}  // namespace td
