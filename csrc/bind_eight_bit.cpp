// SPDX-License-Identifier: Apache-2.0
#include "bind_eight_bit.h"

namespace td {
namespace {

void quantise_rows_run(const TensorView& x, const TensorView& codes, const TensorView& scales, const std::string& kind,
                       bool gelu, bool exact) {
  const char* op = "quantise_rows";
  check_view(x, 2, op, "x");
  check(x.dtype <= DType::float16 && x.dtype != DType::float64, op, ": x must be float32, bfloat16 or float16");
  check(x.shape[1] <= kMaxEightBitDim, op, ": dim must be at most ", kMaxEightBitDim);
  const CodeRows rows = code_rows(op, x, codes, scales, kind, exact);
  check(codes.shape[0] == 1 && codes.shape[1] == x.shape[0] && codes.shape[2] == x.shape[1], op,
        ": codes must be [1, rows, dim]");
  if (x.numel() == 0) return;
  const QuantiseRowsArgs args{x.data, x.shape[0], x.shape[1], x.strides[0], rows, x.dtype, gelu};
  TD_CALL(quantise_rows, x, args);
}

const float* column(const char* op, const TensorView& sums, const TensorView& view, const char* name, int64_t size) {
  check_view(view, 1, op, name);
  check_same_device(view, sums, op, name);
  check(view.dtype == DType::float32 && view.shape[0] == size, op, ": ", name, " must be float32 [", size, "]");
  return static_cast<const float*>(view.data);
}

void rescale_run(const TensorView& sums, const TensorView& row_scale, const TensorView& column_scale,
                 const std::optional<TensorView>& bias, const TensorView& out) {
  const char* op = "rescale";
  check_view(sums, 2, op, "sums");
  check_view(out, 2, op, "out");
  check_same_device(out, sums, op, "out");
  const int64_t rows = sums.shape[0], columns = sums.shape[1];
  check(sums.dtype == DType::int32 && out.dtype <= DType::float16 && out.dtype != DType::float64, op,
        ": sums must be int32, out float32, bfloat16 or float16");
  check(out.shape[0] == rows && out.shape[1] == columns, op, ": out must have the shape of sums");
  check((rows <= 1 || (sums.strides[0] == columns && out.strides[0] == columns)) && columns <= INT32_MAX, op,
        ": sums and out must be contiguous");
  RescaleArgs args{};
  args.sums = static_cast<const int32_t*>(sums.data);
  args.row_scale = column(op, sums, row_scale, "row_scale", rows);
  args.column_scale = column(op, sums, column_scale, "column_scale", columns);
  args.bias = bias ? column(op, sums, *bias, "bias", columns) : nullptr;
  args.out = out.data;
  args.rows = rows;
  args.columns = columns;
  args.dtype = out.dtype;
  if (sums.numel() == 0) return;
  TD_CALL(rescale, sums, args);
}

}  // namespace

TD_BINDINGS(eight_bit) {
  m.def("quantise_rows", &quantise_rows_run);
  m.def("rescale", &rescale_run);
}

}  // namespace td
