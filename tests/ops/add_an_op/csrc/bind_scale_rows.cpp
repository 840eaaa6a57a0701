// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "core/scale_rows.h"

namespace td {
namespace {

void run(const TensorView& x, const TensorView& out, double factor) {
  const char* op = "scale_rows";
  check_view(x, 2, op, "x");
  check_view(out, 2, op, "out");
  check_same_device(out, x, op, "out");
  check(x.dtype <= DType::float16 && out.dtype == x.dtype, op, ": x and out must be floating, of one dtype");
  check(out.shape[0] == x.shape[0] && out.shape[1] == x.shape[1], op, ": out must have the shape of x");
  if (x.numel() == 0) return;
  const ScaleRowsArgs args{x.data, out.data, x.shape[0], x.shape[1], x.strides[0], out.strides[0], factor, x.dtype};
  TD_CALL(scale_rows, x, args);
}

}  // namespace

TD_BINDINGS(scale_rows) {
  m.def("scale_rows", &run);
}

}  // namespace td
