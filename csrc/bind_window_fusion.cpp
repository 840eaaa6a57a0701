// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "bind.h"
#include "core/window_fusion.h"

namespace td {
namespace {

// What the CPU kernels want to know about every frame of the result. On CUDA the blocks work it out themselves, because
// the tables are in device memory.
struct Plan {
  std::vector<double> totals, x_gains;
  std::vector<int64_t> term_begin;
  std::vector<WindowTerm> terms;

  Plan(const char* op, WindowArgs& args) : totals(size_t(args.length)), x_gains(size_t(args.length)) {
    const auto for_each = [&](auto&& fn) {
      for (int64_t i = 0; i < args.windows; ++i) {
        for (int64_t j = 0; j < args.frames; ++j) {
          const double weight = args.weights[i * args.frames + j];
          if (weight != 0.0) fn(i, j, size_t(window_frame(args.starts[i], j, args.length)), weight);
        }
      }
    };
    term_begin.assign(size_t(args.length) + 1, 0);
    for_each([&](int64_t, int64_t, size_t l, double weight) {
      totals[l] += weight;
      ++term_begin[l + 1];
    });
    for (size_t l = 0; l < totals.size(); ++l) {
      check(totals[l] != 0.0 && totals[l] - totals[l] == 0.0, op, ": weights of every frame must have a finite total ",
            "other than 0, got ", totals[l], " for frame ", l, " of ", args.length);
      term_begin[l + 1] += term_begin[l];
    }
    terms.resize(size_t(term_begin.back()));
    std::vector<int64_t> next(term_begin.begin(), term_begin.end() - 1);
    for_each([&](int64_t i, int64_t j, size_t l, double weight) {
      const double gain = window_gain(weight, totals[l]);
      x_gains[l] += gain * window_x_coefficient(args, i);
      WindowTerm& term = terms[size_t(next[l]++)];
      for (int k = 0; k < args.prediction_count; ++k) {
        term.offset[k] = i * args.prediction_strides[k][0] + j * args.prediction_strides[k][2];
        term.gain[k] = gain * window_coefficient(args, i, k);
      }
    });
    args.totals = totals.data();
    args.x_gains = x_gains.data();
    args.term_begin = term_begin.data();
    args.terms = terms.data();
  }
};

// Planes [H, W] are walked as one row where every tensor allows it. Then there is no step from row to row, and none to
// look at when kernels ask whether rows are aligned.
void set_planes(WindowArgs& args, int64_t height, int64_t width, bool one_row) {
  args.rows = one_row ? 1 : height;
  args.cols = one_row ? height * width : width;
  if (!one_row) return;
  args.x_strides[2] = args.out_strides[2] = 0;
  for (int64_t (&strides)[4] : args.prediction_strides) strides[3] = 0;
}

bool packed_plane(const TensorView& view) {
  const int64_t* shape = view.shape + view.ndim - 2;
  return shape[0] <= 1 || view.strides[view.ndim - 2] == shape[1];
}

void check_result(const TensorView& view, const TensorView& out, const char* op, const char* name) {
  check_view(view, 4, op, name);
  check_same_device(view, out, op, name);
  for (int d = 0; d < 4; ++d) check(view.shape[d] == out.shape[d], op, ": ", name, " has a wrong shape");
  check(view.dtype == out.dtype, op, ": ", name, " has a wrong dtype");
}

// x may be missing (no latents, or no gradient for them); so may predictions in the backward.
WindowArgs make_args(const char* op, const TensorView& out, const std::optional<TensorView>& x,
                     const std::vector<TensorView>& predictions, const std::optional<TensorView>& coefficients,
                     int64_t prediction_count, const TensorView& starts, const TensorView& weights) {
  WindowArgs args{};
  check_view(out, 4, op, "out");
  check_view(starts, 1, op, "starts");
  check_view(weights, 2, op, "weights");
  check_same_device(starts, out, op, "starts");
  check_same_device(weights, out, op, "weights");
  check(starts.dtype == DType::int64 && (starts.shape[0] <= 1 || starts.strides[0] == 1), op,
        ": starts must be contiguous int64");
  check(weights.dtype == DType::float64 && (weights.shape[0] <= 1 || weights.strides[0] == weights.shape[1]), op,
        ": weights must be contiguous float64");
  check(weights.shape[0] == starts.shape[0], op, ": weights must have one row per window");
  check(prediction_count >= 1 && prediction_count <= kMaxPredictions, op, ": one to four predictions");
  // CUDA kernels count the elements of a plane in 32 bits and have grids over frames and windows.
  check(out.shape[2] * out.shape[3] < (int64_t(1) << 31), op, ": H * W must be below 2^31");
  for (const int64_t size : {out.shape[1], weights.shape[0], weights.shape[1]}) {
    check(!out.is_cuda || size < 65536, op, ": frames and windows must be below 65536 on CUDA");
  }
  args.channels = out.shape[0];
  args.length = out.shape[1];
  args.windows = starts.shape[0];
  args.frames = weights.shape[1];
  args.prediction_count = int(prediction_count);
  args.starts = static_cast<const int64_t*>(starts.data);
  args.weights = static_cast<const double*>(weights.data);
  if (coefficients) {
    check_view(*coefficients, 2, op, "coefficients");
    check_same_device(*coefficients, out, op, "coefficients");
    check(coefficients->dtype == DType::float64 && coefficients->shape[0] == args.windows &&
              coefficients->shape[1] == 1 + prediction_count &&
              (args.windows <= 1 || coefficients->strides[0] == coefficients->shape[1]),
          op, ": coefficients must be contiguous float64 [n, 1 + K]");
    args.coefficients = static_cast<const double*>(coefficients->data);
  }
  bool one_row = packed_plane(out);
  args.out = out.data;
  args.dtype = args.prediction_dtype = out.dtype;
  std::copy(out.strides, out.strides + 3, args.out_strides);
  if (x) {
    check_result(*x, out, op, "x_t");
    one_row = one_row && packed_plane(*x);
    args.x = x->data;
    std::copy(x->strides, x->strides + 3, args.x_strides);
  }
  for (size_t k = 0; k < predictions.size(); ++k) {
    const TensorView& p = predictions[k];
    check(predictions.size() == size_t(prediction_count), op, ": number of predictions");
    check_view(p, 5, op, "a prediction");
    check_same_device(p, out, op, "a prediction");
    const int64_t shape[5] = {args.windows, args.channels, args.frames, out.shape[2], out.shape[3]};
    for (int d = 0; d < 5; ++d) check(p.shape[d] == shape[d], op, ": a prediction has a wrong shape");
    check(p.dtype == predictions[0].dtype, op, ": predictions must have one dtype");
    one_row = one_row && packed_plane(p);
    args.predictions[k] = p.data;
    std::copy(p.strides, p.strides + 4, args.prediction_strides[k]);
    args.prediction_dtype = p.dtype;
  }
  check(args.dtype == args.prediction_dtype ||
            (args.dtype == DType::float32 &&
             (args.prediction_dtype == DType::bfloat16 || args.prediction_dtype == DType::float16)),
        op, ": predictions must have the dtype of the latents, or 16 bits with float32 latents");
  set_planes(args, out.shape[2], out.shape[3], one_row);
  return args;
}

void window_fusion_run(const TensorView& out, const std::optional<TensorView>& x,
                       const std::vector<TensorView>& predictions, const std::optional<TensorView>& coefficients,
                       const TensorView& starts, const TensorView& weights) {
  const char* op = coefficients ? "fused_window_step" : "window_fusion";
  WindowArgs args = make_args(op, out, x, predictions, coefficients, int64_t(predictions.size()), starts, weights);
  if (out.numel() == 0) return;
  if (out.is_cuda) {
    TD_CALL_CUDA(window_fusion, out, args);
    return;
  }
  const Plan plan(op, args);
  TD_CALL_CPU(window_fusion, args);
}

void window_fusion_backward_run(const TensorView& grad, const std::optional<TensorView>& grad_x,
                                const std::vector<TensorView>& grad_predictions,
                                const std::optional<TensorView>& coefficients, const TensorView& starts,
                                const TensorView& weights) {
  const char* op = coefficients ? "fused_window_step_backward" : "window_fusion_backward";
  const int64_t count = coefficients ? coefficients->shape[1] - 1 : 1;
  WindowArgs args = make_args(op, grad, grad_x, grad_predictions, coefficients, count, starts, weights);
  if (grad.numel() == 0) return;
  if (grad.is_cuda) {
    TD_CALL_CUDA(window_fusion_backward, grad, args);
    return;
  }
  const Plan plan(op, args);
  TD_CALL_CPU(window_fusion_backward, args);
}

}  // namespace

TD_BINDINGS(window_fusion) {
  m.def("window_fusion", &window_fusion_run);
  m.def("window_fusion_backward", &window_fusion_backward_run);
}

}  // namespace td
