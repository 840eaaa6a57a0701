// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "core/frame_linear.h"

namespace td {
namespace {

constexpr const char* kOp = "frame_linear";

bool aligned(const TensorView& view) {
  bool yes = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int i = 0; i + 1 < view.ndim; ++i) yes = yes && view.strides[i] * item_size(view.dtype) % 16 == 0;
  return yes;
}

// bias, gate [dim] and mask [B, N] are of the type that is computed in.
void frame_linear(const TensorView& x, const TensorView& weight, const std::optional<TensorView>& bias,
                  const std::optional<TensorView>& gate, const std::optional<TensorView>& mask,
                  const std::optional<TensorView>& residual, const TensorView& out, int64_t tokens_per_frame,
                  int64_t token_offset) {
  check_view(x, 3, kOp, "x");
  check_view(weight, 4, kOp, "weight");
  check_view(out, 3, kOp, "out");
  check(x.is_cuda, kOp, ": x must be on a GPU");
  const DType sums = x.dtype == DType::float64 ? DType::float64 : DType::float32;
  FrameLinearArgs args{};
  args.batch = x.shape[0];
  args.tokens = x.shape[1];
  args.inner = x.shape[2];
  args.dim = weight.shape[3];
  args.tokens_per_frame = tokens_per_frame;
  args.token_offset = token_offset;
  check(weight.dtype == x.dtype && weight.shape[0] == args.batch && weight.shape[2] == args.inner, kOp,
        ": weight must be [B, F, K, dim] in the dtype of x");
  check(tokens_per_frame > 0 && token_offset >= 0 && args.inner < (int64_t(1) << 31), kOp, ": a size is out of range");
  check(out.shape[0] == args.batch && out.shape[1] == args.tokens && out.shape[2] == args.dim, kOp,
        ": out must be [B, N, dim]");
  check(out.dtype == x.dtype || out.dtype == sums, kOp, ": out must have the dtype of x or float32");
  check_same_device(x, weight, kOp, "weight");
  check_same_device(x, out, kOp, "out");
  const auto channels = [&](const std::optional<TensorView>& view, const char* name) -> const void* {
    if (!view) return nullptr;
    check_view(*view, 1, kOp, name);
    check(view->dtype == sums && view->shape[0] == args.dim, kOp, ": ", name, " must be [dim], float32");
    check_same_device(x, *view, kOp, name);
    return view->data;
  };
  args.bias = channels(bias, "bias");
  args.gate = channels(gate, "gate");
  if (mask) {
    check_view(*mask, 2, kOp, "mask");
    check(mask->dtype == sums && mask->shape[0] == args.batch && mask->shape[1] == args.tokens, kOp,
          ": mask must be [B, N], float32");
    check_same_device(x, *mask, kOp, "mask");
    args.mask = mask->data;
    args.mask_stride = mask->strides[0];
  }
  args.out_vectors = aligned(out);
  if (residual) {
    check_view(*residual, 3, kOp, "residual");
    check(residual->dtype == out.dtype && residual->shape[0] == args.batch && residual->shape[1] == args.tokens &&
              residual->shape[2] == args.dim,
          kOp, ": residual must be like out");
    check_same_device(x, *residual, kOp, "residual");
    args.residual = residual->data;
    args.out_vectors = args.out_vectors && aligned(*residual);
    for (int i = 0; i < 2; ++i) args.residual_strides[i] = residual->strides[i];
  }
  if (out.numel() == 0) return;
  check(first_frame(args) + frame_count(args) <= weight.shape[1], kOp, ": weight has fewer frames than x");
  args.x = x.data;
  args.weight = weight.data;
  args.out = out.data;
  for (int i = 0; i < 2; ++i) args.x_strides[i] = x.strides[i];
  for (int i = 0; i < 3; ++i) args.weight_strides[i] = weight.strides[i];
  for (int i = 0; i < 2; ++i) args.out_strides[i] = out.strides[i];
  args.x_vectors = aligned(x);
  args.weight_vectors = aligned(weight);
  args.dtype = x.dtype;
  args.out_dtype = out.dtype;
  TD_CALL_CUDA(frame_linear, x, args);
}

}  // namespace

TD_BINDINGS(frame_linear) {
  m.def("frame_linear", &frame_linear);
}

}  // namespace td
