// SPDX-License-Identifier: Apache-2.0
#include "core/window_fusion.h"

#include "core/parallel.h"
#include "cpu/vec.h"

namespace td::TD_ISA {
namespace {

constexpr int64_t kGrainBytes = 64 << 10;  // work worth a thread of its own
constexpr int kUnroll = 4;

// One row of a result plane: x * x_gain plus all terms, kUnroll registers at a time so that every source is read in
// runs of a few cache lines.
template <bool Stream, class X, class P>
TD_INLINE void fuse_row(const X* x, double x_gain, const P* const* bases, const WindowTerm* terms, int64_t count,
                        int predictions, X* out, int64_t cols) {
  using C = compute_t<X>;
  constexpr int lanes = kLanes<C>;
  const Vec<C> a = splat(C(x_gain));
  int64_t i = 0;
  for (; i + kUnroll * lanes <= cols; i += kUnroll * lanes) {
    Vec<C> sum[kUnroll] = {};
    if (x)
      for (int u = 0; u < kUnroll; ++u) sum[u] = a * load(x + i + u * lanes);
    for (int64_t t = 0; t < count; ++t) {
      for (int k = 0; k < predictions; ++k) {
        const P* source = bases[k] + terms[t].offset[k] + i;
        const Vec<C> gain = splat(C(terms[t].gain[k]));
        for (int u = 0; u < kUnroll; ++u) sum[u] += gain * load(source + u * lanes);
      }
    }
    for (int u = 0; u < kUnroll; ++u) put<Stream>(out + i + u * lanes, sum[u]);
  }
  for (; i < cols; i += lanes) {
    const int part = cols - i < lanes ? int(cols - i) : lanes;
    Vec<C> sum = {};
    if (x) sum = a * load_part(x + i, part);
    for (int64_t t = 0; t < count; ++t)
      for (int k = 0; k < predictions; ++k)
        sum += splat(C(terms[t].gain[k])) * load_part(bases[k] + terms[t].offset[k] + i, part);
    store_part(out + i, sum, part);
  }
}

// Vectors of a row can bypass the caches if all rows start aligned.
template <class T>
TD_INLINE bool aligned(const void* data, const int64_t* strides, int count) {
  uint64_t bits = reinterpret_cast<uint64_t>(data);
  for (int i = 0; i < count; ++i) bits |= uint64_t(strides[i]) * sizeof(T);
  return bits % (kLanes<compute_t<T>> * sizeof(T)) == 0;
}

template <bool Stream, class X, class P>
void forward(const WindowArgs& args) {
  const int64_t plane_bytes = args.rows * args.cols * int64_t(sizeof(X));
  parallel_for(args.channels * args.length, 1 + kGrainBytes / (plane_bytes + 1), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t c = plane / args.length, l = plane - c * args.length;
      const WindowTerm* terms = args.terms + args.term_begin[l];
      const int64_t count = args.term_begin[l + 1] - args.term_begin[l];
      for (int64_t r = 0; r < args.rows; ++r) {
        const P* bases[kMaxPredictions] = {};
        for (int k = 0; k < args.prediction_count; ++k) {
          const int64_t* strides = args.prediction_strides[k];
          bases[k] = static_cast<const P*>(args.predictions[k]) + c * strides[1] + r * strides[3];
        }
        const int64_t* xs = args.x_strides;
        const X* x = args.x ? static_cast<const X*>(args.x) + c * xs[0] + l * xs[1] + r * xs[2] : nullptr;
        const int64_t* os = args.out_strides;
        X* out = static_cast<X*>(args.out) + c * os[0] + l * os[1] + r * os[2];
        fuse_row<Stream>(x, args.x_gains[l], bases, terms, count, args.prediction_count, out, args.cols);
      }
    }
    if constexpr (Stream) stream_fence();
  });
}

