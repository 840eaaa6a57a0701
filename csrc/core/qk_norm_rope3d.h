// SPDX-License-Identifier: Apache-2.0
// RMSNorm and rotation in one pass over memory. The contract is qk_norm_rope3d in talkingdit/ops/qk_norm_rope3d.py.
#pragma once

#include "core/rope3d.h"

namespace td {

// out = rotate(x * r * weight), r = 1 / sqrt(mean(x^2) + eps) over the heads of a token together, or over each head.
struct QkNormRopeArgs {
  RopeArgs rope;       // x, out and the rotation
  const void* weight;  // [heads * dim] or, per head, [dim], in the compute dtype
  bool per_head;
  double eps;
};

// Backward: rope.x is the forward input, rope.out gets its gradient. Sums of the weight's gradient go through `partial`
// [chunks, width] (width = elements of the weight): on the CPU one row per chunk of `chunk_tokens` tokens of one
// sample, on CUDA at most so many rows, one per block or warp.
struct QkNormRopeGradArgs {
  QkNormRopeArgs forward;
  const void* grad;
  int64_t grad_strides[3];
  void* grad_weight;
  void* partial;
  int64_t chunk_tokens, chunks_per_sample, chunks;
};

inline int64_t qk_norm_rope_chunk_tokens(int64_t tokens) {
  const int64_t wanted = (tokens + 63) / 64;
  return wanted < 32 ? 32 : wanted;
}

constexpr int64_t kQkNormRopeBlocks = 1024;  // more than run at a time on any device

TD_DECLARE_KERNEL(qk_norm_rope3d, const QkNormRopeArgs&)
TD_DECLARE_KERNEL(qk_norm_rope3d_backward, const QkNormRopeGradArgs&)

}  // namespace td
