// SPDX-License-Identifier: Apache-2.0
#include "core/window_fusion.h"
#include "launch.cuh"

namespace td::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 64;  // terms held in shared memory at a time

template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack {
  T value[V];
};

// Where a thread works in a tile: V elements from (row, col) of a plane of channel c.
struct Place {
  uint32_t c, row, col;
  bool inside;

  __device__ __forceinline__ Place(const WindowArgs& args, uint32_t tile, uint32_t tiles, int vector) {
    c = tile / tiles;
    const uint32_t at = ((tile - c * tiles) * kThreads + threadIdx.x) * uint32_t(vector), cols = uint32_t(args.cols);
    row = at / cols;
    col = at - row * cols;
    inside = row < args.rows;
  }
};

// What a block knows about its frame: places of the frame in the predictions, with their gains.
template <class C>
struct Terms {
  double sums[32];
  int64_t offset[kChunk][kMaxPredictions];
  C gain[kChunk][kMaxPredictions];
  int counts[kChunk / 32];
};

// How often a window can come round to a frame, and slots to look at: that many per window.
__device__ __forceinline__ uint32_t window_rounds(const WindowArgs& args) {
  return uint32_t(args.frames + args.length - 1) / uint32_t(args.length);
}

// What the weights of frame `l` add up to and, with it, the gain of x. Every thread gets both; the order is fixed.
__device__ __forceinline__ void frame_sums(const WindowArgs& args, int64_t l, double* shared, double& total,
                                           double& x_gain) {
  const uint32_t rounds = window_rounds(args), slots = uint32_t(args.windows) * rounds;
  double sums[2] = {};
  for (uint32_t t = threadIdx.x; t < slots; t += kThreads) {
    const uint32_t i = t / rounds;
    const int64_t j = window_slot(args.starts[i], l, args.length) + (t - i * rounds) * args.length;
    if (j < args.frames) {
      const double weight = args.weights[i * args.frames + j];
      sums[0] += weight;
      sums[1] += weight * window_x_coefficient(args, i);
    }
  }
  block_sums(sums, shared);
  total = sums[0];
  x_gain = args.x ? window_gain(sums[1], total) : 0.0;
}

// Fills the terms with slots [first, first + kChunk) that lie in their window (All) and have a weight (not All), in
// order, and returns their number.
template <bool All, class C>
__device__ __forceinline__ int stage(const WindowArgs& args, int64_t l, uint32_t first, double total, Terms<C>& terms) {
  const uint32_t rounds = window_rounds(args), slots = uint32_t(args.windows) * rounds, t = first + threadIdx.x;
  int64_t j = 0;
  uint32_t i = 0, before = 0;
  double weight = 0.0;
  bool listed = false;
  __syncthreads();
  if (threadIdx.x < kChunk) {
    if (t < slots) {
      i = t / rounds;
      j = window_slot(args.starts[i], l, args.length) + (t - i * rounds) * args.length;
      if (j < args.frames) weight = args.weights[i * args.frames + j];
      listed = j < args.frames && (All || weight != 0.0);
    }
    const uint32_t votes = __ballot_sync(0xffffffffu, listed), lane = threadIdx.x & 31;
    before = uint32_t(__popc(votes & ((1u << lane) - 1)));
    if (lane == 0) terms.counts[threadIdx.x >> 5] = __popc(votes);
  }
  __syncthreads();
  if (listed) {
    const uint32_t place = before + (threadIdx.x < 32 ? 0 : uint32_t(terms.counts[0]));
    const double share = window_gain(weight, total);
#pragma unroll 1
    for (int k = 0; k < args.prediction_count; ++k) {
      terms.offset[place][k] = i * args.prediction_strides[k][0] + j * args.prediction_strides[k][2];
      terms.gain[place][k] = C(share * window_coefficient(args, i, k));
    }
  }
  __syncthreads();
  return terms.counts[0] + terms.counts[1];
}

