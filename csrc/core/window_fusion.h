// SPDX-License-Identifier: Apache-2.0
// Fusion of overlapping windows, alone or together with guidance and the sampler's update. The contract is in
// talkingdit/ops/window_fusion.py. Forward and backward gather: every result element is written once, by one thread.
#pragma once

#include "core/kernel.h"

namespace td {

constexpr int kMaxPredictions = 4;

// One frame of one window as the frame of the result that it covers sees it (CPU only, made by the binding).
struct WindowTerm {
  int64_t offset[kMaxPredictions];  // of the frame in each prediction, in elements
  double gain[kMaxPredictions];
};

// out[c, l] = x_gain(l) x[c, l] + sum over (i, j) that cover l of gain(i, j) sum_k b[i, k] prediction_k[i, c, j].
// The backward kernels read `out` as the incoming gradient and write `x` and `predictions`.
struct WindowArgs {
  void* x;                                         // [C, L, rows, cols] or null
  void* predictions[kMaxPredictions];              // [n, C, f, rows, cols]
  void* out;                                       // [C, L, rows, cols]
  int64_t x_strides[3], out_strides[3];            // c, l, row
  int64_t prediction_strides[kMaxPredictions][4];  // n, c, f, row
  int prediction_count;
  int64_t windows, channels, frames, length, rows, cols;
  const int64_t* starts;       // [n]
  const double* weights;       // [n, f]
  const double* coefficients;  // [n, 1 + K]: a, b_0, b_1 ...; null: a = 0, b_0 = 1
  DType dtype, prediction_dtype;
  // CPU only: terms of frame l are terms[term_begin[l]] to terms[term_begin[l + 1]], and what l's weights add up to.
  const WindowTerm* terms;
  const int64_t* term_begin;
  const double* totals;
  const double* x_gains;  // [L]
};

// Frame of the result under slot `slot` of a window. Starts may be negative or beyond the end: they wrap.
TD_HD int64_t window_frame(int64_t start, int64_t slot, int64_t length) {
  const int64_t frame = (start + slot) % length;
  return frame < 0 ? frame + length : frame;
}

// First slot of a window that covers `frame`; a window longer than the result comes round again every `length` slots.
TD_HD int64_t window_slot(int64_t start, int64_t frame, int64_t length) {
  const int64_t slot = (frame - start) % length;
  return slot < 0 ? slot + length : slot;
}

TD_HD double window_x_coefficient(const WindowArgs& args, int64_t window) {
  return args.coefficients ? args.coefficients[window * (1 + args.prediction_count)] : 0.0;
}

TD_HD double window_coefficient(const WindowArgs& args, int64_t window, int k) {
  return args.coefficients ? args.coefficients[window * (1 + args.prediction_count) + 1 + k] : 1.0;
}

// Share of a weight in the total of its frame; a frame that nothing covers gets nothing.
TD_HD double window_gain(double weight, double total) {
  return total != 0.0 ? weight / total : 0.0;
}

// Calls fn(type_tag<X>{}, type_tag<P>{}) for the supported pairs of latent and prediction types: the same type, or
// float32 latents with 16-bit predictions.
template <class F>
bool dispatch_window(const WindowArgs& args, F&& fn) {
  if (args.dtype == args.prediction_dtype) return dispatch_float(args.dtype, [&](auto tag) { fn(tag, tag); });
  if (args.dtype != DType::float32) return false;
  if (args.prediction_dtype == DType::bfloat16) return fn(type_tag<float>{}, type_tag<bf16>{}), true;
  if (args.prediction_dtype == DType::float16) return fn(type_tag<float>{}, type_tag<fp16>{}), true;
  return false;
}

TD_DECLARE_KERNEL(window_fusion, const WindowArgs&)
TD_DECLARE_KERNEL(window_fusion_backward, const WindowArgs&)

}  // namespace td
