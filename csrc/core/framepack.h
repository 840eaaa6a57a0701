// SPDX-License-Identifier: Apache-2.0
// Patches of a latent history at several scales. Gathering makes the matrices that are multiplied with the projection
// weights, [samples * tokens, C * kt * kh * kw] per bucket, one behind the other, or averages patches to tokens;
// scattering is the transpose. The contract is in talkingdit/ops/framepack.py.
#pragma once

#include "core/kernel.h"

namespace td {

constexpr int kMaxBuckets = 16;
constexpr int kMaxBucketFrames = 512;  // listed frames of all buckets together

enum class PackPadding : int { none, zero, replicate };

struct PackBucket {
  int32_t first_frame, frames;  // its range in PackArgs::frames
  int32_t kernel[3];            // (t, h, w), also the stride
  int32_t grid[3];              // tokens per axis
  int32_t pooled;               // average instead of patches; results go to `tokens`
  int64_t first_token;          // in the packed sequence
  int64_t first_column;         // in `columns`: where the matrix of the bucket begins

  TD_HD int64_t tokens() const { return int64_t(grid[0]) * grid[1] * grid[2]; }
  TD_HD int64_t volume() const { return int64_t(kernel[0]) * kernel[1] * kernel[2]; }
};

struct PackArgs {
  void* latents;  // [B, C, T, H, W]: read when gathering; the gradient, written, when scattering
  void* columns;  // the matrices of the buckets, contiguous
  void* tokens;   // [B, S, out] with unit stride on the last axis: pooled buckets are written to (read from) it
  int64_t latent_strides[4], token_strides[2];
  int64_t batch, channels, time, height, width;
  PackBucket buckets[kMaxBuckets];
  int32_t frames[kMaxBucketFrames];
  int bucket_count;
  PackPadding padding;
  DType dtype;
};
static_assert(sizeof(PackArgs) <= 4096, "kernel arguments must fit the constant bank of every architecture");

// Source index of position i along an axis of `size`; -1: a zero.
TD_HD int64_t pack_source(PackPadding padding, int64_t i, int64_t size) {
  if (i < size) return i;
  return padding == PackPadding::replicate ? size - 1 : -1;
}

// Frame of the latents at place i of the bucket's (padded) list; -1: a zero frame.
TD_HD int64_t pack_frame(const PackArgs& args, const PackBucket& bucket, int64_t i) {
  const int64_t place = pack_source(args.padding, i, bucket.frames);
  return place < 0 ? -1 : args.frames[bucket.first_frame + place];
}

// Padded positions of an axis that show source index i: [first, end). They are i alone, and for the last index all
// padding.
struct PackSpan {
  int64_t first, end;
};
TD_HD PackSpan pack_span(PackPadding padding, int64_t i, int64_t size, int64_t covered) {
  PackSpan span{i, i + 1};
  if (padding == PackPadding::replicate && i == size - 1 && covered > size) span.end = covered;
  if (span.end > covered) span.end = covered;
  return span;
}

// Element of a bucket's matrix for channel c and padded position (t, y, x), of sample b.
TD_HD int64_t pack_column(const PackArgs& args, const PackBucket& bucket, int64_t b, int64_t c, int64_t t, int64_t y,
                          int64_t x) {
  // Positions fit 32 bits, which the device divides much faster.
  const int64_t ft = uint32_t(t) / uint32_t(bucket.kernel[0]), fy = uint32_t(y) / uint32_t(bucket.kernel[1]);
  const int64_t fx = uint32_t(x) / uint32_t(bucket.kernel[2]);
  const int64_t dt = t - ft * bucket.kernel[0], dy = y - fy * bucket.kernel[1], dx = x - fx * bucket.kernel[2];
  const int64_t token = ((b * bucket.grid[0] + ft) * bucket.grid[1] + fy) * bucket.grid[2] + fx;
  const int64_t tap = ((c * bucket.kernel[0] + dt) * bucket.kernel[1] + dy) * bucket.kernel[2] + dx;
  return bucket.first_column + token * args.channels * bucket.volume() + tap;
}

// Element of the packed tokens for channel c and padded position (t, y, x) of a pooled bucket.
TD_HD int64_t pack_token(const PackArgs& args, const PackBucket& bucket, int64_t b, int64_t c, int64_t t, int64_t y,
                         int64_t x) {
  const int64_t token =
      ((t / bucket.kernel[0]) * bucket.grid[1] + y / bucket.kernel[1]) * bucket.grid[2] + x / bucket.kernel[2];
  return b * args.token_strides[0] + (bucket.first_token + token) * args.token_strides[1] + c;
}

TD_DECLARE_KERNEL(framepack_gather, const PackArgs&)
TD_DECLARE_KERNEL(framepack_scatter, const PackArgs&)

}  // namespace td
