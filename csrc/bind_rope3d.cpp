// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "core/norm_rope3d.h"

namespace td {
namespace {

void check_heads(const TensorView& view, const TensorView& x, const char* op, const char* name) {
  check_view(view, 4, op, name);
  check_same_device(view, x, op, name);
  for (int i = 0; i < 4; ++i) check(view.shape[i] == x.shape[i], op, ": ", name, " must have the shape of x");
  check(view.dtype == x.dtype, op, ": ", name, " must have the dtype of x");
}

void copy_strides(int64_t* target, const TensorView& view) {
  for (int i = 0; i < 3; ++i) target[i] = view.strides[i];
}

DType compute_dtype(const TensorView& x) {
  return x.dtype == DType::float64 ? DType::float64 : DType::float32;
}

RopeArgs rope_args(const char* op, const TensorView& x, const TensorView& out, const TensorView& table,
                   const TensorView& segments, const std::vector<int64_t>& pairs, bool interleaved,
                   int64_t token_offset, bool inverse) {
  check_view(x, 4, op, "x");
  check(x.dtype <= DType::float16, op, ": x must be floating");
  check_heads(out, x, op, "out");
  check_view(table, 2, op, "table");
  check_view(segments, 2, op, "segments");
  check_same_device(table, x, op, "table");
  check_same_device(segments, x, op, "segments");
  check(table.dtype == compute_dtype(x) && table.shape[0] == 2, op, ": table has a wrong dtype or shape");
  check(segments.dtype == DType::int64 && segments.shape[0] >= 1 && segments.shape[1] == kRopeSegmentFields, op,
        ": segments must be int64 [n, 7]");
  check(pairs.size() == 3 && 2 * (pairs[0] + pairs[1] + pairs[2]) == x.shape[3] && x.shape[3] <= 1024, op,
        ": split does not fit the head dim");
  check(x.shape[0] <= 65535, op, ": at most 65535 samples");
  check(token_offset >= 0, op, ": token_offset must not be negative");
  RopeArgs args{};
  args.x = x.data;
  args.out = out.data;
  copy_strides(args.x_strides, x);
  copy_strides(args.out_strides, out);
  args.batch = x.shape[0];
  args.tokens = x.shape[1];
  args.heads = x.shape[2];
  args.dim = int(x.shape[3]);
  for (int i = 0; i < 3; ++i) args.pairs[i] = int(pairs[size_t(i)]);
  args.cos = table.data;
  args.sin = static_cast<char*>(table.data) + table.strides[0] * item_size(table.dtype);
  args.segments = static_cast<const RopeSegment*>(segments.data);
  args.segment_count = int(segments.shape[0]);
  args.token_offset = token_offset;
  args.inverse = inverse;
  args.interleaved = interleaved;
  args.dtype = x.dtype;
  if (!x.is_cuda) {
    check(token_offset + args.tokens <= args.segments[args.segment_count - 1].end, op, ": tokens beyond the layout");
  }
  return args;
}

void rope3d_run(const TensorView& x, const TensorView& out, const TensorView& table, const TensorView& segments,
                const std::vector<int64_t>& pairs, bool interleaved, int64_t token_offset, bool inverse) {
  const RopeArgs args = rope_args("rope3d", x, out, table, segments, pairs, interleaved, token_offset, inverse);
  if (x.numel() == 0) return;
  TD_CALL(rope3d, x, args);
}

NormRopeArgs norm_rope_args(const char* op, const RopeArgs& rope, const TensorView& x, const TensorView& weight,
                            bool per_head, double eps) {
  check_view(weight, 1, op, "weight");
  check_same_device(weight, x, op, "weight");
  check(weight.dtype == compute_dtype(x), op, ": weight must be in compute dtype");
  check(weight.shape[0] == (per_head ? rope.dim : rope.heads * rope.dim), op, ": weight has a wrong size");
  return NormRopeArgs{rope, weight.data, per_head, eps};
}

void norm_rope3d_run(const TensorView& x, const TensorView& weight, const TensorView& out, const TensorView& table,
                     const TensorView& segments, const std::vector<int64_t>& pairs, bool interleaved,
                     int64_t token_offset, bool per_head, double eps) {
  const char* op = "norm_rope3d";
  const RopeArgs rope = rope_args(op, x, out, table, segments, pairs, interleaved, token_offset, false);
  const NormRopeArgs args = norm_rope_args(op, rope, x, weight, per_head, eps);
  if (x.numel() == 0) return;
  TD_CALL(norm_rope3d, x, args);
}

// Rows of the workspace `partial` [chunks, weights] that norm_rope3d_backward needs for x [B, N, H, D].
int64_t norm_rope3d_chunks(const TensorView& x) {
  check(x.ndim == 4, "norm_rope3d_chunks: x must have 4 dimensions");
  const int64_t batch = x.shape[0], tokens = x.shape[1], size = norm_rope_chunk_tokens(tokens);
  if (x.is_cuda) return batch * tokens * 8 < kNormRopeBlocks ? batch * tokens * 8 : kNormRopeBlocks;
  return batch * ((tokens + size - 1) / size);
}

void norm_rope3d_backward_run(const TensorView& grad, const TensorView& x, const TensorView& weight,
                              const TensorView& grad_x, const TensorView& grad_weight, const TensorView& partial,
                              const TensorView& table, const TensorView& segments, const std::vector<int64_t>& pairs,
                              bool interleaved, int64_t token_offset, bool per_head, double eps) {
  const char* op = "norm_rope3d_backward";
  const RopeArgs rope = rope_args(op, x, grad_x, table, segments, pairs, interleaved, token_offset, false);
  NormRopeGradArgs args{};
  args.forward = norm_rope_args(op, rope, x, weight, per_head, eps);
  check_heads(grad, x, op, "grad");
  check_view(grad_weight, 1, op, "grad_weight");
  check_view(partial, 2, op, "partial");
  check(grad_weight.shape[0] == weight.shape[0] && grad_weight.dtype == weight.dtype, op, ": grad_weight does not fit");
  if (x.numel() == 0) return;
  args.chunk_tokens = norm_rope_chunk_tokens(rope.tokens);
  args.chunks_per_sample = (rope.tokens + args.chunk_tokens - 1) / args.chunk_tokens;
  args.chunks = norm_rope3d_chunks(x);
  check(partial.dtype == weight.dtype && partial.shape[0] >= args.chunks && partial.shape[1] == weight.shape[0], op,
        ": partial is too small");
  args.grad = grad.data;
  copy_strides(args.grad_strides, grad);
  args.grad_weight = grad_weight.data;
  args.partial = partial.data;
  TD_CALL(norm_rope3d_backward, x, args);
}

}  // namespace

TD_BINDINGS(rope3d) {
  m.def("rope3d", &rope3d_run);
  m.def("norm_rope3d", &norm_rope3d_run);
  m.def("norm_rope3d_chunks", &norm_rope3d_chunks);
  m.def("norm_rope3d_backward", &norm_rope3d_backward_run);
}

}  // namespace td
