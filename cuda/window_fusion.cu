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

// Where a thread works: V elements from (row, col) of a plane of channel c. blockIdx.x counts tiles of all channels.
struct Place {
  uint32_t c, row, col;
  bool inside;

  __device__ __forceinline__ Place(const WindowArgs& args, uint32_t tiles, int vector) {
    const uint32_t channel = blockIdx.x / tiles, tile = blockIdx.x - channel * tiles;
    const uint32_t at = (tile * kThreads + threadIdx.x) * uint32_t(vector), cols = uint32_t(args.cols);
    c = channel;
    row = at / cols;
    col = at - row * cols;
    inside = row < args.rows;
  }
};

// What the weights of frame `l` add up to and, with it, the gain of x. Every thread gets both; the order is fixed.
__device__ __forceinline__ void frame_sums(const WindowArgs& args, int64_t l, double* shared, double& total,
                                           double& x_gain) {
  const uint32_t rounds = uint32_t(args.frames + args.length - 1) / uint32_t(args.length);
  const uint32_t terms = uint32_t(args.windows) * rounds;
  double weight_sum = 0.0, x_sum = 0.0;
  for (uint32_t t = threadIdx.x; t < terms; t += kThreads) {
    const uint32_t i = t / rounds;
    const int64_t j = window_slot(args.starts[i], l, args.length) + (t - i * rounds) * args.length;
    if (j < args.frames) {
      const double weight = args.weights[i * args.frames + j];
      weight_sum += weight;
      x_sum += weight * window_x_coefficient(args, i);
    }
  }
  total = block_sum(weight_sum, shared);
  x_gain = args.x ? window_gain(block_sum(x_sum, shared), total) : 0.0;
}

// A block computes V * kThreads elements of one frame of one channel.
template <class X, class P, int V>
__global__ void __launch_bounds__(kThreads) fuse_kernel(WindowArgs args, uint32_t tiles) {
  using C = compute_t<X>;
  __shared__ double sums[32];
  __shared__ int64_t offset[kChunk][kMaxPredictions];
  __shared__ C gain[kChunk][kMaxPredictions];
  const int64_t rounds = (args.frames + args.length - 1) / args.length, terms = args.windows * rounds;
  const uint32_t l = blockIdx.y;
  double total, x_gain;
  frame_sums(args, l, sums, total, x_gain);
  const Place at(args, tiles, V);

  C sum[V] = {};
  if (args.x && at.inside) {
    const X* x = static_cast<const X*>(args.x) + at.c * args.x_strides[0] + l * args.x_strides[1];
    const auto pack = *reinterpret_cast<const Pack<X, V>*>(x + at.row * args.x_strides[2] + at.col);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = C(x_gain) * C(pack.value[v]);
  }
  for (int64_t first = 0; first < terms; first += kChunk) {
    __syncthreads();
    const int64_t t = first + threadIdx.x;
    if (threadIdx.x < kChunk && t < terms) {
      const int64_t i = t / rounds;
      const int64_t j = window_slot(args.starts[i], l, args.length) + (t - i * rounds) * args.length;
      const double weight = j < args.frames ? args.weights[i * args.frames + j] : 0.0;
      const double share = window_gain(weight, total);
#pragma unroll 1
      for (int k = 0; k < args.prediction_count; ++k) {
        offset[threadIdx.x][k] =
            weight != 0.0 ? i * args.prediction_strides[k][0] + j * args.prediction_strides[k][2] : -1;
        gain[threadIdx.x][k] = C(share * window_coefficient(args, i, k));
      }
    }
    __syncthreads();
    const int count = int(terms - first < kChunk ? terms - first : kChunk);
    for (int n = 0; n < count && at.inside; ++n) {
      if (offset[n][0] < 0) continue;  // the window does not cover this frame
#pragma unroll
      for (int k = 0; k < kMaxPredictions; ++k) {
        if (k >= args.prediction_count) break;
        const P* source = static_cast<const P*>(args.predictions[k]) + offset[n][k] +
                          at.c * args.prediction_strides[k][1] + at.row * args.prediction_strides[k][3] + at.col;
        const auto pack = *reinterpret_cast<const Pack<P, V>*>(source);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += gain[n][k] * C(pack.value[v]);
      }
    }
  }
  if (at.inside) {
    Pack<X, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.value[v] = X(sum[v]);
    X* out = static_cast<X*>(args.out) + at.c * args.out_strides[0] + l * args.out_strides[1];
    *reinterpret_cast<Pack<X, V>*>(out + at.row * args.out_strides[2] + at.col) = pack;
  }
}

