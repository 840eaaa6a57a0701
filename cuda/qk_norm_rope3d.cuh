// SPDX-License-Identifier: Apache-2.0
// What forward and backward of qk_norm_rope3d share.
#pragma once

#include "core/qk_norm_rope3d.h"
#include "rope_row.cuh"

namespace td::cuda {

constexpr int kNormThreads = 256, kNormWarps = kNormThreads / 32;  // where warps share heads, or nothing is known
constexpr int kRowThreads = 384;                                   // at most, where a block holds a token
constexpr int kRowVectors = 4;                                     // of 16 bytes that a thread holds of it

__device__ __forceinline__ float inverse_root(float v) {
  return rsqrtf(v);
}
__device__ __forceinline__ double inverse_root(double v) {
  return rsqrt(v);
}

// Sum over the block of a value that is the same in all lanes of a warp.
template <class C>
__device__ __forceinline__ C sum_of_warps(C value, C* scratch) {
  return block_sum((threadIdx.x & 31) == 0 ? value : C(0), scratch);
}

// Units that a thread holds when a block holds a whole token.
constexpr int row_units(bool interleaved) {
  return interleaved ? kRowVectors : kRowVectors / 2;
}

// Threads that hold a token together; 0: it does not fit, or a unit would change its place in the head.
template <class T>
int row_threads(const RopeArgs& args) {
  const int slots = args.dim / kFullVector<T> / (args.interleaved ? 1 : 2), per_thread = row_units(args.interleaved);
  if (32 % slots != 0 && slots % 32 != 0) return 0;
  const int64_t multiple = slots < 32 ? 32 : slots, wanted = (args.heads * slots + per_thread - 1) / per_thread;
  const int64_t threads = (wanted + multiple - 1) / multiple * multiple;
  return threads <= kRowThreads ? int(threads) : 0;
}

// Heads are narrow enough for a warp, and their units a power of two.
template <class T>
bool heads_fit_warp(const RopeArgs& args) {
  return 32 % (args.dim / kFullVector<T> / (args.interleaved ? 1 : 2)) == 0;
}

// Everything is aligned to 16 bytes: the tensors of the call, and the weight.
template <class T>
bool whole_vectors(const QkNormRopeArgs& all) {
  return whole_vectors<T>(all.rope) && aligned_rows(all.weight, nullptr, 0, 0);
}

// The weight of a unit, channel by channel as Unit::get counts.
template <class T, bool Interleaved>
__device__ __forceinline__ void load_weight(const QkNormRopeArgs& all, int64_t head, int slot,
                                            compute_t<T> (&values)[Unit<T, kFullVector<T>, Interleaved>::kChannels]) {
  using C = compute_t<T>;
  Unit<C, kFullVector<T>, Interleaved> unit;
  unit.load(static_cast<const C*>(all.weight) + head * all.rope.dim, slot, all.rope.dim);
#pragma unroll
  for (int j = 0; j < unit.kChannels; ++j) values[j] = unit.get(j);
}

}  // namespace td::cuda
