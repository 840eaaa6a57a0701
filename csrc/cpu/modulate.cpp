// SPDX-License-Identifier: Apache-2.0
#include "core/modulate.h"

#include <initializer_list>

#include "core/parallel.h"
#include "cpu/code_rows.h"
#include "cpu/row_ops.h"

namespace td::TD_ISA {
namespace {

constexpr int64_t kParallelElements = 16 << 10;  // work worth a thread of its own
// Tokens of a backward pass: with more, small registers leave too many lines of the results open.
constexpr int kTogether = TD_VEC_BYTES == 64 ? 4 : 2;

// Bytes of all results of a call: they are in the caches together.
template <class Args>
int64_t bytes_of(const Args& args, std::initializer_list<const Rows*> results) {
  int64_t bytes = 0;
  for (const Rows* rows : results) {
    if (rows->data != nullptr) bytes += args.batch * args.tokens * args.dim * item_size(rows->dtype);
  }
  return bytes;
}

// A line that will be written: without stores that bypass the caches it is read first.
TD_INLINE void prefetch_target(const void* address) {
  __builtin_prefetch(address, 1, 2);
}

// out = (row - mean) / deviation * (1 + scale) + shift. The next row of the same is `next` elements away.
template <bool Stream, class T, class C>
TD_INLINE void modulate_row(const Rows& out, int64_t b, int64_t n, const T* row, int64_t next, const C* scale,
                            const C* shift, int dim, double eps) {
  const RowStats<C> stats = row_stats(row, dim, eps);
  const Vec<C> mean = splat(stats.mean), factor = splat(stats.inverse_deviation);
  dispatch_storage<C>(out.dtype, [&](auto tag) {
    auto* target = row_pointer<typename decltype(tag)::type>(out, b, n);
    for_vectors<C>(dim, [&](int i, auto part) {
      prefetch(row + next + i);
      const Vec<C> normal = (load(row + i, part) - mean) * factor;
      put<Stream>(target + i, normal + (normal * load(scale + i, part) + load(shift + i, part)), part);
    });
  });
}

// The same where it is asked for: as numbers, or as codes of what would have been stored as numbers.
template <bool Stream, class T, class C>
TD_INLINE void norm_row(const ModulateArgs& args, int64_t b, int64_t n, const T* row, int64_t next, const C* scale,
                        const C* shift) {
  if (args.out.data != nullptr) modulate_row<Stream>(args.out, b, n, row, next, scale, shift, args.dim, args.eps);
  if constexpr (sizeof(C) == 4) {
    if (args.codes.data == nullptr) return;
    const DType dtype = args.codes.exact ? args.out.dtype : DType::float32;
    alignas(64) float memory[kMaxModulatedDim];
    modulate_row<false>(Rows{memory, 0, 0, dtype}, 0, 0, row, next, scale, shift, args.dim, args.eps);
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
          norm_row<Stream>(args, b, n, x, args.x.token_stride, scale, shift);
        });
        continue;
      }
      gated_row(args, b, n, g, row);
      if (args.residual.data != nullptr) store_row<Stream>(args.residual, b, n, row, dim);
      norm_row<Stream>(args, b, n, row, 0, scale, shift);
    }
    if constexpr (Stream) stream_fence();
  });
}

template <class C>
void run_forward(const ModulateArgs& args) {
  const int64_t bytes = bytes_of(args, {&args.residual, &args.out}), threshold = stream_threshold();
  const auto can_stream = [&](const Rows& rows) {
    return rows.data == nullptr ||
           (rows.data != args.x.data && rows.data != args.y.data && rows_can_stream(rows, bytes, threshold));
  };
  can_stream(args.residual) && can_stream(args.out) ? forward<C, true>(args) : forward<C, false>(args);
}

// What the gradient of one normalised row needs: its statistics, and the means that it loses: of the gradient before
// the modulation, and of that gradient times the normalised row.
template <class C>
struct NormTerms {
  C mean, inverse_deviation, gradient, product;
};

