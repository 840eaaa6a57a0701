// SPDX-License-Identifier: Apache-2.0
#include "core/modulate.h"

#include "core/parallel.h"
#include "cpu/code_rows.h"
#include "cpu/row_ops.h"

namespace td::TD_ISA {
namespace {

constexpr int64_t kParallelElements = 16 << 10;  // work worth a thread of its own

// out = (row - mean) / deviation * (1 + scale) + shift
template <bool Stream, class T, class C>
TD_INLINE void modulate_row(const Rows& out, int64_t b, int64_t n, const T* row, const C* scale, const C* shift,
                            int dim, double eps) {
  const RowStats<C> stats = row_stats(row, dim, eps);
  const Vec<C> mean = splat(stats.mean), factor = splat(stats.inverse_deviation);
  dispatch_storage<C>(out.dtype, [&](auto tag) {
    auto* target = row_pointer<typename decltype(tag)::type>(out, b, n);
    for_vectors<C>(dim, [&](int i, auto part) {
      const Vec<C> normal = (load(row + i, part) - mean) * factor;
      put<Stream>(target + i, normal + (normal * load(scale + i, part) + load(shift + i, part)), part);
    });
  });
}

// The same where it is asked for: as numbers, or as codes of what would have been stored as numbers.
template <bool Stream, class T, class C>
TD_INLINE void norm_row(const ModulateArgs& args, int64_t b, int64_t n, const T* row, const C* scale, const C* shift) {
  if (args.out.data != nullptr) modulate_row<Stream>(args.out, b, n, row, scale, shift, args.dim, args.eps);
  if constexpr (sizeof(C) == 4) {
    if (args.codes.data == nullptr) return;
    const DType dtype = args.codes.exact ? args.out.dtype : DType::float32;
    alignas(64) float memory[kMaxModulatedDim];
    modulate_row<false>(Rows{memory, 0, 0, dtype}, 0, 0, row, scale, shift, args.dim, args.eps);
    dispatch_storage<C>(dtype, [&](auto tag) {
      code_row(args.codes, b, n, reinterpret_cast<const typename decltype(tag)::type*>(memory), args.dim);
    });
  }
}

// row = x + gate * y
template <class C>
TD_INLINE void gated_row(const ModulateArgs& args, int64_t b, int64_t n, int64_t g, C* row) {
  const C* gate = row_pointer<C>(args.gate, b, g);
  dispatch_storage<C>(args.x.dtype, [&](auto x_tag) {
    const auto* x = row_pointer<typename decltype(x_tag)::type>(args.x, b, n);
    dispatch_storage<C>(args.y.dtype, [&](auto y_tag) {
      const auto* y = row_pointer<typename decltype(y_tag)::type>(args.y, b, n);
      for_vectors<C>(args.dim, [&](int i, auto part) {
        put(row + i, load(x + i, part) + load(gate + i, part) * load(y + i, part), part);
      });
    });
  });
}

template <class C, bool Stream>
void forward(const ModulateArgs& args) {
  const int dim = args.dim;
  parallel_for(args.batch * args.tokens, 1 + kParallelElements / dim, [&](int64_t begin, int64_t end) {
    alignas(64) C row[kMaxModulatedDim];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / args.tokens, n = item - b * args.tokens;
      const int64_t g = args.groups.group(args.token_offset + n);
      const C *scale = row_pointer<C>(args.scale, b, g), *shift = row_pointer<C>(args.shift, b, g);
      if (args.y.data == nullptr) {
        dispatch_storage<C>(args.x.dtype, [&](auto tag) {
          const auto* x = row_pointer<typename decltype(tag)::type>(args.x, b, n);
          norm_row<Stream>(args, b, n, x, scale, shift);
        });
        continue;
      }
      gated_row(args, b, n, g, row);
      if (args.residual.data != nullptr) store_row<Stream>(args.residual, b, n, row, dim);
      norm_row<Stream>(args, b, n, row, scale, shift);
    }
    if constexpr (Stream) stream_fence();
  });
}

template <class C>
void run_forward(const ModulateArgs& args) {
  const int64_t elements = args.batch * args.tokens * args.dim, threshold = stream_threshold();
  const auto can_stream = [&](const Rows& rows) {
    return rows.data == nullptr || (rows.data != args.x.data && rows.data != args.y.data &&
                                    rows_can_stream<C>(rows, elements * item_size(rows.dtype), threshold));
  };
  can_stream(args.residual) && can_stream(args.out) ? forward<C, true>(args) : forward<C, false>(args);
}

// sums[i] += a[i] * b[i]
template <class C>
TD_INLINE void accumulate(C* sums, const C* a, const C* b, int dim) {
  for_vectors<C>(dim, [&](int i, auto part) {
    put(sums + i, load(sums + i, part) + load(a + i, part) * load(b + i, part), part);
  });
}

// Gradient of the norm and the modulation: total += d; adds this row to the sums of scale and shift.
template <class C>
TD_INLINE void norm_backward_row(const ModulateGradArgs& args, int64_t b, int64_t n, const C* scale, C* total, C* row,
                                 C* grad, C* scale_sums, C* shift_sums) {
  const int dim = args.dim;
  load_row(args.residual, b, n, row, dim);
  load_row(args.grad_out, b, n, grad, dim);
  const RowStats<C> stats = row_stats(row, dim, args.eps);
  const Vec<C> mean = splat(stats.mean), factor = splat(stats.inverse_deviation);
  for_vectors<C>(dim, [&](int i, auto part) {  // row becomes the normalised row
    const Vec<C> normal = (load(row + i, part) - mean) * factor, g = load(grad + i, part);
    put(row + i, normal, part);
    put(scale_sums + i, load(scale_sums + i, part) + g * normal, part);
    put(shift_sums + i, load(shift_sums + i, part) + g, part);
    put(grad + i, g + g * load(scale + i, part), part);
  });
  const C c1 = sum_row<C>(dim, [&](int i, auto part) { return load(grad + i, part); }) / C(dim);
  const C c2 = sum_row<C>(dim, [&](int i, auto part) { return load(grad + i, part) * load(row + i, part); }) / C(dim);
  for_vectors<C>(dim, [&](int i, auto part) {
    const Vec<C> d = (load(grad + i, part) - splat(c1) - load(row + i, part) * splat(c2)) * factor;
    put(total + i, load(total + i, part) + d, part);
  });
}

// A gated sum alone, of tokens [begin, end) of a group: grad_y = gate * grad, and grad * y added to the sums, token by
// token. Some rows go together, so that sums and gate are read once for all of them.
template <bool Stream, class C>
void gate_backward_rows(const ModulateGradArgs& args, int64_t b, int64_t begin, int64_t end, const C* gate,
                        C* gate_sums) {
  constexpr int kTogether = 4;
  dispatch_storage<C>(args.grad_residual.dtype, [&](auto grad_tag) {
    using G = typename decltype(grad_tag)::type;
    dispatch_storage<C>(args.y.dtype, [&](auto y_tag) {
      using Y = typename decltype(y_tag)::type;
      const auto rows = [&](int64_t first, auto count) {
        constexpr int R = decltype(count)::value;
        const G* grad[R];
        const Y* y[R];
        Y* target[R];
        for (int r = 0; r < R; ++r) {
          grad[r] = row_pointer<G>(args.grad_residual, b, first + r);
          y[r] = row_pointer<Y>(args.y, b, first + r);
          target[r] = row_pointer<Y>(args.grad_y, b, first + r);
        }
        for_vectors<C>(args.dim, [&](int i, auto part) {
          const Vec<C> factor = load(gate + i, part);
          Vec<C> total = load(gate_sums + i, part);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const Vec<C> g = load(grad[r] + i, part);
            total += g * load(y[r] + i, part);
            put<Stream>(target[r] + i, g * factor, part);
          }
          put(gate_sums + i, total, part);
        });
      };
      int64_t n = begin;
      for (; n + kTogether <= end; n += kTogether) rows(n, std::integral_constant<int, kTogether>{});
      for (; n < end; ++n) rows(n, std::integral_constant<int, 1>{});
    });
  });
}

