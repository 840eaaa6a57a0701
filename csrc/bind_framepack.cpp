// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "core/framepack.h"

// Patches as matrices, on the CPU; GPUs have bind_framepack_gemm.cpp.
#if !defined(TD_EMULATE)
namespace td {
namespace {

// kernels, grids: three numbers per bucket. A bucket is pooled where pooled[i] is true.
PackArgs make_args(const char* op, const TensorView& latents, const TensorView& columns, const TensorView& tokens,
                   const std::vector<int64_t>& frames, const std::vector<int64_t>& counts,
                   const std::vector<int64_t>& kernels, const std::vector<int64_t>& grids,
                   const std::vector<bool>& pooled, int64_t padding) {
  check_view(latents, 5, op, "latents");
  check_view(columns, 1, op, "columns");
  check_view(tokens, 3, op, "tokens");
  check(columns.dtype == latents.dtype && tokens.dtype == latents.dtype, op, ": all tensors must have one dtype");
  check(!latents.is_cuda, op, ": latents must be on the CPU");
  check_same_device(latents, columns, op, "columns");
  check_same_device(latents, tokens, op, "tokens");
  const size_t count = counts.size();
  check(count <= size_t(kMaxBuckets) && kernels.size() == 3 * count && grids.size() == 3 * count &&
            pooled.size() == count && frames.size() <= size_t(kMaxBucketFrames),
        op, ": at most ", kMaxBuckets, " buckets of ", kMaxBucketFrames, " frames together");
  check(padding >= 0 && padding <= 2, op, ": unknown padding");
  PackArgs args{};
  args.latents = latents.data;
  args.columns = columns.data;
  args.tokens = tokens.data;
  for (int i = 0; i < 4; ++i) args.latent_strides[i] = latents.strides[i];
  for (int i = 0; i < 2; ++i) args.token_strides[i] = tokens.strides[i];
  args.batch = latents.shape[0];
  args.channels = latents.shape[1];
  args.time = latents.shape[2];
  args.height = latents.shape[3];
  args.width = latents.shape[4];
  args.padding = PackPadding(padding);
  args.bucket_count = int(count);
  args.dtype = latents.dtype;
  for (size_t i = 0; i < frames.size(); ++i) {
    check(frames[i] >= 0 && frames[i] < args.time, op, ": a frame is out of range");
    args.frames[i] = int32_t(frames[i]);
  }
  int64_t first_frame = 0, first_token = 0, first_column = 0;
  const int64_t sizes[3] = {0, args.height, args.width};
  for (size_t i = 0; i < count; ++i) {
    PackBucket& bucket = args.buckets[i];
    bucket.first_frame = int32_t(first_frame);
    bucket.frames = int32_t(counts[i]);
    bucket.pooled = pooled[i];
    bucket.first_token = first_token;
    bucket.first_column = first_column;
    check(counts[i] > 0, op, ": a bucket without frames");
    for (int axis = 0; axis < 3; ++axis) {
      bucket.kernel[axis] = int32_t(kernels[3 * i + axis]);
      bucket.grid[axis] = int32_t(grids[3 * i + axis]);
      const int64_t size = axis == 0 ? counts[i] : sizes[axis];
      check(bucket.kernel[axis] > 0 && bucket.grid[axis] >= 0, op, ": a kernel or grid is out of range");
      check(args.padding != PackPadding::none || int64_t(bucket.grid[axis]) * bucket.kernel[axis] <= size, op,
            ": a grid is larger than the latents");
    }
    check(args.channels * bucket.tokens() * bucket.volume() < (int64_t(1) << 32), op, ": a bucket is too large");
    check(!pooled[i] || tokens.shape[2] == args.channels, op, ": pooled tokens must have the channels of the latents");
    first_frame += counts[i];
    first_token += bucket.tokens();
    if (!pooled[i]) first_column += args.batch * bucket.tokens() * args.channels * bucket.volume();
  }
  check(first_frame <= int64_t(frames.size()), op, ": fewer frames than counts say");
  check(columns.numel() >= first_column, op, ": columns must have ", first_column, " elements");
  check(tokens.shape[0] == args.batch && tokens.shape[1] == first_token, op, ": tokens must be [B, S, out]");
  return args;
}

using Numbers = std::vector<int64_t>;

void gather(const TensorView& latents, const TensorView& columns, const TensorView& tokens, const Numbers& frames,
            const Numbers& counts, const Numbers& kernels, const Numbers& grids, const std::vector<bool>& pooled,
            int64_t padding) {
  const PackArgs args =
      make_args("framepack_gather", latents, columns, tokens, frames, counts, kernels, grids, pooled, padding);
  check(latents.numel() > 0, "framepack_gather: latents must not be empty");
  TD_CALL_CPU(framepack_gather, args);
}

void scatter(const TensorView& latents, const TensorView& columns, const TensorView& tokens, const Numbers& frames,
             const Numbers& counts, const Numbers& kernels, const Numbers& grids, const std::vector<bool>& pooled,
             int64_t padding) {
  const PackArgs args =
      make_args("framepack_scatter", latents, columns, tokens, frames, counts, kernels, grids, pooled, padding);
  check(latents.numel() > 0, "framepack_scatter: latents must not be empty");
  TD_CALL_CPU(framepack_scatter, args);
}

}  // namespace

TD_BINDINGS(framepack) {
  m.def("framepack_gather", &gather);
  m.def("framepack_scatter", &scatter);
}

}  // namespace td
#endif
