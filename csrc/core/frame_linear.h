// SPDX-License-Identifier: Apache-2.0
// Every token times the matrix of its frame, added to the residual stream. The contract is in
// talkingdit/ops/frame_linear.py.
#pragma once

#include "core/kernel.h"

namespace td {

struct FrameLinearArgs {
  const void* x;         // [B, N, K]
  const void* weight;    // [B, F, K, dim]
  const void* bias;      // [dim] or null
  const void* gate;      // [dim] or null
  const void* mask;      // [B, N] or null
  const void* residual;  // [B, N, dim] or null; may be out
  void* out;             // [B, N, dim]
  int64_t x_strides[2], weight_strides[3], residual_strides[2], out_strides[2];
  int64_t mask_stride;  // of the samples
  int64_t batch, tokens, inner, dim;
  int64_t tokens_per_frame, token_offset;
  int32_t x_vectors, weight_vectors, out_vectors;  // 16-byte pieces are aligned; out's: and the residual's
  DType dtype;                                     // of x and weight
  DType out_dtype;                                 // of residual and out: dtype or float32
};

// First frame that the shard has tokens of, and how many frames it has tokens of.
TD_HD int64_t first_frame(const FrameLinearArgs& args) {
  return args.token_offset / args.tokens_per_frame;
}
TD_HD int64_t frame_count(const FrameLinearArgs& args) {
  return (args.token_offset + args.tokens - 1) / args.tokens_per_frame - first_frame(args) + 1;
}

namespace cuda {
void frame_linear(const FrameLinearArgs& args, Stream stream);
}

}  // namespace td