template <bool Stream, class C>
void backward_chunk(const ModulateGradArgs& args, int64_t b, int64_t chunk) {
  const int dim = args.dim;
  alignas(64) C total[kMaxModulatedDim], row[kMaxModulatedDim], grad[kMaxModulatedDim];
  C* sums = static_cast<C*>(args.partial) + (b * args.chunks.count + chunk) * 3 * dim;
  std::memset(static_cast<void*>(sums), 0, 3 * size_t(dim) * sizeof(C));
  int64_t g, begin, end;
  args.chunks.locate(args.groups, chunk, g, begin, end);
  if (args.y.data && !args.grad_out.data && !args.grad_x.data && args.grad_y.dtype == args.y.dtype) {
    gate_backward_rows<Stream>(args, b, begin, end, row_pointer<C>(args.gate, b, g), sums + 2 * dim);
    return;
  }
  for (int64_t n = begin; n < end; ++n) {
    if (args.grad_residual.data != nullptr) {
      load_row(args.grad_residual, b, n, total, dim);
    } else {
      std::memset(static_cast<void*>(total), 0, size_t(dim) * sizeof(C));
    }
    if (args.grad_out.data != nullptr) {
      norm_backward_row(args, b, n, row_pointer<C>(args.scale, b, g), total, row, grad, sums, sums + dim);
    }
    if (args.grad_x.data != nullptr) store_row<Stream>(args.grad_x, b, n, total, dim);
    if (args.y.data == nullptr) continue;
    load_row(args.y, b, n, row, dim);
    accumulate(sums + 2 * dim, total, row, dim);
    const C* gate = row_pointer<C>(args.gate, b, g);
    for_vectors<C>(dim, [&](int i, auto part) { put(row + i, load(total + i, part) * load(gate + i, part), part); });
    store_row<Stream>(args.grad_y, b, n, row, dim);
  }
}