template <bool Stream, class X, class P>
TD_INLINE void scale_row(const X* grad, double gain, P* out, int64_t cols) {
  using C = compute_t<X>;
  constexpr int lanes = kLanes<C>;
  const Vec<C> g = splat(C(gain));
  int64_t i = 0;
  for (; i + lanes <= cols; i += lanes) {
    const Vec<C> v = gain != 0.0 ? Vec<C>(g * load(grad + i)) : Vec<C>{};
    put<Stream>(out + i, v);
  }
  if (const int part = int(cols - i); part > 0) {
    store_part(out + i, gain != 0.0 ? Vec<C>(g * load_part(grad + i, part)) : Vec<C>{}, part);
  }
}

template <bool Stream, class X, class P>
void backward_predictions(const WindowArgs& args) {
  const int64_t plane_bytes = args.rows * args.cols * args.prediction_count * int64_t(sizeof(P));
  const int64_t planes = args.windows * args.channels * args.frames;
  parallel_for(planes, 1 + kGrainBytes / (plane_bytes + 1), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t i = plane / (args.channels * args.frames), rest = plane - i * args.channels * args.frames;
      const int64_t c = rest / args.frames, j = rest - c * args.frames;
      const int64_t l = window_frame(args.starts[i], j, args.length);
      const double gain = window_gain(args.weights[i * args.frames + j], args.totals[l]);
      const X* grad = static_cast<const X*>(args.out) + c * args.out_strides[0] + l * args.out_strides[1];
      for (int64_t r = 0; r < args.rows; ++r) {
        for (int k = 0; k < args.prediction_count; ++k) {
          const int64_t* strides = args.prediction_strides[k];
          P* out = static_cast<P*>(args.predictions[k]) + i * strides[0] + c * strides[1] + j * strides[2];
          scale_row<Stream>(grad + r * args.out_strides[2], gain * window_coefficient(args, i, k), out + r * strides[3],
                            args.cols);
        }
      }
    }
    if constexpr (Stream) stream_fence();
  });
}

template <bool Stream, class X>
void backward_x(const WindowArgs& args) {
  const int64_t plane_bytes = args.rows * args.cols * int64_t(sizeof(X));
  parallel_for(args.channels * args.length, 1 + kGrainBytes / (plane_bytes + 1), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t c = plane / args.length, l = plane - c * args.length;
      const X* grad = static_cast<const X*>(args.out) + c * args.out_strides[0] + l * args.out_strides[1];
      X* out = static_cast<X*>(args.x) + c * args.x_strides[0] + l * args.x_strides[1];
      for (int64_t r = 0; r < args.rows; ++r) {
        scale_row<Stream>(grad + r * args.out_strides[2], args.x_gains[l], out + r * args.x_strides[2], args.cols);
      }
    }
    if constexpr (Stream) stream_fence();
  });
}

}  // namespace

void window_fusion(const WindowArgs& args) {
  dispatch_window(args, [&](auto x_tag, auto prediction_tag) {
    using X = typename decltype(x_tag)::type;
    using P = typename decltype(prediction_tag)::type;
    const int64_t bytes = args.channels * args.length * args.rows * args.cols * int64_t(sizeof(X));
    // In place, the lines that are written have just been read.
    if (args.out != args.x && bytes >= stream_threshold() && aligned<X>(args.out, args.out_strides, 3)) {
      forward<true, X, P>(args);
    } else {
      forward<false, X, P>(args);
    }
  });
}

void window_fusion_backward(const WindowArgs& args) {
  dispatch_window(args, [&](auto x_tag, auto prediction_tag) {
    using X = typename decltype(x_tag)::type;
    using P = typename decltype(prediction_tag)::type;
    const int64_t plane = args.channels * args.rows * args.cols;
    if (args.predictions[0]) {
      bool stream = plane * args.windows * args.frames * int64_t(sizeof(P)) >= stream_threshold();
      for (int k = 0; k < args.prediction_count; ++k) {
        stream = stream && aligned<P>(args.predictions[k], args.prediction_strides[k], 4);
      }
      stream ? backward_predictions<true, X, P>(args) : backward_predictions<false, X, P>(args);
    }
    if (args.x) {
      const bool stream =
          plane * args.length * int64_t(sizeof(X)) >= stream_threshold() && aligned<X>(args.x, args.x_strides, 3);
      stream ? backward_x<true, X>(args) : backward_x<false, X>(args);
    }
  });
}

}  // namespace td::TD_ISA