template <class S, class B, class C>
TD_INLINE NormTerms<C> norm_terms(const S* row, const B* grad, const C* scale, int dim, double eps) {
  constexpr int lanes = kLanes<C>;
  const Vec<C> center = splat(row_pivot(row, dim));
  Vec<C> s[2]{}, q[2]{}, d[2]{}, p[2]{};
  const auto add = [&](int i, int chain, auto part) {
    const Vec<C> a = keep<C>(load(row + i, part) - center, part), g = load(grad + i, part);
    const Vec<C> before = g + g * load(scale + i, part);
    s[chain] += a;
    q[chain] += a * a;
    d[chain] += before;
    p[chain] += before * a;
  };
  int i = 0;
  for (; i + 2 * lanes <= dim; i += 2 * lanes) {
    add(i, 0, Whole{});
    add(i + lanes, 1, Whole{});
  }
  for_vectors<C>(dim - i, [&](int j, auto part) { add(i + j, 0, part); });
  const C offset = sum(s[0] + s[1]) / C(dim), total = sum(d[0] + d[1]);
  const RowStats<C> stats = stats_of(center[0], offset, sum(q[0] + q[1]) / C(dim), eps);
  const C product = (sum(p[0] + p[1]) - offset * total) * stats.inverse_deviation / C(dim);
  return {stats.mean, stats.inverse_deviation, total / C(dim), product};
}

// Rows of R tokens: S is the type of the residual stream, B that of a branch. No grad_residual is one of zeros.
template <class S, class B, int R>
struct GradRows {
  const S *residual[R], *grad_residual[R];
  const B *grad_out[R], *y[R];
  S* grad_x[R];
  B* grad_y[R];
  // How far the rows of the next tokens are; 0: not worth a look.
  int64_t next_residual, next_grad_residual, next_grad_out, next_y, next_grad_x, next_grad_y;
};

// Registers that lie side by side; a part is one of them.
template <bool Stream, int V, class T, class VecC, class Portion>
TD_INLINE void put_all(T* target, const VecC* vectors, Portion part) {
  if constexpr (V == 1) {
    put<Stream>(target, vectors[0], part);
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < V; v += 2) put_two<Stream>(target + v * kLanes<compute_t<T>>, vectors[v], vectors[v + 1]);
  }
}

