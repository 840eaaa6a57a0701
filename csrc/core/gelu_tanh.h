// SPDX-License-Identifier: Apache-2.0
// GELU in the form with tanh, and its gradient, on CPUs; the contract is in talkingdit/ops/gelu_tanh.py.
#pragma once

#include "core/kernel.h"

namespace td {

// out = gelu(x), or, where grad is given, grad * gelu'(x); rows [rows, dim]. out may be x or grad.
struct GeluTanhArgs {
  const void *x, *grad;
  void* out;
  int64_t rows, dim, x_stride, grad_stride, out_stride;
  DType dtype;  // float32, bfloat16 or float16
};

TD_DECLARE_KERNEL(gelu_tanh, const GeluTanhArgs&)

}  // namespace td
