// SPDX-License-Identifier: Apache-2.0
// What the bindings of rope3d and qk_norm_rope3d share: checks of a rotation's arguments.
#pragma once

#include "bind.h"
#include "core/rope3d.h"

namespace td {

inline void check_heads(const TensorView& view, const TensorView& x, const char* op, const char* name) {
  check_view(view, 4, op, name);
  check_same_device(view, x, op, name);
  for (int i = 0; i < 4; ++i) check(view.shape[i] == x.shape[i], op, ": ", name, " must have the shape of x");
  check(view.dtype == x.dtype, op, ": ", name, " must have the dtype of x");
}

inline void copy_strides(int64_t* target, const TensorView& view) {
  for (int i = 0; i < 3; ++i) target[i] = view.strides[i];
}

inline DType compute_dtype(const TensorView& x) {
  return x.dtype == DType::float64 ? DType::float64 : DType::float32;
}

inline RopeArgs rope_args(const char* op, const TensorView& x, const TensorView& out, const TensorView& table,
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

}  // namespace td
