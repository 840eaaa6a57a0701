// SPDX-License-Identifier: Apache-2.0
#include "rope_row.cuh"

namespace td::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int unroll(bool interleaved) {  // four loads of a lane are in flight
  return interleaved ? 4 : 2;
}
constexpr int64_t kMaxBlocks = 1 << 20;

// Warps of a block share the heads of a token. A lane has the same channels in all heads that it comes to: it reads
// its rotation once, after the first heads are on their way. A head wider than 32 units is taken in pieces.
template <class T, bool Interleaved>
__global__ void __launch_bounds__(kThreads) rope3d_kernel(const __grid_constant__ RopeArgs args, RowWarps row) {
  using U = Unit<T, kFullVector<T>, Interleaved>;
  using C = compute_t<T>;
  constexpr int kUnroll = unroll(Interleaved);
  const int warp = int(threadIdx.x) >> 5, token = warp / row.warps, part = warp - token * row.warps;
  const int64_t n = int64_t(blockIdx.x) * row.tokens + token, b = blockIdx.y;
  if (n >= args.tokens) return;
  const Lane lane(args.dim / U::kChannels);
  const int step = lane.heads * kUnroll, heads = lane.head < lane.heads ? int(args.heads) : 0;
  const T* x = rope_head<const T>(args.x, args.x_strides, b, n, 0);
  T* out = rope_head<T>(args.out, args.out_strides, b, n, 0);
  for (int slot = lane.slot; slot < lane.slots; slot += 32) {
    Rotation<C, U::kPairs> rotation;
    bool rotation_loaded = false;
    for (int first = part * step; first < int(args.heads); first += row.warps * step) {
      U units[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int h = first + i * lane.heads + lane.head;
        if (h < heads) units[i].load(x + h * args.x_strides[2], slot, args.dim);
      }
      if (!rotation_loaded) {
        rotation.load(args, RopeCursor(args.segments, args.segment_count, args.token_offset + n), slot);
      }
      rotation_loaded = true;
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int h = first + i * lane.heads + lane.head;
        if (h >= heads) continue;
        C values[U::kChannels];
#pragma unroll
        for (int j = 0; j < U::kChannels; ++j) values[j] = units[i].get(j);
        rotation.apply(values);
        units[i].set(values);
        units[i].store(out + h * args.out_strides[2], slot, args.dim);
      }
    }
  }
}

// Any head dim and any alignment: one block per token, whose rotation goes to shared memory.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) scalar_kernel(const __grid_constant__ RopeArgs args) {
  using C = compute_t<T>;
  const int half = args.dim / 2, lane = int(threadIdx.x) & 31;
  C *cos_row = reinterpret_cast<C*>(dynamic_shared()), *sin_row = cos_row + half;
  for (int64_t n = blockIdx.x; n < args.tokens; n += gridDim.x) {
    load_rotation(args, n, cos_row, sin_row);
    const int64_t b = blockIdx.y;
    for (int64_t h = int(threadIdx.x) >> 5; h < args.heads; h += kThreads / 32) {
      const T* x = rope_head<const T>(args.x, args.x_strides, b, n, h);
      T* out = rope_head<T>(args.out, args.out_strides, b, n, h);
      for (int p = lane; p < half; p += 32) {
        const int i = pair_first(args, p), j = pair_second(args, p);
        const C u = C(x[i]), v = C(x[j]), c = cos_row[p], s = sin_row[p];
        out[i] = T(u * c - v * s);
        out[j] = T(v * c + u * s);
      }
    }
    __syncthreads();
  }
}

}  // namespace

void rope3d(const RopeArgs& args, cudaStream_t stream) {
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!whole_vectors<T>(args)) {
      const dim3 blocks(unsigned(args.tokens < kMaxBlocks ? args.tokens : kMaxBlocks), unsigned(args.batch));
      launch("rope3d", scalar_kernel<T>, blocks, kThreads, size_t(args.dim) * sizeof(compute_t<T>), stream, args);
      return;
    }
    const int slots = args.dim / kFullVector<T> / (args.interleaved ? 1 : 2);
    const RowWarps row(args.heads, (slots < 32 ? 32 / slots : 1) * unroll(args.interleaved));
    const dim3 blocks(unsigned((args.tokens + row.tokens - 1) / row.tokens), unsigned(args.batch));
    if (args.interleaved) {
      launch("rope3d", rope3d_kernel<T, true>, blocks, row.threads(), 0, stream, args, row);
    } else {
      launch("rope3d", rope3d_kernel<T, false>, blocks, row.threads(), 0, stream, args, row);
    }
  });
}

}  // namespace td::cuda
