// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "core/framepack_gemm.h"

namespace td {
namespace {

using Numbers = std::vector<int64_t>;
using Views = std::vector<TensorView>;

constexpr const char* kOp = "framepack_product";
constexpr int64_t kMost = int64_t(1) << 31;  // what FastDiv and 32-bit counters can hold

bool aligned(const TensorView& view, int64_t bytes, int strides) {
  bool yes = reinterpret_cast<uintptr_t>(view.data) % uintptr_t(bytes) == 0;
  for (int i = 0; i < strides; ++i) yes = yes && view.strides[i] * item_size(view.dtype) % bytes == 0;
  return yes;
}

// Neighbours of the latents that one asynchronous copy may take: a power of two that divides the patches' width.
int8_t run_of(const TensorView& latents, int64_t width) {
  int64_t run = 16 / item_size(latents.dtype);
  while (run > 1 && (width % run != 0 || !aligned(latents, run * item_size(latents.dtype), 4))) run /= 2;
  return int8_t(run);
}

void check_weights(const PackProductArgs& args, const TensorView& latents, const TensorView& weight,
                   const TensorView& bias, int64_t taps) {
  check(weight.dtype == latents.dtype && weight.ndim == 5 && weight.shape[0] == args.out &&
            weight.numel() == args.out * taps,
        kOp, ": a weight does not fit its bucket");
  int64_t packed = 1;
  for (int i = 4; i >= 0; --i) {
    check(weight.shape[i] <= 1 || weight.strides[i] == packed, kOp, ": weights must be contiguous");
    packed *= weight.shape[i];
  }
  check_same_device(latents, weight, kOp, "a weight");
  check(bias.dtype == latents.dtype && bias.ndim == 1 && (bias.numel() == 0 || bias.numel() == args.out), kOp,
        ": a bias does not fit its bucket");
  check_view(bias, 1, kOp, "a bias");
  check_same_device(latents, bias, kOp, "a bias");
}

// The table of buckets without weights; kernels, grids: three numbers per bucket. Buckets without tokens are left out:
// places[i] is where bucket i is among the shares, or -1.
PackProductArgs make_args(const TensorView& latents, const Numbers& frames, const Numbers& counts,
                          const Numbers& kernels, const Numbers& grids, int64_t padding, std::vector<int>& places) {
  check_view(latents, 5, kOp, "latents");
  check(latents.is_cuda, kOp, ": latents must be on a GPU");
  const size_t count = counts.size();
  check(count <= size_t(kMaxBuckets) && kernels.size() == 3 * count && grids.size() == 3 * count &&
            frames.size() <= size_t(kMaxBucketFrames),
        kOp, ": at most ", kMaxBuckets, " buckets of ", kMaxBucketFrames, " frames together");
  check(padding >= 0 && padding <= 2, kOp, ": unknown padding");
  for (int i = 0; i < 5; ++i) check(latents.shape[i] < kMost, kOp, ": latents are too large");
  check(latents.numel() > 0 && latents.numel() / latents.shape[4] < kMost && latents.shape[2] < 32768, kOp,
        ": latents must not be empty, of less than 2^31 rows and 2^15 frames");

  PackProductArgs args{};
  args.latents = latents.data;
  for (int i = 0; i < 4; ++i) args.latent_strides[i] = latents.strides[i];
  args.batch = int32_t(latents.shape[0]);
  args.channels = int32_t(latents.shape[1]);
  args.time = int32_t(latents.shape[2]);
  args.height = int32_t(latents.shape[3]);
  args.width = int32_t(latents.shape[4]);
  args.padding = PackPadding(padding);
  args.dtype = latents.dtype;
  for (size_t i = 0; i < frames.size(); ++i) {
    check(frames[i] >= 0 && frames[i] < args.time, kOp, ": a frame is out of range");
    args.frames[i] = int16_t(frames[i]);
  }
  int64_t first_frame = 0, first_token = 0;
  for (size_t i = 0; i < count; ++i) {
    PackShare& share = args.shares[args.bucket_count];
    share = PackShare{};
    share.first_frame = int16_t(first_frame);
    share.frames = int16_t(counts[i]);
    share.first_token = int32_t(first_token);
    share.splits = 1;
    check(counts[i] > 0 && (first_frame += counts[i]) <= int64_t(frames.size()), kOp, ": fewer frames than counts say");
    const int64_t sizes[3] = {counts[i], args.height, args.width};
    int64_t volume = 1, patches = 1;
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t kernel = kernels[3 * i + size_t(axis)], grid = grids[3 * i + size_t(axis)];
      check(kernel > 0 && kernel < kMost && grid >= 0 && grid * kernel < kMost, kOp,
            ": a kernel or grid is out of range");
      check(args.padding != PackPadding::none || grid * kernel <= sizes[axis], kOp,
            ": a grid is larger than the latents");
      volume *= kernel;
      patches *= grid;
      check(volume * args.channels < kMost && patches * args.batch < kMost, kOp, ": a bucket is too large");
      share.kernel[axis] = FastDiv(uint32_t(kernel));
      share.grid[axis] = FastDiv(uint32_t(grid > 0 ? grid : 1));
    }
    places.push_back(patches == 0 ? -1 : args.bucket_count);
    if (patches == 0) continue;  // no tokens, and a gradient of zero, which the caller writes
    share.tokens = FastDiv(uint32_t(patches));
    first_token += patches;
    check(first_token < kMost, kOp, ": there are too many tokens");
    ++args.bucket_count;
    share.run = run_of(latents, share.kernel[2].divisor);
  }
  return args;
}

// splits: one per bucket. The weight of a pooled bucket is empty. product: PackProduct.
void product(int64_t product, const TensorView& latents, const Views& weights, const Views& biases,
             const TensorView& tokens, const TensorView& workspace, const Numbers& frames, const Numbers& counts,
             const Numbers& kernels, const Numbers& grids, const Numbers& splits, int64_t padding) {
  std::vector<int> places;
  PackProductArgs args = make_args(latents, frames, counts, kernels, grids, padding, places);
  check_view(tokens, 3, kOp, "tokens");
  check_view(workspace, 1, kOp, "workspace");
  check(tokens.dtype == latents.dtype, kOp, ": all tensors must have one dtype");
  check_same_device(latents, tokens, kOp, "tokens");
  check_same_device(latents, workspace, kOp, "workspace");
  check(workspace.dtype == (latents.dtype == DType::float64 ? DType::float64 : DType::float32) &&
            aligned(workspace, 16, 0),
        kOp, ": workspace must be of the type that is computed in, aligned to 16 bytes");
  const size_t count = counts.size();
  check(splits.size() == count && weights.size() == count && biases.size() == count, kOp,
        ": every bucket needs splits, a weight and a bias");
  check(product >= 0 && product <= 2, kOp, ": unknown product");
  args.product = PackProduct(product);
  args.tokens = tokens.data;
  args.workspace = workspace.data;
  for (int i = 0; i < 2; ++i) args.token_strides[i] = tokens.strides[i];
  args.out = tokens.shape[2];
  args.token_vectors = aligned(tokens, 16, 2);
  int64_t count_of_tokens = 0, elements = 0;
  for (size_t i = 0; i < count; ++i) {
    if (places[i] < 0) continue;
    PackShare& share = args.shares[places[i]];
    count_of_tokens += share.tokens.divisor;
    if (weights[i].numel() == 0) {
      check(args.out == args.channels, kOp, ": pooled tokens must have the channels of the latents");
      continue;
    }
    check_weights(args, latents, weights[i], biases[i], share.volume() * args.channels);
    share.weight = weights[i].data;
    share.bias = biases[i].numel() == 0 ? nullptr : biases[i].data;
    share.weight_vectors = aligned(weights[i], 16, 1);
    check(splits[i] >= 1 && splits[i] < 32768, kOp, ": splits must be from 1 to 32767");
    share.splits = int16_t(splits[i]);
    elements += pack_part_size(args, share);
  }
  check(tokens.shape[0] == args.batch && tokens.shape[1] == count_of_tokens, kOp, ": tokens must be [B, S, out]");
  check(workspace.numel() >= elements, kOp, ": workspace must have ", elements, " elements");
  TD_CALL_CUDA(framepack_product, latents, args);
}

// Writes the patches of all buckets, one matrix [B * tokens, pitch] behind the other: pack_pitch has the pitch.
void patches(const TensorView& latents, const TensorView& matrices, const Numbers& frames, const Numbers& counts,
             const Numbers& kernels, const Numbers& grids, int64_t padding) {
  std::vector<int> places;
  PackProductArgs args = make_args(latents, frames, counts, kernels, grids, padding, places);
  check_view(matrices, 1, kOp, "matrices");
  check_same_device(latents, matrices, kOp, "matrices");
  check(matrices.dtype == latents.dtype && aligned(matrices, 16, 0), kOp,
        ": matrices must have the dtype of latents, aligned to 16 bytes");
  int64_t elements = 0;
  for (int i = 0; i < args.bucket_count; ++i) {
    args.shares[i].part = elements;
    elements += args.shares[i].patches(args.batch) * pack_pitch(args, args.shares[i]);
  }
  check(matrices.numel() >= elements, kOp, ": matrices must have ", elements, " elements");
  args.workspace = matrices.data;
  TD_CALL_CUDA(framepack_patches, latents, args);
}

}  // namespace

TD_BINDINGS(framepack_gemm) {
  m.def("framepack_product", &product);
  m.def("framepack_patches", &patches);
}

}  // namespace td
