// SPDX-License-Identifier: Apache-2.0
// The patches of every bucket, written down for a product that reads whole matrices (cuda/sm90a). A few megabytes, and
// far less than the weights.
#include <algorithm>

#include "framepack.cuh"

namespace td::cuda {
namespace {

// Copies a run of neighbours along a row of the latents, those beyond its end as the padding says.
template <class T, int kRun>
__device__ __forceinline__ void copy_run(const PackProductArgs& args, const T* row, int32_t x, T* target) {
  struct alignas(kRun * sizeof(T)) Run {
    T v[kRun];
  };
  Run found;
  if (row != nullptr && x + kRun <= args.width) {
    found = *reinterpret_cast<const Run*>(row + x);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int64_t at = row == nullptr ? -1 : pack_source(args.padding, x + i, args.width);
      found.v[i] = at < 0 ? T(0) : row[at];
    }
  }
  *reinterpret_cast<Run*>(target) = found;
}

// A warp takes 32 runs of a patch, neighbours along the taps; runs have the size of the bucket.
template <class T, int kRun>
__device__ __forceinline__ void write_patches(const PackProductArgs& args, const PackShare& share) {
  const int64_t pitch = pack_pitch(args, share);
  const uint32_t runs = uint32_t(args.channels * share.volume()) / kRun, pieces = (runs + 31) / 32;
  const int64_t items = share.patches(args.batch) * pieces;
  T* matrix = static_cast<T*>(args.workspace) + share.part;
  for (int64_t item = int64_t(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32; item < items;
       item += int64_t(gridDim.x) * (kPackThreads / 32)) {
    const int64_t m = item / pieces;
    const uint32_t run = uint32_t(item - m * pieces) * 32 + (threadIdx.x & 31);
    if (run >= runs) continue;
    const Patch<T> patch = patch_of<T>(args, share, m);
    const uint32_t tap = run * kRun, line = share.kernel[2].div(tap), plane = share.kernel[1].div(line);
    const uint32_t c = share.kernel[0].div(plane), dt = plane - c * share.kernel[0].divisor;
    const uint32_t dy = line - plane * share.kernel[1].divisor, dx = tap - line * share.kernel[2].divisor;
    const int32_t frame = frame_at(args, share, patch.t + int32_t(dt));
    const int64_t y = pack_source(args.padding, patch.y + int32_t(dy), args.height);
    const T* row = nullptr;
    if (frame >= 0 && y >= 0) {
      row = patch.sample + c * args.latent_strides[1] + frame * args.latent_strides[2] + y * args.latent_strides[3];
    }
    copy_run<T, kRun>(args, row, patch.x + int32_t(dx), matrix + m * pitch + tap);
  }
}

template <class T>
__global__ void __launch_bounds__(kPackThreads) patches_kernel(const __grid_constant__ PackProductArgs args) {
  for (int which = 0; which < args.bucket_count; ++which) {
    const PackShare& share = args.shares[which];
    if (share.run == 8) {
      if constexpr (sizeof(T) == 2) write_patches<T, 8>(args, share);
    } else if (share.run == 4) {
      if constexpr (sizeof(T) <= 4) write_patches<T, 4>(args, share);
    } else if (share.run == 2) {
      write_patches<T, 2>(args, share);
    } else {
      write_patches<T, 1>(args, share);
    }
  }
}

}  // namespace

void framepack_patches(const PackProductArgs& args, cudaStream_t stream) {
  int64_t warps = 1;
  for (int i = 0; i < args.bucket_count; ++i) {
    const PackShare& share = args.shares[i];
    const int64_t runs = args.channels * share.volume() / share.run;
    warps = std::max(warps, share.patches(args.batch) * ((runs + 31) / 32));
  }
  constexpr int kWarps = kPackThreads / 32;
  const unsigned blocks = unsigned(std::min<int64_t>((warps + kWarps - 1) / kWarps, 65536));
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch("framepack", patches_kernel<T>, blocks, kPackThreads, 0, stream, args);
  });
}

}  // namespace td::cuda
