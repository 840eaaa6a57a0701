// SPDX-License-Identifier: Apache-2.0
#include "core/qk_norm_rope3d.h"

#include "core/parallel.h"
#include "cpu/rope_row.h"

namespace td::TD_ISA {
namespace {

// 1 / rms over `heads` heads of one token, beginning with head `first`. It needs all of them before the first result:
// whoever comes next is fetched while results are made.
template <class T>
TD_INLINE compute_t<T> inverse_rms(const RopeArgs& args, int64_t b, int64_t n, int64_t first, int64_t heads,
                                   double eps) {
  using C = compute_t<T>;
  constexpr int lanes = kLanes<C>;
  Vec<C> squares{};
  for (int64_t h = first; h < first + heads; ++h) {
    const T* x = rope_head<const T>(args.x, args.x_strides, b, n, h);
    // Heads are summed apart, which rounds less, in two sums, of which neither waits for itself.
    Vec<C> even{}, odd{};
    int d = 0;
    for (; d + 2 * lanes <= args.dim; d += 2 * lanes) {
      const Vec<C> low = load(x + d), high = load(x + d + lanes);
      even += low * low;
      odd += high * high;
    }
    for_vectors<C>(args.dim - d, [&](int i, auto part) {
      const Vec<C> rest = load(x + d + i, part);
      even += rest * rest;
    });
    squares += even + odd;
  }
  return C(1) / std::sqrt(sum(squares) / C(heads * args.dim) + C(eps));
}

template <class T, bool Stream>
void forward(const QkNormRopeArgs& all) {
  using C = compute_t<T>;
  const RopeArgs& args = all.rope;
  const int64_t bytes_per_token = args.batch * args.heads * args.dim * int64_t(sizeof(T));
  const int64_t domain = all.per_head ? 1 : args.heads;  // heads normalised together
  parallel_for(args.tokens, 1 + kParallelBytes / (bytes_per_token + 1), [&](int64_t begin, int64_t end) {
    RopeRow<C> row(args, begin);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t next = n + 1 < end ? args.x_strides[1] : 0;
      for (int64_t b = 0; b < args.batch; ++b) {
        Vec<C> factor{};
        for (int64_t h = 0; h < args.heads; ++h) {
          if (h % domain == 0) factor = splat(inverse_rms<T>(args, b, n, h, domain, all.eps));
          const T* x = rope_head<const T>(args.x, args.x_strides, b, n, h);
          T* out = rope_head<T>(args.out, args.out_strides, b, n, h);
          const C* weight = static_cast<const C*>(all.weight) + (all.per_head ? 0 : h * args.dim);
          row.template rotate_into<Stream>(out, [&](int d, auto part) {
            prefetch(x + next + d);
            return load(x + d, part) * factor * load(weight + d, part);
          });
        }
      }
      if (n + 1 < end) row.advance();
    }
    if constexpr (Stream) stream_fence();
  });
}

// With g the gradient rotated back: dx = r (w g - x r^2 mean(w g x)), dw = sum over tokens of g x r.
template <class T, bool Stream>
TD_INLINE void backward_token(const QkNormRopeGradArgs& grads, const RopeRow<compute_t<T>>& row, int64_t b, int64_t n,
                              bool last, compute_t<T>* weight_sums) {
  using C = compute_t<T>;
  const QkNormRopeArgs& all = grads.forward;
  const RopeArgs& args = all.rope;
  const int64_t domain = all.per_head ? 1 : args.heads;
  const int64_t next = last ? 0 : args.x_strides[1], next_grad = last ? 0 : grads.grad_strides[1];
  for (int64_t first = 0; first < args.heads; first += domain) {
    const C r = inverse_rms<T>(args, b, n, first, domain, all.eps);
    const Vec<C> factor = splat(r);
    Vec<C> dots{};
    for (int64_t h = first; h < first + domain; ++h) {
      const T* x = rope_head<const T>(args.x, args.x_strides, b, n, h);
      const T* grad = rope_head<const T>(grads.grad, grads.grad_strides, b, n, h);
      const int64_t at = all.per_head ? 0 : h * args.dim;
      const C* weight = static_cast<const C*>(all.weight) + at;
      C* sums = weight_sums + at;
      row.rotate([&](int d, auto part) { return load(grad + d, part); },
                 [&](int d, auto g, auto part) {
                   const Vec<C> gx = g * load(x + d, part);
                   dots += gx * load(weight + d, part);
                   put(sums + d, load(sums + d, part) + gx * factor, part);
                 });
    }
    const Vec<C> pull = splat(sum(dots) * r * r / C(domain * args.dim));
    for (int64_t h = first; h < first + domain; ++h) {
      const T* x = rope_head<const T>(args.x, args.x_strides, b, n, h);
      T* grad_x = rope_head<T>(args.out, args.out_strides, b, n, h);
      const T* grad = rope_head<const T>(grads.grad, grads.grad_strides, b, n, h);
      const C* weight = static_cast<const C*>(all.weight) + (all.per_head ? 0 : h * args.dim);
      row.template rotate_into<Stream>(
          grad_x,
          [&](int d, auto part) {
            prefetch(grad + next_grad + d);
            return load(grad + d, part);
          },
          [&](int d, auto g, auto part) {
            prefetch(x + next + d);
            return factor * (g * load(weight + d, part) - load(x + d, part) * pull);
          });
    }
  }
}

template <class T, bool Stream>
void backward(const QkNormRopeGradArgs& grads) {
  using C = compute_t<T>;
  const QkNormRopeArgs& all = grads.forward;
  RopeArgs back = all.rope;
  back.inverse = !back.inverse;
  const int64_t width = all.per_head ? back.dim : back.heads * back.dim;
  const int64_t chunks = back.batch * grads.chunks_per_sample;
  C* partial = static_cast<C*>(grads.partial);
  parallel_for(chunks, 1, [&](int64_t from, int64_t to) {
    for (int64_t chunk = from; chunk < to; ++chunk) {
      const int64_t b = chunk / grads.chunks_per_sample, j = chunk - b * grads.chunks_per_sample;
      const int64_t begin = j * grads.chunk_tokens;
      const int64_t end = begin + grads.chunk_tokens < back.tokens ? begin + grads.chunk_tokens : back.tokens;
      C* sums = partial + chunk * width;
      std::memset(static_cast<void*>(sums), 0, size_t(width) * sizeof(C));
      RopeRow<C> row(back, begin);
      for (int64_t n = begin; n < end; ++n) {
        backward_token<T, Stream>(grads, row, b, n, n + 1 == end, sums);
        if (n + 1 < end) row.advance();
      }
    }
    if constexpr (Stream) stream_fence();
  });
  C* total = static_cast<C*>(grads.grad_weight);
  std::memset(static_cast<void*>(total), 0, size_t(width) * sizeof(C));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for_vectors<C>(int(width), [&](int i, auto part) {
      put(total + i, load(total + i, part) + load(partial + chunk * width + i, part), part);
    });
  }
}

}  // namespace

void qk_norm_rope3d(const QkNormRopeArgs& args) {
  dispatch_float(args.rope.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    rope_can_stream<T>(args.rope) ? forward<T, true>(args) : forward<T, false>(args);
  });
}

void qk_norm_rope3d_backward(const QkNormRopeGradArgs& args) {
  dispatch_float(args.forward.rope.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const RopeArgs& rope = args.forward.rope;
    rope_can_stream<T>(rope) && rope.out != args.grad ? backward<T, true>(args) : backward<T, false>(args);
  });
}

}  // namespace td::TD_ISA
