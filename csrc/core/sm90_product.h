// SPDX-License-Identifier: Apache-2.0
// Batched matrix products with an epilogue for Hopper (compute capability 9.0), made by CUTLASS: what frame_linear and
// framepack call with kernel="cutlass". Who may call it, and with what, is in talkingdit/ops/_sm90.py.
#pragma once

#include "core/kernel.h"

namespace td {

// result[l] = residual[l] + mask[l] * gate * (a[l] b[l] + bias), l < batch. Addresses and strides of a, b, residual and
// result are multiples of 16 bytes (axes of one element aside); sizes are free.
struct Sm90ProductArgs {
  const void* a;         // [batch, rows, inner]
  const void* b;         // [batch, inner, columns], or [batch, columns, inner] where `b_transposed`
  const void* bias;      // [columns] or null: float32, or the type of a where b is transposed
  const float* gate;     // [columns] or null; this and the next two only where b is not transposed
  const float* mask;     // [batch, rows] or null, its rows contiguous
  const void* residual;  // [batch, rows, columns] or null; may be the result
  void* result;          // [batch, rows, columns]
  int64_t a_strides[2], b_strides[2], residual_strides[2], result_strides[2];  // of the first two axes, in elements
  int64_t mask_stride;                                                         // of the batch
  int64_t batch, rows, columns, inner;
  bool b_transposed;
  DType dtype;         // of a and b
  DType result_dtype;  // of residual and result
};

namespace cuda {
// Throws std::runtime_error, in one sentence, for what it has no kernel for and for what CUDA refuses.
void sm90_product(const Sm90ProductArgs& args, Stream stream);
}  // namespace cuda

}  // namespace td
