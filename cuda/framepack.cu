// SPDX-License-Identifier: Apache-2.0
// Gather and scatter of all buckets in one launch each; the multiplications between them are cuBLAS's.
#include "core/framepack.h"
#include "launch.cuh"

namespace td::cuda {
namespace {

constexpr int kThreads = 256;

// Value behind padded position (t, y, x) of channel c.
template <class T>
__device__ __forceinline__ T source_value(const PackArgs& args, const PackBucket& bucket, int64_t b, int64_t c,
                                          int64_t t, int64_t y, int64_t x) {
  const int64_t frame = pack_frame(args, bucket, t);
  const int64_t row = pack_source(args.padding, y, args.height), column = pack_source(args.padding, x, args.width);
  if (frame < 0 || row < 0 || column < 0) return T(0);
  return static_cast<const T*>(args.latents)[b * args.latent_strides[0] + c * args.latent_strides[1] +
                                             frame * args.latent_strides[2] + row * args.latent_strides[3] + column];
}

// A thread per element of the matrices, and per token and channel of pooled buckets.
template <class T>
__global__ void __launch_bounds__(kThreads) gather_kernel(PackArgs args, int64_t total) {
  using C = compute_t<T>;
  for (int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x; item < total;
       item += int64_t(gridDim.x) * kThreads) {
    int64_t i = item;
    for (int which = 0; which < args.bucket_count; ++which) {
      const PackBucket& bucket = args.buckets[which];
      const int64_t taps = bucket.pooled ? 1 : bucket.volume();
      const int64_t elements = args.batch * bucket.tokens() * args.channels * taps;
      if (i >= elements) {
        i -= elements;
        continue;
      }
      // Within one sample 32 bits are enough: a division of 64 bits costs more than the rest.
      const int64_t per_sample = elements / args.batch, b = i / per_sample;
      const uint32_t local = uint32_t(i - b * per_sample), row = local / uint32_t(taps);
      const uint32_t tap = local - row * uint32_t(taps), token = row / uint32_t(args.channels);
      const uint32_t c = row - token * uint32_t(args.channels), plane = token / uint32_t(bucket.grid[2]);
      const uint32_t fx = token - plane * uint32_t(bucket.grid[2]), ft = plane / uint32_t(bucket.grid[1]);
      const uint32_t fy = plane - ft * uint32_t(bucket.grid[1]);
      const int64_t t = int64_t(ft) * bucket.kernel[0], y = int64_t(fy) * bucket.kernel[1];
      const int64_t x = int64_t(fx) * bucket.kernel[2];
      if (bucket.pooled) {
        C sum = C(0);
        for (int dt = 0; dt < bucket.kernel[0]; ++dt)
          for (int dy = 0; dy < bucket.kernel[1]; ++dy)
            for (int dx = 0; dx < bucket.kernel[2]; ++dx)
              sum += C(source_value<T>(args, bucket, b, c, t + dt, y + dy, x + dx));
        static_cast<T*>(args.tokens)[pack_token(args, bucket, b, c, t, y, x)] = T(sum / C(bucket.volume()));
      } else {
        const uint32_t line = tap / uint32_t(bucket.kernel[2]), dx = tap - line * uint32_t(bucket.kernel[2]);
        const uint32_t dt = line / uint32_t(bucket.kernel[1]), dy = line - dt * uint32_t(bucket.kernel[1]);
        static_cast<T*>(args.columns)[bucket.first_column + i] =
            source_value<T>(args, bucket, b, c, t + dt, y + dy, x + dx);
      }
      break;
    }
  }
}

// A thread per element of the gradient of the latents: it adds up everything that was made of the element.
template <class T>
__global__ void __launch_bounds__(kThreads) scatter_kernel(PackArgs args, int64_t total) {
  using C = compute_t<T>;
  for (int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x; item < total;
       item += int64_t(gridDim.x) * kThreads) {
    const int64_t w = item % args.width, h = (item / args.width) % args.height;
    int64_t rest = item / (args.width * args.height);
    const int64_t t = rest % args.time;
    rest /= args.time;
    const int64_t c = rest % args.channels, b = rest / args.channels;
    C sum = C(0);
    for (int which = 0; which < args.bucket_count; ++which) {
      const PackBucket& bucket = args.buckets[which];
      const PackSpan down = pack_span(args.padding, h, args.height, int64_t(bucket.grid[1]) * bucket.kernel[1]);
      const PackSpan across = pack_span(args.padding, w, args.width, int64_t(bucket.grid[2]) * bucket.kernel[2]);
      const int64_t places = int64_t(bucket.grid[0]) * bucket.kernel[0];
      for (int64_t place = 0; place < places; ++place) {
        if (pack_frame(args, bucket, place) != t) continue;
        for (int64_t y = down.first; y < down.end; ++y) {
          for (int64_t x = across.first; x < across.end; ++x) {
            sum += bucket.pooled ? C(static_cast<const T*>(args.tokens)[pack_token(args, bucket, b, c, place, y, x)]) /
                                       C(bucket.volume())
                                 : C(static_cast<const T*>(args.columns)[pack_column(args, bucket, b, c, place, y, x)]);
          }
        }
      }
    }
    static_cast<T*>(args.latents)[b * args.latent_strides[0] + c * args.latent_strides[1] + t * args.latent_strides[2] +
                                  h * args.latent_strides[3] + w] = T(sum);
  }
}

unsigned blocks_for(int64_t total) {
  const int64_t blocks = (total + kThreads - 1) / kThreads;
  return unsigned(blocks < 1048576 ? blocks : 1048576);
}

}  // namespace

void framepack_gather(const PackArgs& args, cudaStream_t stream) {
  int64_t total = 0;
  for (int i = 0; i < args.bucket_count; ++i) {
    const PackBucket& bucket = args.buckets[i];
    total += args.batch * bucket.tokens() * args.channels * (bucket.pooled ? 1 : bucket.volume());
  }
  if (total == 0) return;
  dispatch_float(args.dtype, [&](auto tag) {
    launch("framepack_gather", gather_kernel<typename decltype(tag)::type>, blocks_for(total), kThreads, 0, stream,
           args, total);
  });
}

void framepack_scatter(const PackArgs& args, cudaStream_t stream) {
  const int64_t total = args.batch * args.channels * args.time * args.height * args.width;
  if (total == 0) return;
  dispatch_float(args.dtype, [&](auto tag) {
    launch("framepack_scatter", scatter_kernel<typename decltype(tag)::type>, blocks_for(total), kThreads, 0, stream,
           args, total);
  });
}

}  // namespace td::cuda
