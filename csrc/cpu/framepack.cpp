// SPDX-License-Identifier: Apache-2.0
#include "core/framepack.h"

#include "core/parallel.h"
#include "cpu/vec.h"

namespace td::TD_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // elements worth a thread of its own

// Copies a row of the latents into the patches of a row of tokens: K elements to each, `stride` elements apart.
template <int K, class T>
TD_INLINE void spread_row(const T* source, T* target, int64_t tokens, int64_t stride) {
  for (int64_t i = 0; i < tokens; ++i)
    std::memcpy(static_cast<void*>(target + i * stride), source + i * K, K * sizeof(T));
}

// One row of tokens of one bucket: every channel and tap of it. `source` null: zeros.
template <class T>
TD_INLINE void gather_row(const PackArgs& args, const PackBucket& bucket, const T* source, T* target, int64_t stride) {
  const int64_t kw = bucket.kernel[2], tokens = bucket.grid[2];
  const int64_t whole = source == nullptr ? 0 : (args.width / kw < tokens ? args.width / kw : tokens);
  switch (kw) {
    case 1:
      spread_row<1>(source, target, whole, stride);
      break;
    case 2:
      spread_row<2>(source, target, whole, stride);
      break;
    case 4:
      spread_row<4>(source, target, whole, stride);
      break;
    case 8:
      spread_row<8>(source, target, whole, stride);
      break;
    default:
      for (int64_t i = 0; i < whole; ++i)
        for (int64_t dx = 0; dx < kw; ++dx) target[i * stride + dx] = source[i * kw + dx];
  }
  for (int64_t i = whole; i < tokens; ++i) {
    for (int64_t dx = 0; dx < kw; ++dx) {
      const int64_t x = pack_source(args.padding, i * kw + dx, args.width);
      target[i * stride + dx] = source == nullptr || x < 0 ? T(0) : source[x];
    }
  }
}

// Start of the latent row behind padded position (t, y), or null for zeros.
template <class T>
TD_INLINE T* latent_row(const PackArgs& args, const PackBucket& bucket, int64_t b, int64_t c, int64_t t, int64_t y) {
  const int64_t frame = pack_frame(args, bucket, t), row = pack_source(args.padding, y, args.height);
  if (frame < 0 || row < 0) return nullptr;
  return static_cast<T*>(args.latents) + b * args.latent_strides[0] + c * args.latent_strides[1] +
         frame * args.latent_strides[2] + row * args.latent_strides[3];
}

template <class T>
void pool_row(const PackArgs& args, const PackBucket& bucket, int64_t b, int64_t ft, int64_t fy) {
  using C = compute_t<T>;
  const int64_t kt = bucket.kernel[0], kh = bucket.kernel[1], kw = bucket.kernel[2];
  for (int64_t c = 0; c < args.channels; ++c) {
    for (int64_t fx = 0; fx < bucket.grid[2]; ++fx) {
      C total = C(0);
      for (int64_t dt = 0; dt < kt; ++dt) {
        for (int64_t dy = 0; dy < kh; ++dy) {
          const T* source = latent_row<const T>(args, bucket, b, c, ft * kt + dt, fy * kh + dy);
          if (source == nullptr) continue;
          for (int64_t dx = 0; dx < kw; ++dx) {
            const int64_t x = pack_source(args.padding, fx * kw + dx, args.width);
            if (x >= 0) total += C(source[x]);
          }
        }
      }
      static_cast<T*>(args.tokens)[pack_token(args, bucket, b, c, ft * kt, fy * kh, fx * kw)] =
          T(total / C(bucket.volume()));
    }
  }
}

template <class T>
void gather(const PackArgs& args) {
  for (int i = 0; i < args.bucket_count; ++i) {
    const PackBucket& bucket = args.buckets[i];
    const int64_t kt = bucket.kernel[0], kh = bucket.kernel[1], kw = bucket.kernel[2];
    const int64_t stride = args.channels * bucket.volume(), rows = args.batch * bucket.grid[0] * bucket.grid[1];
    parallel_for(rows, 1 + kGrain / (1 + stride * bucket.grid[2]), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t plane = row / bucket.grid[1], fy = row - plane * bucket.grid[1];
        const int64_t b = plane / bucket.grid[0], ft = plane - b * bucket.grid[0];
        if (bucket.pooled) {
          pool_row<T>(args, bucket, b, ft, fy);
          continue;
        }
        T* target = static_cast<T*>(args.columns) + bucket.first_column + row * bucket.grid[2] * stride;
        for (int64_t c = 0; c < args.channels; ++c) {
          for (int64_t dt = 0; dt < kt; ++dt) {
            for (int64_t dy = 0; dy < kh; ++dy, target += kw)
              gather_row(args, bucket, latent_row<const T>(args, bucket, b, c, ft * kt + dt, fy * kh + dy), target,
                         stride);
          }
        }
      }
    });
  }
}

// sums += K taps each of tokens that lie `stride` elements apart.
template <int K, class T>
TD_INLINE void add_taps(const T* source, int64_t tokens, int64_t stride, compute_t<T>* sums) {
  for (int64_t i = 0; i < tokens; ++i)
    for (int d = 0; d < K; ++d) sums[i * K + d] += compute_t<T>(source[i * stride + d]);
}

