// SPDX-License-Identifier: Apache-2.0
#include "bind_rope.h"
#include "core/qk_norm_rope3d.h"

namespace td {
namespace {

QkNormRopeArgs qk_norm_rope_args(const char* op, const RopeArgs& rope, const TensorView& x, const TensorView& weight,
                                 bool per_head, double eps) {
  check_view(weight, 1, op, "weight");
  check_same_device(weight, x, op, "weight");
  check(weight.dtype == compute_dtype(x), op, ": weight must be in compute dtype");
  check(weight.shape[0] == (per_head ? rope.dim : rope.heads * rope.dim), op, ": weight has a wrong size");
  return QkNormRopeArgs{rope, weight.data, per_head, eps};
}

void qk_norm_rope3d_run(const TensorView& x, const TensorView& weight, const TensorView& out, const TensorView& table,
                        const TensorView& segments, const std::vector<int64_t>& pairs, bool interleaved,
                        int64_t token_offset, bool per_head, double eps) {
  const char* op = "qk_norm_rope3d";
  const RopeArgs rope = rope_args(op, x, out, table, segments, pairs, interleaved, token_offset, false);
  const QkNormRopeArgs args = qk_norm_rope_args(op, rope, x, weight, per_head, eps);
  if (x.numel() == 0) return;
  TD_CALL(qk_norm_rope3d, x, args);
}

// Rows of the workspace `partial` [chunks, weights] that qk_norm_rope3d_backward needs for x [B, N, H, D].
int64_t qk_norm_rope3d_chunks(const TensorView& x) {
  check(x.ndim == 4, "qk_norm_rope3d_chunks: x must have 4 dimensions");
  const int64_t batch = x.shape[0], tokens = x.shape[1], size = qk_norm_rope_chunk_tokens(tokens);
  if (x.is_cuda) return batch * tokens * 8 < kQkNormRopeBlocks ? batch * tokens * 8 : kQkNormRopeBlocks;
  return batch * ((tokens + size - 1) / size);
}

void qk_norm_rope3d_backward_run(const TensorView& grad, const TensorView& x, const TensorView& weight,
                                 const TensorView& grad_x, const TensorView& grad_weight, const TensorView& partial,
                                 const TensorView& table, const TensorView& segments, const std::vector<int64_t>& pairs,
                                 bool interleaved, int64_t token_offset, bool per_head, double eps) {
  const char* op = "qk_norm_rope3d_backward";
  const RopeArgs rope = rope_args(op, x, grad_x, table, segments, pairs, interleaved, token_offset, false);
  QkNormRopeGradArgs args{};
  args.forward = qk_norm_rope_args(op, rope, x, weight, per_head, eps);
  check_heads(grad, x, op, "grad");
  check_view(grad_weight, 1, op, "grad_weight");
  check_view(partial, 2, op, "partial");
  check(grad_weight.shape[0] == weight.shape[0] && grad_weight.dtype == weight.dtype, op, ": grad_weight does not fit");
  if (x.numel() == 0) return;
  args.chunk_tokens = qk_norm_rope_chunk_tokens(rope.tokens);
  args.chunks_per_sample = (rope.tokens + args.chunk_tokens - 1) / args.chunk_tokens;
  args.chunks = qk_norm_rope3d_chunks(x);
  check(partial.dtype == weight.dtype && partial.shape[0] >= args.chunks && partial.shape[1] == weight.shape[0], op,
        ": partial is too small");
  args.grad = grad.data;
  copy_strides(args.grad_strides, grad);
  args.grad_weight = grad_weight.data;
  args.partial = partial.data;
  TD_CALL(qk_norm_rope3d_backward, x, args);
}

}  // namespace

TD_BINDINGS(qk_norm_rope3d) {
  m.def("qk_norm_rope3d", &qk_norm_rope3d_run);
  m.def("qk_norm_rope3d_chunks", &qk_norm_rope3d_chunks);
  m.def("qk_norm_rope3d_backward", &qk_norm_rope3d_backward_run);
}

}  // namespace td
