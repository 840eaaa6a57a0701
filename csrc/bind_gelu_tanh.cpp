// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "core/gelu_tanh.h"

namespace td {
namespace {

#if !defined(TD_EMULATE)  // there are no CUDA kernels to emulate
void gelu_tanh_run(const TensorView& x, const std::optional<TensorView>& grad, const TensorView& out) {
  const char* op = "gelu_tanh";
  for (const TensorView* view : {&x, grad ? &*grad : &x, &out}) {
    check_view(*view, 2, op, "a tensor");
    check(!view->is_cuda, op, ": tensors must be on the CPU");
    check(view->dtype == x.dtype && view->shape[0] == x.shape[0] && view->shape[1] == x.shape[1], op,
          ": tensors must have one dtype and shape");
  }
  check(x.dtype <= DType::float16 && x.dtype != DType::float64, op, ": x must be float32, bfloat16 or float16");
  if (x.numel() == 0) return;
  const GeluTanhArgs args{x.data,       grad ? grad->data : nullptr,         out.data,       x.shape[0], x.shape[1],
                          x.strides[0], grad ? grad->strides[0] : int64_t{}, out.strides[0], x.dtype};
  TD_CALL_CPU(gelu_tanh, args);
}
#endif

}  // namespace

TD_BINDINGS(gelu_tanh) {
#if !defined(TD_EMULATE)
  m.def("gelu_tanh", &gelu_tanh_run);
#else
  (void)m;
#endif
}

}  // namespace td