template <class X, class T, int V>
__device__ __forceinline__ void scale_store(const Pack<X, V>& grad, double gain, T* target) {
  using C = compute_t<X>;
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.value[v] = T(gain != 0.0 ? C(gain) * C(grad.value[v]) : C(0));
  *reinterpret_cast<Pack<T, V>*>(target) = pack;
}

// The incoming gradient of a place.
template <class X, int V>
__device__ __forceinline__ Pack<X, V> load_grad(const WindowArgs& args, const Place& at, int64_t l) {
  const X* source = static_cast<const X*>(args.out) + at.c * args.out_strides[0] + l * args.out_strides[1];
  return *reinterpret_cast<const Pack<X, V>*>(source + at.row * args.out_strides[2] + at.col);
}

// Gradients of the predictions: a block per V * kThreads elements of one frame of one channel of one window.
template <class X, class P, int V>
__global__ void __launch_bounds__(kThreads) spread_kernel(WindowArgs args, uint32_t tiles) {
  __shared__ double sums[32];
  const uint32_t i = blockIdx.z, j = blockIdx.y;
  const int64_t l = window_frame(args.starts[i], j, args.length);
  double total, x_gain;
  frame_sums(args, l, sums, total, x_gain);
  const Place at(args, tiles, V);
  if (!at.inside) return;
  const double gain = window_gain(args.weights[i * args.frames + j], total);
  const Pack<X, V> grad = load_grad<X, V>(args, at, l);
  for (int k = 0; k < args.prediction_count; ++k) {
    P* target = static_cast<P*>(args.predictions[k]) + i * args.prediction_strides[k][0] +
                at.c * args.prediction_strides[k][1] + j * args.prediction_strides[k][2] +
                at.row * args.prediction_strides[k][3] + at.col;
    scale_store<X, P, V>(grad, gain * window_coefficient(args, i, k), target);
  }
}

// Gradient of x.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) spread_x_kernel(WindowArgs args, uint32_t tiles) {
  __shared__ double sums[32];
  const uint32_t l = blockIdx.y;
  double total, x_gain;
  frame_sums(args, l, sums, total, x_gain);
  const Place at(args, tiles, V);
  if (!at.inside) return;
  X* target = static_cast<X*>(args.x) + at.c * args.x_strides[0] + l * args.x_strides[1];
  scale_store<X, X, V>(load_grad<X, V>(args, at, l), x_gain, target + at.row * args.x_strides[2] + at.col);
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

// A grid over the tiles of all channels, and over `y` and `z` (the binding has checked that they fit a grid).
struct Grid {
  dim3 blocks;
  uint32_t tiles;

  Grid(const WindowArgs& args, int vector, int64_t y, int64_t z) {
    const int64_t per_block = int64_t(kThreads) * vector;
    tiles = uint32_t((args.rows * args.cols + per_block - 1) / per_block);
    blocks = dim3(unsigned(args.channels * tiles), unsigned(y), unsigned(z));
  }
};

template <class X, class P, int V>
void launch_forward(const WindowArgs& args, cudaStream_t stream) {
  const Grid grid(args, V, args.length, 1);
  launch("window_fusion", fuse_kernel<X, P, V>, grid.blocks, kThreads, 0, stream, args, grid.tiles);
}

template <class X, class P, int V>
void launch_backward(const WindowArgs& args, cudaStream_t stream) {
  if (args.predictions[0] && args.windows > 0 && args.frames > 0) {
    const Grid grid(args, V, args.frames, args.windows);
    launch("window_fusion_backward", spread_kernel<X, P, V>, grid.blocks, kThreads, 0, stream, args, grid.tiles);
  }
  if (args.x) {
    const Grid grid(args, V, args.length, 1);
    launch("window_fusion_backward", spread_x_kernel<X, V>, grid.blocks, kThreads, 0, stream, args, grid.tiles);
  }
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