// A block computes one frame in tiles of V * kThreads elements: gridDim.x blocks take turns.
template <class X, class P, int V>
__global__ void __launch_bounds__(kThreads, 1) fuse_kernel(WindowArgs args, uint32_t tiles) {
  using C = compute_t<X>;
  auto& terms = *reinterpret_cast<Terms<C>*>(dynamic_shared());
  const uint32_t l = blockIdx.y, slots = uint32_t(args.windows) * window_rounds(args), count = args.channels * tiles;
  double total, x_gain;
  frame_sums(args, l, terms.sums, total, x_gain);
  int listed = stage<false>(args, l, 0, total, terms);
  for (uint32_t tile = blockIdx.x; tile < count; tile += gridDim.x) {
    const Place at(args, tile, tiles, V);
    C sum[V] = {};
    if (args.x && at.inside) {
      const X* x = static_cast<const X*>(args.x) + at.c * args.x_strides[0] + l * args.x_strides[1];
      const auto pack = *reinterpret_cast<const Pack<X, V>*>(x + at.row * args.x_strides[2] + at.col);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] = C(x_gain) * C(pack.value[v]);
    }
    for (uint32_t first = 0; first < slots; first += kChunk) {
      if (slots > kChunk) listed = stage<false>(args, l, first, total, terms);
      if (!at.inside) continue;
#pragma unroll 2
      for (int n = 0; n < listed; ++n) {
#pragma unroll
        for (int k = 0; k < kMaxPredictions; ++k) {
          if (k >= args.prediction_count) break;
          const P* source = static_cast<const P*>(args.predictions[k]) + terms.offset[n][k] +
                            at.c * args.prediction_strides[k][1] + at.row * args.prediction_strides[k][3] + at.col;
          const auto pack = *reinterpret_cast<const Pack<P, V>*>(source);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += terms.gain[n][k] * C(pack.value[v]);
        }
      }
    }
    if (!at.inside) continue;
    Pack<X, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.value[v] = X(sum[v]);
    X* out = static_cast<X*>(args.out) + at.c * args.out_strides[0] + l * args.out_strides[1];
    *reinterpret_cast<Pack<X, V>*>(out + at.row * args.out_strides[2] + at.col) = pack;
  }
}

// Stores gain * grad; zeros where there is no gain, whatever the gradient.
template <class X, class T, int V>
__device__ __forceinline__ void scale_store(const Pack<X, V>& grad, compute_t<X> gain, T* target) {
  using C = compute_t<X>;
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.value[v] = T(gain != C(0) ? gain * C(grad.value[v]) : C(0));
  *reinterpret_cast<Pack<T, V>*>(target) = pack;
}

// The same blocks with the roles exchanged: the gradient of a frame is read once and goes to every place it came from.
// Every slot of every window lies under exactly one frame, so all of the gradients are written.
template <class X, class P, int V>
__global__ void __launch_bounds__(kThreads, 1) spread_kernel(WindowArgs args, uint32_t tiles) {
  using C = compute_t<X>;
  auto& terms = *reinterpret_cast<Terms<C>*>(dynamic_shared());
  const uint32_t l = blockIdx.y, count = args.channels * tiles;
  const uint32_t slots = args.predictions[0] ? uint32_t(args.windows) * window_rounds(args) : 0;
  double total, x_gain;
  frame_sums(args, l, terms.sums, total, x_gain);
  int listed = slots > 0 ? stage<true>(args, l, 0, total, terms) : 0;
  for (uint32_t tile = blockIdx.x; tile < count; tile += gridDim.x) {
    const Place at(args, tile, tiles, V);
    Pack<X, V> grad;
    if (at.inside) {
      const X* source = static_cast<const X*>(args.out) + at.c * args.out_strides[0] + l * args.out_strides[1];
      grad = *reinterpret_cast<const Pack<X, V>*>(source + at.row * args.out_strides[2] + at.col);
      if (args.x) {
        X* target = static_cast<X*>(args.x) + at.c * args.x_strides[0] + l * args.x_strides[1];
        scale_store<X, X, V>(grad, C(x_gain), target + at.row * args.x_strides[2] + at.col);
      }
    }
    for (uint32_t first = 0; first < slots; first += kChunk) {
      if (slots > kChunk) listed = stage<true>(args, l, first, total, terms);
      if (!at.inside) continue;
      for (int n = 0; n < listed; ++n) {
#pragma unroll
        for (int k = 0; k < kMaxPredictions; ++k) {
          if (k >= args.prediction_count) break;
          P* target = static_cast<P*>(args.predictions[k]) + terms.offset[n][k] + at.c * args.prediction_strides[k][1] +
                      at.row * args.prediction_strides[k][3] + at.col;
          scale_store<X, P, V>(grad, terms.gain[n][k], target);
        }
      }
    }
  }
}

