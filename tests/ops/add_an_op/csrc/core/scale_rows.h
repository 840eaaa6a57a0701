// SPDX-License-Identifier: Apache-2.0
// Rows times a number. The contract is in talkingdit/ops/scale_rows.py.
#pragma once

#include "core/kernel.h"

namespace td {

struct ScaleRowsArgs {
  const void* x;  // [rows, dim]
  void* out;
  int64_t rows, dim, x_stride, out_stride;
  double factor;
  DType dtype;
};

TD_DECLARE_KERNEL(scale_rows, const ScaleRowsArgs&)

}  // namespace td