// The gradients of tokens of one group, that go together so that sums, scale and gate are read once for all of them;
// what they add to the sums is added token by token.
template <bool Stream, bool Norm, bool Gated, class C, class S, class B, int R>
void grad_rows(const GradRows<S, B, R>& rows, const C* gate, const C* scale, C* sums, int dim, double eps) {
  NormTerms<C> terms[R];
  if constexpr (Norm) {
    for (int r = 0; r < R; ++r) terms[r] = norm_terms(rows.residual[r], rows.grad_out[r], scale, dim, eps);
  }
  const bool added = rows.grad_residual[0] != nullptr, kept = rows.grad_x[0] != nullptr;
  C *scale_sums = sums, *shift_sums = sums + dim, *gate_sums = sums + 2 * dim;
  const auto columns = [&](int i, auto part, auto count) {
    constexpr int lanes = kLanes<C>, V = decltype(count)::value;
    Vec<C> scale_sum[V], shift_sum[V], scaling[V], gate_sum[V], gating[V], total[V];
    for (int v = 0; v < V; ++v) {
      const int at = i + v * lanes;
      if constexpr (Norm) {
        scaling[v] = load(scale + at, part);
        scale_sum[v] = load(scale_sums + at, part);
        shift_sum[v] = load(shift_sums + at, part);
      }
      if constexpr (Gated) {
        gating[v] = load(gate + at, part);
        gate_sum[v] = load(gate_sums + at, part);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int at = i + v * lanes;
        const bool branch_line = v * lanes * int(sizeof(B)) % kLineBytes == 0;
        const bool stream_line = v * lanes * int(sizeof(S)) % kLineBytes == 0;
        if (added && stream_line) prefetch(rows.grad_residual[r] + rows.next_grad_residual + at);
        if (Gated && branch_line) prefetch(rows.y[r] + rows.next_y + at);
        if (!Stream && kept && stream_line) prefetch_target(rows.grad_x[r] + rows.next_grad_x + at);
        if (!Stream && Gated && branch_line) prefetch_target(rows.grad_y[r] + rows.next_grad_y + at);
        total[v] = added ? load(rows.grad_residual[r] + at, part) : Vec<C>{};
        if constexpr (Norm) {
          if (stream_line) prefetch(rows.residual[r] + rows.next_residual + at);
          if (branch_line) prefetch(rows.grad_out[r] + rows.next_grad_out + at);
          const Vec<C> g = load(rows.grad_out[r] + at, part), deviation = splat(terms[r].inverse_deviation);
          const Vec<C> normal = (load(rows.residual[r] + at, part) - splat(terms[r].mean)) * deviation;
          scale_sum[v] += g * normal;
          shift_sum[v] += g;
          total[v] += (g + g * scaling[v] - splat(terms[r].gradient) - normal * splat(terms[r].product)) * deviation;
        }
      }
      if (kept) put_all<Stream, V>(rows.grad_x[r] + i, total, part);
      if constexpr (Gated) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          gate_sum[v] += total[v] * load(rows.y[r] + i + v * lanes, part);
          total[v] *= gating[v];
        }
        put_all<Stream, V>(rows.grad_y[r] + i, total, part);
      }
    }
    for (int v = 0; v < V; ++v) {
      const int at = i + v * lanes;
      if constexpr (Norm) {
        put(scale_sums + at, scale_sum[v], part);
        put(shift_sums + at, shift_sum[v], part);
      }
      if constexpr (Gated) put(gate_sums + at, gate_sum[v], part);
    }
  };
  // Stores that bypass the caches fill a line before they begin another: too many half full are written in parts.
  constexpr int registers = kLineBytes / (kLanes<C> * int(sizeof(B))), kLine = registers < 4 ? registers : 4;
  int i = 0;
  for (; i + kLine * kLanes<C> <= dim; i += kLine * kLanes<C>) {
    columns(i, Whole{}, std::integral_constant<int, kLine>{});
  }
  for_vectors<C>(dim - i, [&](int j, auto part) { columns(i + j, part, std::integral_constant<int, 1>{}); });
}

template <bool Stream, bool Norm, bool Gated, class C, class S, class B>
void grad_tokens(const ModulateGradArgs& args, int64_t b, int64_t begin, int64_t end, const C* gate, const C* scale,
                 C* sums) {
  const auto run = [&](int64_t first, auto count) {
    constexpr int R = decltype(count)::value;
    GradRows<S, B, R> rows;
    for (int r = 0; r < R; ++r) {
      const auto at = [&](const Rows& all, auto*& row) {
        row = all.data ? row_pointer<std::remove_reference_t<decltype(*row)>>(all, b, first + r) : nullptr;
      };
      at(args.residual, rows.residual[r]);
      at(args.grad_residual, rows.grad_residual[r]);
      at(args.grad_out, rows.grad_out[r]);
      at(args.y, rows.y[r]);
      at(args.grad_x, rows.grad_x[r]);
      at(args.grad_y, rows.grad_y[r]);
    }
    rows.next_residual = R * args.residual.token_stride;
    rows.next_grad_residual = R * args.grad_residual.token_stride;
    rows.next_grad_out = R * args.grad_out.token_stride;
    rows.next_y = R * args.y.token_stride;
    rows.next_grad_x = R * args.grad_x.token_stride;
    rows.next_grad_y = R * args.grad_y.token_stride;
    grad_rows<Stream, Norm, Gated>(rows, gate, scale, sums, args.dim, args.eps);
  };
  int64_t n = begin;
  for (; n + kTogether <= end; n += kTogether) run(n, std::integral_constant<int, kTogether>{});
  for (; n < end; ++n) run(n, std::integral_constant<int, 1>{});
}