bool aligned(const void* data, const int64_t* strides, int count, int64_t item, int vector) {
  uint64_t bytes = reinterpret_cast<uint64_t>(data);
  for (int i = 0; i < count; ++i) bytes |= uint64_t(strides[i] * item);
  const uint64_t width = uint64_t(item) * uint64_t(vector);
  return bytes % (width < 16 ? width : 16) == 0;
}

bool can_vectorise(const WindowArgs& args, int vector) {
  const int64_t item = item_size(args.dtype);
  bool ok = args.cols % vector == 0 && aligned(args.out, args.out_strides, 3, item, vector);
  if (args.x) ok = ok && aligned(args.x, args.x_strides, 3, item, vector);
  for (int k = 0; k < args.prediction_count && args.predictions[k]; ++k) {
    ok = ok && aligned(args.predictions[k], args.prediction_strides[k], 4, item_size(args.prediction_dtype), vector);
  }
  return ok;
}

// Every frame gets as many blocks as it takes to fill the device a few times over.
template <class C, class Kernel>
void launch_frames(const char* op, Kernel kernel, const WindowArgs& args, int vector, cudaStream_t stream) {
  const int64_t per_tile = int64_t(kThreads) * vector, tiles = (args.rows * args.cols + per_tile - 1) / per_tile;
  const int64_t count = args.channels * tiles, turns = 4;
  if (count > INT32_MAX) throw std::invalid_argument(std::string(op) + ": a frame is too large for one launch on CUDA");
  const int64_t blocks = resident_blocks(op, kernel, kThreads, sizeof(Terms<C>), INT32_MAX) * turns;
  const int64_t share = (blocks + args.length - 1) / args.length;
  launch(op, kernel, dim3(unsigned(share < count ? share : count), unsigned(args.length)), kThreads, sizeof(Terms<C>),
         stream, args, uint32_t(tiles));
}

template <class X, class P, int V>
void launch_forward(const WindowArgs& args, cudaStream_t stream) {
  launch_frames<compute_t<X>>("window_fusion", fuse_kernel<X, P, V>, args, V, stream);
}

template <class X, class P, int V>
void launch_backward(const WindowArgs& args, cudaStream_t stream) {
  launch_frames<compute_t<X>>("window_fusion_backward", spread_kernel<X, P, V>, args, V, stream);
}

}  // namespace

void window_fusion(const WindowArgs& args, cudaStream_t stream) {
  dispatch_window(args, [&](auto x_tag, auto prediction_tag) {
    using X = typename decltype(x_tag)::type;
    using P = typename decltype(prediction_tag)::type;
    constexpr int V = 16 / sizeof(P);
    can_vectorise(args, V) ? launch_forward<X, P, V>(args, stream) : launch_forward<X, P, 1>(args, stream);
  });
}

void window_fusion_backward(const WindowArgs& args, cudaStream_t stream) {
  dispatch_window(args, [&](auto x_tag, auto prediction_tag) {
    using X = typename decltype(x_tag)::type;
    using P = typename decltype(prediction_tag)::type;
    constexpr int V = 16 / sizeof(P);
    can_vectorise(args, V) ? launch_backward<X, P, V>(args, stream) : launch_backward<X, P, 1>(args, stream);
  });
}

}  // namespace td::cuda