// Adds the partial sums of the chunks of every group, in order.
template <class C>
void reduce_groups(const ModulateGradArgs& args) {
  const int dim = args.dim;
  C* targets[3] = {static_cast<C*>(args.grad_scale), static_cast<C*>(args.grad_shift), static_cast<C*>(args.grad_gate)};
  parallel_for(args.batch * args.groups.count, 1 + kParallelElements / dim, [&](int64_t from, int64_t to) {
    for (int64_t item = from; item < to; ++item) {
      const int64_t b = item / args.groups.count, g = item - b * args.groups.count;
      const bool inside = g >= args.chunks.first_group && g <= args.chunks.last_group;
      const int64_t begin = inside ? args.chunks.chunk_begin(args.groups, g) : 0;
      const int64_t end = inside ? args.chunks.chunk_end(args.groups, g) : 0;
      for (int which = 0; which < 3; ++which) {
        if (targets[which] == nullptr) continue;
        C* target = targets[which] + item * dim;
        std::memset(static_cast<void*>(target), 0, size_t(dim) * sizeof(C));
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const C* sums = static_cast<const C*>(args.partial) + ((b * args.chunks.count + chunk) * 3 + which) * dim;
          for_vectors<C>(
              dim, [&](int i, auto part) { put(target + i, load(target + i, part) + load(sums + i, part), part); });
        }
      }
    }
  });
}

template <bool Stream, class C>
void backward(const ModulateGradArgs& args) {
  const int64_t grain = 1 + kParallelElements / (args.chunks.chunk_tokens * args.dim);
  parallel_for(args.batch * args.chunks.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      backward_chunk<Stream, C>(args, item / args.chunks.count, item % args.chunks.count);
    }
    if constexpr (Stream) stream_fence();
  });
  reduce_groups<C>(args);
}

template <class C>
void run_backward(const ModulateGradArgs& args) {
  const int64_t elements = args.batch * args.tokens * args.dim, threshold = stream_threshold();
  const auto can_stream = [&](const Rows& rows) {
    return rows.data == nullptr || rows_can_stream<C>(rows, elements * item_size(rows.dtype), threshold);
  };
  can_stream(args.grad_x) && can_stream(args.grad_y) ? backward<true, C>(args) : backward<false, C>(args);
}

}  // namespace

void modulate_forward(const ModulateArgs& args) {
  args.x.dtype == DType::float64 ? run_forward<double>(args) : run_forward<float>(args);
}

void modulate_backward(const ModulateGradArgs& args) {
  const DType dtype = args.grad_residual.data != nullptr ? args.grad_residual.dtype : args.grad_out.dtype;
  dtype == DType::float64 ? run_backward<double>(args) : run_backward<float>(args);
}

}  // namespace td::TD_ISA
