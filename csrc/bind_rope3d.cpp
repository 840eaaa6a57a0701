// SPDX-License-Identifier: Apache-2.0
#include "bind_rope.h"

namespace td {
namespace {

void rope3d_run(const TensorView& x, const TensorView& out, const TensorView& table, const TensorView& segments,
                const std::vector<int64_t>& pairs, bool interleaved, int64_t token_offset, bool inverse) {
  const RopeArgs args = rope_args("rope3d", x, out, table, segments, pairs, interleaved, token_offset, inverse);
  if (x.numel() == 0) return;
  TD_CALL(rope3d, x, args);
}

}  // namespace

TD_BINDINGS(rope3d) {
  m.def("rope3d", &rope3d_run);
}

}  // namespace td
