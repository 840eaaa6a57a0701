// SPDX-License-Identifier: Apache-2.0
#include "bind_eight_bit.h"
#include "core/modulate.h"

namespace td {
namespace {

using Optional = std::optional<TensorView>;

struct Shape {
  const char* op;
  int64_t batch, tokens, dim, groups;
  bool wide;
  const TensorView& first;

  // Whether there is a tensor at all; one that is there must be [batch, count, dim].
  bool has(const Optional& view, const char* name, int64_t count) const {
    if (!view) return false;
    check_view(*view, 3, op, name);
    check_same_device(*view, first, op, name);
    check(view->shape[0] == batch && view->shape[1] == count && view->shape[2] == dim, op, ": ", name,
          " has a wrong shape");
    return true;
  }
  Rows rows(const Optional& view, const char* name) const {
    if (!has(view, name, tokens)) return Rows{};
    check((view->dtype == DType::float64) == wide, op, ": ", name, " mixes float64 with other dtypes");
    check(view->dtype <= DType::float16, op, ": ", name, " must be floating");
    return Rows{view->data, view->strides[0], view->strides[1], view->dtype};
  }
  GroupRows modulation(const Optional& view, const char* name) const {
    if (!has(view, name, groups)) return GroupRows{};
    check(view->dtype == (wide ? DType::float64 : DType::float32), op, ": ", name, " must be in compute dtype");
    return GroupRows{view->data, view->strides[0], view->strides[1]};
  }
  void* sums(const Optional& view, const char* name) const { return const_cast<void*>(modulation(view, name).data); }
};

TokenGroups token_groups(const Shape& shape, int64_t per_group, const std::vector<int64_t>& ends,
                         int64_t token_offset) {
  TokenGroups groups{};
  groups.per_group = per_group;
  groups.count = shape.groups;
  check(per_group > 0 || (!ends.empty() && ends.size() <= size_t(kMaxRanges)), shape.op, ": wrong groups");
  int64_t last = per_group > 0 ? per_group * shape.groups : ends.back();
  check(per_group > 0 || int64_t(ends.size()) == shape.groups, shape.op, ": groups do not fit the modulation");
  check(token_offset >= 0 && token_offset + shape.tokens <= last, shape.op, ": tokens beyond the last group");
  for (size_t i = 0; i < ends.size(); ++i) {
    check(ends[i] >= (i > 0 ? ends[i - 1] : 0), shape.op, ": group ends must not decrease");
    groups.ends[i] = ends[i];
  }
  return groups;
}

Shape shape_of(const char* op, const TensorView& x, int64_t groups) {
  check(x.ndim == 3, op, ": x must have 3 dimensions");
  check(x.shape[2] >= 1 && x.shape[2] <= kMaxModulatedDim, op, ": dim must be 1 to ", kMaxModulatedDim);
  return Shape{op, x.shape[0], x.shape[1], x.shape[2], groups, x.dtype == DType::float64, x};
}

// What forward and backward are told alike.
template <class Args>
Args args_of(const Shape& shape, const Optional& y, const Optional& residual, const Optional& gate,
             const Optional& scale, int64_t per_group, const std::vector<int64_t>& ends, int64_t token_offset,
             double eps) {
  Args args{};
  args.batch = shape.batch;
  args.tokens = shape.tokens;
  args.token_offset = token_offset;
  args.dim = int(shape.dim);
  args.eps = eps;
  args.groups = token_groups(shape, per_group, ends, token_offset);
  args.y = shape.rows(y, "y");
  args.residual = shape.rows(residual, "residual");
  args.gate = shape.modulation(gate, "gate");
  args.scale = shape.modulation(scale, "scale");
  return args;
}

void modulate_forward_run(const TensorView& x, const Optional& y, const Optional& gate, const Optional& scale,
                          const Optional& shift, const Optional& residual, const Optional& out, int64_t per_group,
                          const std::vector<int64_t>& ends, int64_t token_offset, double eps) {
  const char* op = "modulate_forward";
  check(bool(y) == bool(gate) && (!residual || y) && bool(out) == bool(scale) && bool(out) == bool(shift) &&
            (residual || out),
        op, ": arguments do not go together");
  const Shape shape = shape_of(op, x, (gate ? *gate : *scale).shape[1]);
  auto args = args_of<ModulateArgs>(shape, y, residual, gate, scale, per_group, ends, token_offset, eps);
  args.x = shape.rows(x, "x");
  args.out = shape.rows(out, "out");
  args.shift = shape.modulation(shift, "shift");
  if (x.numel() == 0) return;
  TD_CALL(modulate_forward, x, args);
}

DType layer_dtype(const char* op, const std::string& name) {
  check(name == "float32" || name == "bfloat16" || name == "float16", op, ": dtype must not be ", name);
  return name == "float32" ? DType::float32 : name == "bfloat16" ? DType::bfloat16 : DType::float16;
}

// The norm in eight bits, of what layers of `dtype` would be given.
void modulate_eight_bit_run(const TensorView& x, const Optional& y, const Optional& gate, const TensorView& scale,
                            const TensorView& shift, const Optional& residual, const TensorView& codes,
                            const TensorView& scales, const std::string& kind, bool exact, const std::string& dtype,
                            int64_t per_group, const std::vector<int64_t>& ends, int64_t token_offset, double eps) {
  const char* op = "modulate_eight_bit";
  check(bool(y) == bool(gate) && bool(residual) == bool(y), op, ": arguments do not go together");
  const Shape shape = shape_of(op, x, scale.shape[1]);
  check(!shape.wide, op, ": x must not be float64");
  auto args = args_of<ModulateArgs>(shape, y, residual, gate, scale, per_group, ends, token_offset, eps);
  args.x = shape.rows(x, "x");
  args.shift = shape.modulation(shift, "shift");
  shape.has(codes, "codes", shape.tokens);
  args.codes = code_rows(op, x, codes, scales, kind, exact);
  args.out.dtype = layer_dtype(op, dtype);
  if (x.numel() == 0) return;
  TD_CALL(modulate_forward, x, args);
}

// Rows of the workspace `partial` [B, rows, 3, dim] that modulate_backward needs for x [B, N, dim]. CPU kernels use
// that many for every sample, those of a GPU share all of them.
int64_t rows_per_sample(const TensorView& x, const TokenChunks& chunks) {
  return on_gpu(x) ? (modulate_share_rows(chunks, x.shape[0]) + x.shape[0] - 1) / x.shape[0] : chunks.count;
}

int64_t modulate_chunks(const TensorView& x, int64_t groups, int64_t per_group, const std::vector<int64_t>& ends,
                        int64_t token_offset) {
  const Shape shape = shape_of("modulate_chunks", x, groups);
  const TokenGroups cut = token_groups(shape, per_group, ends, token_offset);
  if (x.shape[0] * x.shape[1] == 0) return 0;
  return rows_per_sample(x, make_chunks(cut, token_offset, x.shape[1], kCpuPieces));
}

void modulate_backward_run(const Optional& residual, const Optional& y, const Optional& gate, const Optional& scale,
                           const Optional& grad_residual, const Optional& grad_out, const Optional& grad_x,
                           const Optional& grad_y, const Optional& grad_gate, const Optional& grad_scale,
                           const Optional& grad_shift, const TensorView& partial, int64_t per_group,
                           const std::vector<int64_t>& ends, int64_t token_offset, double eps) {
  const char* op = "modulate_backward";
  check((grad_residual || grad_out) && bool(grad_out) == (residual && scale && grad_scale && grad_shift) &&
            bool(y) == (gate && grad_y && grad_gate),
        op, ": arguments do not go together");
  const Shape shape = shape_of(op, grad_residual ? *grad_residual : *grad_out, (gate ? *gate : *scale).shape[1]);
  auto args = args_of<ModulateGradArgs>(shape, y, residual, gate, scale, per_group, ends, token_offset, eps);
  args.grad_residual = shape.rows(grad_residual, "grad_residual");
  args.grad_out = shape.rows(grad_out, "grad_out");
  args.grad_x = shape.rows(grad_x, "grad_x");
  args.grad_y = shape.rows(grad_y, "grad_y");
  args.grad_gate = shape.sums(grad_gate, "grad_gate");
  args.grad_scale = shape.sums(grad_scale, "grad_scale");
  args.grad_shift = shape.sums(grad_shift, "grad_shift");
  if (shape.batch * shape.tokens == 0) return;
  args.chunks = make_chunks(args.groups, token_offset, shape.tokens, kCpuPieces);
  check(partial.numel() >= shape.batch * rows_per_sample(shape.first, args.chunks) * 3 * shape.dim, op,
        ": partial is too small");
  args.partial = partial.data;
  TD_CALL(modulate_backward, shape.first, args);
}

}  // namespace

TD_BINDINGS(modulate) {
  m.def("modulate_forward", &modulate_forward_run);
  m.def("modulate_eight_bit", &modulate_eight_bit_run);
  m.def("modulate_chunks", &modulate_chunks);
  m.def("modulate_backward", &modulate_backward_run);
}

}  // namespace td
