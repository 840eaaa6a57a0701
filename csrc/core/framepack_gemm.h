// SPDX-License-Identifier: Apache-2.0
// framepack on the GPU: the projection of every bucket and its two gradients are matrix products whose patch matrix is
// never written down. One table of all buckets goes to the kernels by value, so that all of them share a launch.
// The contract is in talkingdit/ops/framepack.py.
#pragma once

#include "core/framepack.h"

namespace td {

// The three products of a bucket with the patches P [M, K] (K = C * kt * kh * kw), the weight W [out, K] and the packed
// tokens Y [M, out]: Y = P W', dP = dY W (which is then collected into the latents), dW = dY' P.
enum class PackProduct : int { project, grad_latents, grad_weights };

// A bucket in the table. Blocks are numbered through all buckets; those of one bucket are ordered by part of the sum,
// column tile and row tile, the last one fastest.
struct PackShare {
  void* weight;  // [out, K], contiguous: read, or its gradient, written; null: a pooled bucket
  void* bias;    // [out] or null: read, or its gradient, written
  int64_t part;  // element of the workspace where its partial sums begin: [splits, rows, columns]
  int32_t first_block, row_tiles, column_tiles;
  int32_t first_token;          // in the packed sequence
  int16_t first_frame, frames;  // its range in the list of frames
  int16_t splits;               // parts that the sum of the product is cut into
  int8_t run;                   // neighbours in a row of the latents that are copied at once
  int8_t weight_vectors;        // 16-byte pieces of the weight's rows are aligned
  FastDiv kernel[3], grid[3];   // (t, h, w): size and stride of a patch, and tokens per axis
  FastDiv tokens;               // of one sample

  TD_HD int64_t patches(int64_t batch) const { return batch * tokens.divisor; }
  TD_HD int64_t volume() const { return int64_t(kernel[0].divisor) * kernel[1].divisor * kernel[2].divisor; }
};

struct PackProductArgs {
  void* latents;    // [B, C, T, H, W]: read, or the gradient, written
  void* tokens;     // [B, S, out] with unit stride on the last axis: written, or the gradient, read
  void* workspace;  // partial sums in the type that is computed in
  int64_t latent_strides[4], token_strides[2];
  int64_t out;
  int32_t batch, channels, time, height, width;
  int32_t bucket_count, token_vectors;  // 16-byte pieces of the tokens are aligned
  PackPadding padding;
  PackProduct product;
  DType dtype;
  PackShare shares[kMaxBuckets];
  int16_t frames[kMaxBucketFrames];
};
static_assert(sizeof(PackProductArgs) <= 4096, "kernel arguments must fit the constant bank of every architecture");

// Sizes of a bucket's product: result [rows, columns], and the length of the sums.
struct PackSizes {
  int64_t rows, columns, length;
};
TD_HD PackSizes pack_sizes(const PackProductArgs& args, const PackShare& share) {
  const int64_t patches = share.patches(args.batch), taps = args.channels * share.volume();
  switch (args.product) {
    case PackProduct::project:
      return {patches, args.out, taps};
    case PackProduct::grad_latents:
      return {patches, taps, args.out};
    default:
      return {args.out, taps, patches};
  }
}

// Elements of the workspace that a bucket needs: partial sums, and those of the gradient of the bias behind them. The
// gradient of the latents always goes through it.
TD_HD int64_t pack_part_size(const PackProductArgs& args, const PackShare& share) {
  const PackSizes sizes = pack_sizes(args, share);
  if (share.weight == nullptr || (share.splits == 1 && args.product != PackProduct::grad_latents)) return 0;
  const int64_t sums = sizes.rows * sizes.columns + (args.product == PackProduct::grad_weights ? args.out : 0);
  return (share.splits * sums + 3) / 4 * 4;
}

// Elements from one row of a bucket's matrix of patches to the next, where it is written down: rows are aligned to 16
// bytes. What lies between the rows is not written.
TD_HD int64_t pack_pitch(const PackProductArgs& args, const PackShare& share) {
  return (args.channels * share.volume() + 7) / 8 * 8;
}

namespace cuda {
void framepack_product(const PackProductArgs& args, Stream stream);
// Writes the patches of all buckets to the workspace, from element `part` on, in the dtype of the latents.
void framepack_patches(const PackProductArgs& args, Stream stream);
}  // namespace cuda

}  // namespace td
