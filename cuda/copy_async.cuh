// SPDX-License-Identifier: Apache-2.0
// Copies into shared memory that go on while the thread does something else, in groups that it can wait for.
#pragma once

#include "launch.cuh"
#if !defined(__CUDACC__)
#include <deque>
#endif

namespace td::cuda {

#if defined(__CUDACC__)

// Copies the first `bytes` of kBytes (4, 8 or 16; both sides aligned to it) and makes the rest zero.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* source, int bytes) {
  const uint32_t target = uint32_t(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
  } else {
    static_assert(kBytes == 4 || kBytes == 8);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(source), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

// Copies kBytes.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* source) {
  static_assert(kBytes == 16);
  const uint32_t target = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// Ends a group of copies of this thread.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's copies but those of its last kGroups groups. Those of other threads need a barrier as well.
template <int kGroups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

#else

namespace emulated {

// Copies happen as late as they may, when the thread waits for them: who reads too early finds what was there before.
struct Copies {
  struct Copy {
    void* target;
    const void* source;
    int size, bytes, group;
  };
  std::deque<Copy> waiting;
  int group = 0;
  uint3 block{};
};

inline Copies& copies() {
  static Copies of_threads[1024];
  Copies& mine = of_threads[threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)];
  if (mine.block.x != blockIdx.x || mine.block.y != blockIdx.y || mine.block.z != blockIdx.z) mine = Copies{};
  mine.block = blockIdx;
  return mine;
}

}  // namespace emulated

template <int kBytes>
void copy_async(void* shared, const void* source, int bytes) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(source)) % kBytes != 0) __builtin_trap();
  emulated::Copies& mine = emulated::copies();
  mine.waiting.push_back({shared, source, kBytes, bytes, mine.group});
}

template <int kBytes>
void copy_async(void* shared, const void* source) {
  copy_async<kBytes>(shared, source, kBytes);
}

inline void commit_copies() {
  ++emulated::copies().group;
}

template <int kGroups>
void wait_copies() {
  emulated::Copies& mine = emulated::copies();
  while (!mine.waiting.empty() && mine.waiting.front().group < mine.group - kGroups) {
    const emulated::Copies::Copy& copy = mine.waiting.front();
    std::memset(copy.target, 0, size_t(copy.size));
    std::memcpy(copy.target, copy.source, size_t(copy.bytes));
    mine.waiting.pop_front();
  }
}

#endif

}  // namespace td::cuda
