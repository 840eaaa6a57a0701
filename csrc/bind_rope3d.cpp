// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "core/rope3d.h"

namespace td {
namespace {

void rope3d_run(const TensorView& x, const TensorView& out, const TensorView& table, const TensorView& segments,
                int64_t pairs_t, int64_t pairs_h, int64_t pairs_w, bool interleaved, int64_t token_offset,
                bool inverse) {
  const char* op = "rope3d";
  check_view(x, 4, op, "x");
  check_view(out, 4, op, "out");
  check_view(table, 2, op, "table");
  check_view(segments, 2, op, "segments");
  for (const TensorView* other : {&out, &table, &segments}) check_same_device(x, *other, op, "an argument");
  for (int i = 0; i < 4; ++i) check(x.shape[i] == out.shape[i], op, ": out must have the shape of x");
  check(x.dtype == out.dtype, op, ": out must have the dtype of x");
  check(table.dtype == (x.dtype == DType::float64 ? DType::float64 : DType::float32), op, ": table has a wrong dtype");
  check(segments.dtype == DType::int64 && segments.shape[1] == kRopeSegmentFields, op,
        ": segments must be int64 [n, 7]");
  check(2 * (pairs_t + pairs_h + pairs_w) == x.shape[3] && x.shape[3] <= 1024, op, ": split does not fit the head dim");
  if (x.numel() == 0) return;
  RopeArgs args{};
  args.x = x.data;
  args.out = out.data;
  for (int i = 0; i < 3; ++i) {
    args.x_strides[i] = x.strides[i];
    args.out_strides[i] = out.strides[i];
  }
  args.batch = x.shape[0];
  args.tokens = x.shape[1];
  args.heads = x.shape[2];
  args.dim = int(x.shape[3]);
  args.pairs[0] = int(pairs_t);
  args.pairs[1] = int(pairs_h);
  args.pairs[2] = int(pairs_w);
  args.cos = table.data;
  args.sin = static_cast<char*>(table.data) + table.strides[0] * (table.dtype == DType::float64 ? 8 : 4);
  args.segments = static_cast<const RopeSegment*>(segments.data);
  args.segment_count = int(segments.shape[0]);
  args.token_offset = token_offset;
  args.inverse = inverse;
  args.interleaved = interleaved;
  args.dtype = x.dtype;
  TD_CALL(rope3d, x, args);
}

}  // namespace

TD_BINDINGS(rope3d) {
  m.def("rope3d", &rope3d_run);
}

}  // namespace td