constexpr int64_t kPiece = 256;  // of a row of the gradient: a multiple of the kernels that add_taps is made for

// Adds what one bucket's matrix (or tokens) holds for [first, end) of a row of the latents to `sums`, for padded
// position (t, y). `first` is a multiple of kPiece.
template <class T>
TD_INLINE void collect_row(const PackArgs& args, const PackBucket& bucket, int64_t b, int64_t c, int64_t t, int64_t y,
                           int64_t first, int64_t end, compute_t<T>* sums) {
  using C = compute_t<T>;
  const int64_t kw = bucket.kernel[2], covered = bucket.grid[2] * kw;
  const T* base = bucket.pooled ? static_cast<const T*>(args.tokens) + pack_token(args, bucket, b, c, t, y, 0)
                                : static_cast<const T*>(args.columns) + pack_column(args, bucket, b, c, t, y, 0);
  const int64_t stride = bucket.pooled ? args.token_strides[1] : args.channels * bucket.volume();
  const int64_t step = bucket.pooled ? 0 : 1;
  const C factor = bucket.pooled ? C(1) / C(bucket.volume()) : C(1);
  const int64_t last = end < covered ? end : covered;
  int64_t token = first / kw, tap = first - token * kw, x = first;
  if (!bucket.pooled && last > first && (kw == 1 || kw == 2 || kw == 4 || kw == 8)) {
    const int64_t whole = (last - first) / kw;
    const T* source = base + token * stride;
    if (kw == 1) add_taps<1>(source, whole, stride, sums);
    if (kw == 2) add_taps<2>(source, whole, stride, sums);
    if (kw == 4) add_taps<4>(source, whole, stride, sums);
    if (kw == 8) add_taps<8>(source, whole, stride, sums);
    token += whole;
    x += whole * kw;
  }
  for (; x < last; ++x) {
    sums[x - first] += factor * C(base[token * stride + tap * step]);
    if (++tap == kw) {
      tap = 0;
      ++token;
    }
  }
  if (end == args.width) {
    const PackSpan span = pack_span(args.padding, args.width - 1, args.width, covered);
    for (x = span.first + 1; x < span.end; ++x)
      sums[end - 1 - first] += factor * C(base[(x / kw) * stride + (x % kw) * step]);
  }
}

// Places of a bucket's (padded) list from the first to the last that shows frame t.
TD_INLINE PackSpan frame_places(const PackArgs& args, const PackBucket& bucket, int64_t t) {
  PackSpan span{0, 0};
  for (int64_t place = 0; place < int64_t(bucket.grid[0]) * bucket.kernel[0]; ++place) {
    if (pack_frame(args, bucket, place) != t) continue;
    if (span.end == 0) span.first = place;
    span.end = place + 1;
  }
  return span;
}

// Every element of the gradient is summed by one thread: over buckets, places of its frame, and the padding it was
// copied to.
template <class T>
void scatter(const PackArgs& args) {
  using C = compute_t<T>;
  const int64_t planes = args.batch * args.channels * args.time;
  parallel_for(planes, 1 + kGrain / (1 + args.height * args.width), [&](int64_t begin, int64_t end) {
    C sums[kPiece];
    PackSpan places[kMaxBuckets];
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t channel = plane / args.time, t = plane - channel * args.time;
      const int64_t b = channel / args.channels, c = channel - b * args.channels;
      for (int i = 0; i < args.bucket_count; ++i) places[i] = frame_places(args, args.buckets[i], t);
      for (int64_t h = 0; h < args.height; ++h) {
        T* target = static_cast<T*>(args.latents) + b * args.latent_strides[0] + c * args.latent_strides[1] +
                    t * args.latent_strides[2] + h * args.latent_strides[3];
        for (int64_t first = 0; first < args.width; first += kPiece) {
          const int64_t stop = first + kPiece < args.width ? first + kPiece : args.width;
          for (int64_t x = first; x < stop; ++x) sums[x - first] = C(0);
          for (int i = 0; i < args.bucket_count; ++i) {
            const PackBucket& bucket = args.buckets[i];
            const PackSpan down = pack_span(args.padding, h, args.height, int64_t(bucket.grid[1]) * bucket.kernel[1]);
            for (int64_t place = places[i].first; place < places[i].end; ++place) {
              if (pack_frame(args, bucket, place) != t) continue;
              for (int64_t y = down.first; y < down.end; ++y)
                collect_row<T>(args, bucket, b, c, place, y, first, stop, sums);
            }
          }
          for (int64_t x = first; x < stop; ++x) target[x] = T(sums[x - first]);
        }
      }
    }
  });
}

}  // namespace

void framepack_gather(const PackArgs& args) {
  dispatch_float(args.dtype, [&](auto tag) { gather<typename decltype(tag)::type>(args); });
}

void framepack_scatter(const PackArgs& args) {
  dispatch_float(args.dtype, [&](auto tag) { scatter<typename decltype(tag)::type>(args); });
}

}  // namespace td::TD_ISA
