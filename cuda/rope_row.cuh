// SPDX-License-Identifier: Apache-2.0
// The rotation of one token in shared memory.
#pragma once

#include "core/rope3d.h"

namespace td::cuda {

// Axis of a pair, and the first pair of that axis.
__device__ __forceinline__ int pair_axis(const RopeArgs& args, int pair, int& first) {
  const int axis = pair < args.pairs[0] ? 0 : (pair < args.pairs[0] + args.pairs[1] ? 1 : 2);
  first = axis == 0 ? 0 : (axis == 1 ? args.pairs[0] : args.pairs[0] + args.pairs[1]);
  return axis;
}

template <class C>
__device__ __forceinline__ void pair_rotation(const RopeArgs& args, const RopeCursor& cursor, int pair, C& c, C& s) {
  int first;
  const int axis = pair_axis(args, pair, first);
  const int64_t at = cursor.row(axis, args.pairs) + pair - first;
  c = static_cast<const C*>(args.cos)[at];
  s = static_cast<const C*>(args.sin)[at];
  if (args.inverse) s = -s;
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

}  // namespace td::cuda
