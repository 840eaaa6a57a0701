// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "core/sm90_product.h"

namespace td {
namespace {

constexpr const char* kOp = "sm90_product";
constexpr int64_t kMost = int64_t(1) << 31;  // CUTLASS counts rows and columns in 32 bits

// A matrix of the batch, [batch, rows, columns] with columns contiguous: what TMA can move. Axes of one element have no
// stride to speak of.
void take(const TensorView& view, const char* name, int64_t (&strides)[2]) {
  check_view(view, 3, kOp, name);
  const int64_t item = item_size(view.dtype);
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int i = 0; i < 2; ++i) {
    strides[i] = view.shape[i] > 1 ? view.strides[i] : (view.shape[2] * item + 15) / 16 * 16 / item;
    aligned = aligned && strides[i] > 0 && strides[i] * item % 16 == 0;
    check(view.shape[i] < kMost && strides[i] * item < (int64_t(1) << 40), kOp, ": ", name, " is too large");
  }
  check(view.shape[2] < kMost, kOp, ": ", name, " is too large");
  check(aligned, kOp, ": rows of ", name, " must be aligned to 16 bytes and not be repeated");
}

const void* channels(const std::optional<TensorView>& view, const TensorView& a, DType dtype, int64_t columns,
                     const char* name) {
  if (!view) return nullptr;
  check_view(*view, 1, kOp, name);
  check(view->dtype == dtype && view->shape[0] == columns, kOp, ": ", name,
        " must be [columns], float32, or like a where b is transposed");
  check_same_device(a, *view, kOp, name);
  return view->data;
}

// result = residual + mask * gate * (a b + bias), batched: csrc/core/sm90_product.h.
void product(const TensorView& a, const TensorView& b, const std::optional<TensorView>& bias,
             const std::optional<TensorView>& gate, const std::optional<TensorView>& mask,
             const std::optional<TensorView>& residual, const TensorView& result, bool b_transposed) {
  Sm90ProductArgs args{};
  take(a, "a", args.a_strides);
  take(b, "b", args.b_strides);
  take(result, "result", args.result_strides);
  check(a.is_cuda, kOp, ": a must be on a GPU");
  check_same_device(a, b, kOp, "b");
  check_same_device(a, result, kOp, "result");
  args.batch = result.shape[0];
  args.rows = result.shape[1];
  args.columns = result.shape[2];
  args.inner = a.shape[2];
  args.b_transposed = b_transposed;
  check(a.dtype == DType::bfloat16 && b.dtype == DType::bfloat16, kOp, ": a and b must be bfloat16");
  check(a.shape[0] == args.batch && a.shape[1] == args.rows, kOp, ": a must be [batch, rows, inner]");
  check(b.shape[0] == args.batch && b.shape[b_transposed ? 1 : 2] == args.columns &&
            b.shape[b_transposed ? 2 : 1] == args.inner,
        kOp, ": b must be [batch, ", b_transposed ? "columns, inner]" : "inner, columns]");
  check(result.dtype == DType::bfloat16 || (result.dtype == DType::float32 && !b_transposed), kOp,
        ": result must be bfloat16, or float32 where b is not transposed");
  check(!b_transposed || !(gate || mask || residual), kOp, ": a transposed b goes with a bias alone");
  args.bias = channels(bias, a, b_transposed ? a.dtype : DType::float32, args.columns, "bias");
  args.gate = static_cast<const float*>(channels(gate, a, DType::float32, args.columns, "gate"));
  if (mask) {
    check_view(*mask, 2, kOp, "mask");
    check(mask->dtype == DType::float32 && mask->shape[0] == args.batch && mask->shape[1] == args.rows, kOp,
          ": mask must be [batch, rows], float32");
    check_same_device(a, *mask, kOp, "mask");
    args.mask = static_cast<const float*>(mask->data);
    args.mask_stride = mask->strides[0];
  }
  if (residual) {
    take(*residual, "residual", args.residual_strides);
    check(residual->dtype == result.dtype && residual->shape[0] == args.batch && residual->shape[1] == args.rows &&
              residual->shape[2] == args.columns,
          kOp, ": residual must be like the result");
    check_same_device(a, *residual, kOp, "residual");
    args.residual = residual->data;
  }
  if (result.numel() == 0) return;
  check(args.inner > 0, kOp, ": there must be something to sum");
  args.a = a.data;
  args.b = b.data;
  args.result = result.data;
  args.dtype = a.dtype;
  args.result_dtype = result.dtype;
#if defined(TD_CUTLASS)
  TD_CALL_CUDA(sm90_product, a, args);
#else
  throw std::runtime_error("sm90_product: this build has no kernels for compute capability 9.0");
#endif
}

}  // namespace

TD_BINDINGS(sm90_product) {
  m.def("sm90_product", &product);
}

}  // namespace td