// Rows of other types pass through memory of the arithmetic's, one token at a time.
template <bool Norm, bool Gated, class C>
void grad_converted_tokens(const ModulateGradArgs& args, int64_t b, int64_t begin, int64_t end, const C* gate,
                           const C* scale, C* sums) {
  alignas(64) C memory[6][kMaxModulatedDim];
  const Rows* given[4] = {&args.residual, &args.grad_residual, &args.grad_out, &args.y};
  const auto place = [&](int which, const Rows& rows) { return rows.data ? memory[which] : nullptr; };
  const GradRows<C, C, 1> rows{{place(0, args.residual)},
                               {place(1, args.grad_residual)},
                               {place(2, args.grad_out)},
                               {place(3, args.y)},
                               {place(4, args.grad_x)},
                               {place(5, args.grad_y)},
                               0,
                               0,
                               0,
                               0,
                               0,
                               0};
  for (int64_t n = begin; n < end; ++n) {
    for (int which = 0; which < 4; ++which) {
      if (given[which]->data) load_row(*given[which], b, n, memory[which], args.dim);
    }
    grad_rows<false, Norm, Gated>(rows, gate, scale, sums, args.dim, args.eps);
    if (args.grad_x.data) store_row<false>(args.grad_x, b, n, memory[4], args.dim);
    if (args.grad_y.data) store_row<false>(args.grad_y, b, n, memory[5], args.dim);
  }
}

// fn(type_tag<S>{}, type_tag<B>{}) where the residual stream has one type and the branch one; false for pairs that are
// seldom.
template <class C, class F>
bool dispatch_pair(const ModulateGradArgs& args, const F& fn) {
  if constexpr (sizeof(C) == 8) {
    fn(type_tag<double>{}, type_tag<double>{});
    return true;
  } else {
    const auto all = [](DType dtype, std::initializer_list<const Rows*> rows) {
      for (const Rows* one : rows) {
        if (one->data != nullptr && one->dtype != dtype) return false;
      }
      return true;
    };
    const auto pair = [&](DType stream, DType branch) {
      return all(stream, {&args.residual, &args.grad_residual, &args.grad_x}) &&
             all(branch, {&args.grad_out, &args.y, &args.grad_y});
    };
    if (pair(DType::float32, DType::float32)) {
      fn(type_tag<float>{}, type_tag<float>{});
    } else if (pair(DType::bfloat16, DType::bfloat16)) {
      fn(type_tag<bf16>{}, type_tag<bf16>{});
    } else if (pair(DType::float32, DType::bfloat16)) {
      fn(type_tag<float>{}, type_tag<bf16>{});
    } else {
      return false;
    }
    return true;
  }
}

template <bool Stream, class C>
void backward_chunk(const ModulateGradArgs& args, int64_t b, int64_t chunk) {
  const int dim = args.dim;
  C* sums = static_cast<C*>(args.partial) + (b * args.chunks.count + chunk) * 3 * dim;
  std::memset(static_cast<void*>(sums), 0, 3 * size_t(dim) * sizeof(C));
  int64_t g, begin, end;
  args.chunks.locate(args.groups, chunk, g, begin, end);
  const C* gate = args.gate.data ? row_pointer<C>(args.gate, b, g) : nullptr;
  const C* scale = args.scale.data ? row_pointer<C>(args.scale, b, g) : nullptr;
  const auto run = [&](auto norm, auto gated) {
    constexpr bool Norm = decltype(norm)::value, Gated = decltype(gated)::value;
    const bool direct = dispatch_pair<C>(args, [&](auto stream_tag, auto branch_tag) {
      using S = typename decltype(stream_tag)::type;
      using B = typename decltype(branch_tag)::type;
      grad_tokens<Stream, Norm, Gated, C, S, B>(args, b, begin, end, gate, scale, sums);
    });
    if (!direct) grad_converted_tokens<Norm, Gated>(args, b, begin, end, gate, scale, sums);
  };
  if (args.grad_out.data == nullptr) {
    run(std::false_type{}, std::true_type{});
  } else if (args.y.data == nullptr) {
    run(std::true_type{}, std::false_type{});
  } else {
    run(std::true_type{}, std::true_type{});
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
  const int64_t bytes = bytes_of(args, {&args.grad_x, &args.grad_y}), threshold = stream_threshold();
  const auto can_stream = [&](const Rows& rows) {
    return rows.data == nullptr || rows_can_stream(rows, bytes, threshold);
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
