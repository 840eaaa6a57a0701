// SPDX-License-Identifier: Apache-2.0
// The rotation of a token, and the channels of a head that one thread works on.
#pragma once

#include "core/rope3d.h"
#include "vector.cuh"

namespace td::cuda {

template <class C>
__device__ __forceinline__ void pair_rotation(const RopeArgs& args, const RopeCursor& cursor, int pair, C& c, C& s) {
  const int first_h = args.pairs[0], first_w = first_h + args.pairs[1];
  const int axis = pair < first_h ? 0 : (pair < first_w ? 1 : 2);
  const int64_t at = cursor.row(axis, args.pairs) + pair - (axis == 0 ? 0 : (axis == 1 ? first_h : first_w));
  c = static_cast<const C*>(args.cos)[at];
  s = static_cast<const C*>(args.sin)[at];
  if (args.inverse) s = -s;
}

// Unit number `slot` of a head: V channels (Interleaved), or V channels of the lower half and their partners.
template <class T, int V, bool Interleaved>
struct Unit {
  using C = compute_t<T>;
  static constexpr int kVectors = Interleaved ? 1 : 2, kPairs = Interleaved ? V / 2 : V, kChannels = 2 * kPairs;
  Vector<T, V> vectors[kVectors];

  static __device__ __forceinline__ int64_t offset(int slot, int vector, int dim) {
    return slot * V + vector * (dim / 2);
  }
  __device__ __forceinline__ void load(const T* head, int slot, int dim) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors[i].load(head + offset(slot, i, dim));
  }
  __device__ __forceinline__ void store(T* head, int slot, int dim) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors[i].store(head + offset(slot, i, dim));
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors[i].clear();
  }
  // Channel j of the unit: the first and the second of pair 0, of pair 1, ...
  __device__ __forceinline__ C get(int j) const {
    if constexpr (Interleaved) {
      return vectors[0].get(j);
    } else {
      return vectors[j % 2].get(j / 2);
    }
  }
  __device__ __forceinline__ void set(const C (&values)[kChannels]) {
    C parts[kVectors][V];
#pragma unroll
    for (int j = 0; j < kChannels; ++j) parts[Interleaved ? 0 : j % 2][Interleaved ? j : j / 2] = values[j];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors[i].set(parts[i]);
  }
};

// Cosines and sines of the pairs of a unit.
template <class C, int Pairs>
struct Rotation {
  C c[Pairs], s[Pairs];

  __device__ __forceinline__ void load(const RopeArgs& args, const RopeCursor& cursor, int slot) {
#pragma unroll
    for (int p = 0; p < Pairs; ++p) pair_rotation(args, cursor, slot * Pairs + p, c[p], s[p]);
  }
  __device__ __forceinline__ void apply(C (&values)[2 * Pairs]) const {
#pragma unroll
    for (int p = 0; p < Pairs; ++p) {
      const C u = values[2 * p], v = values[2 * p + 1];
      values[2 * p] = u * c[p] - v * s[p];
      values[2 * p + 1] = v * c[p] + u * s[p];
    }
  }
};

// Which unit of which head a lane of a warp has, when the heads of a token are narrow enough to lie side by side.
struct Lane {
  int slots, slot, head, heads;  // units per head; its own; heads side by side

  __device__ __forceinline__ Lane(int units_per_head) : slots(units_per_head) {
    const int lane = int(threadIdx.x) & 31;
    heads = slots < 32 ? 32 / slots : 1;
    head = slots < 32 ? lane / slots : 0;
    slot = lane - head * slots;
  }
};

// How the warps of a block share the heads of a token: `warps` warps take them in turns, `tokens` tokens per block.
struct RowWarps {
  int warps, tokens;

  RowWarps(int64_t heads, int heads_per_warp) {
    const int64_t chunks = (heads + heads_per_warp - 1) / heads_per_warp, rounds = (chunks + 7) / 8;
    warps = int((chunks + rounds - 1) / rounds);
    tokens = 8 / warps;
  }
  int threads() const { return 32 * warps * tokens; }
};

// Sums of a head's channels over the lanes that share it; `slots` is a power of 2 up to 32.
template <class C>
__device__ __forceinline__ C head_sum(C value, int slots) {
  for (int bits = slots / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(0xffffffffu, value, bits);
  return value;
}

// All threads of the block fill cos_row and sin_row (dim / 2 elements each) for token n of the shard. Ends with a
// barrier.
template <class C>
__device__ __forceinline__ void load_rotation(const RopeArgs& args, int64_t n, C* cos_row, C* sin_row) {
  const RopeCursor cursor(args.segments, args.segment_count, args.token_offset + n);
  for (int p = int(threadIdx.x); p < args.dim / 2; p += int(blockDim.x)) {
    pair_rotation(args, cursor, p, cos_row[p], sin_row[p]);
  }
  __syncthreads();
}

// Elements of a pair within its head.
__device__ __forceinline__ int pair_first(const RopeArgs& args, int p) {
  return args.interleaved ? 2 * p : p;
}
__device__ __forceinline__ int pair_second(const RopeArgs& args, int p) {
  return args.interleaved ? 2 * p + 1 : p + args.dim / 2;
}

// Heads can be read in whole vectors of 16 bytes.
template <class T>
bool whole_vectors(const RopeArgs& args) {
  const int channels = kFullVector<T> * (args.interleaved ? 1 : 2);
  return args.dim % channels == 0 && aligned_rows(args.x, args.x_strides, 3, sizeof(T)) &&
         aligned_rows(args.out, args.out_strides, 3, sizeof(T));
}

}  // namespace td::cuda
