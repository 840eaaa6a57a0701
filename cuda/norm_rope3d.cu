// SPDX-License-Identifier: Apache-2.0
#include "core/norm_rope3d.h"
#include "launch.cuh"
#include "rope_row.cuh"

namespace td::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kMaxBlocks = 1 << 20;

__device__ __forceinline__ float inverse_root(float v) {
  return rsqrtf(v);
}
__device__ __forceinline__ double inverse_root(double v) {
  return rsqrt(v);
}

// Sum over one warp's head of x^2; every lane gets it.
template <class T>
__device__ __forceinline__ compute_t<T> head_squares(const T* x, int dim) {
  using C = compute_t<T>;
  C squares = C(0);
  for (int d = int(threadIdx.x) & 31; d < dim; d += 32) squares += C(x[d]) * C(x[d]);
  return warp_sum(squares);
}

// Sum over the block of a value that is the same in all lanes of a warp.
template <class C>
__device__ __forceinline__ C sum_of_warps(C value, C* scratch) {
  return block_sum((threadIdx.x & 31) == 0 ? value : C(0), scratch);
}

// 1 / rms of all heads of a token together.
template <class T>
__device__ __forceinline__ compute_t<T> token_factor(const RopeArgs& args, int64_t b, int64_t n, double eps,
                                                     compute_t<T>* scratch) {
  using C = compute_t<T>;
  C squares = C(0);
  for (int64_t h = int(threadIdx.x) >> 5; h < args.heads; h += kWarps) {
    squares += head_squares(rope_head<const T>(args.x, args.x_strides, b, n, h), args.dim);
  }
  return inverse_root(sum_of_warps(squares, scratch) / C(args.heads * args.dim) + C(eps));
}

// One block per token of a sample, one warp per head.
template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ NormRopeArgs all) {
  using C = compute_t<T>;
  extern __shared__ __align__(16) char shared[];
  __shared__ C scratch[32];
  const RopeArgs& args = all.rope;
  const int half = args.dim / 2, lane = int(threadIdx.x) & 31;
  C *cos_row = reinterpret_cast<C*>(shared), *sin_row = cos_row + half;
  for (int64_t n = blockIdx.x; n < args.tokens; n += gridDim.x) {
    const int64_t b = blockIdx.y;
    load_rotation(args, n, cos_row, sin_row);
    C r = all.per_head ? C(0) : token_factor<T>(args, b, n, all.eps, scratch);
    for (int64_t h = int(threadIdx.x) >> 5; h < args.heads; h += kWarps) {
      const T* x = rope_head<const T>(args.x, args.x_strides, b, n, h);
      T* out = rope_head<T>(args.out, args.out_strides, b, n, h);
      const C* weight = static_cast<const C*>(all.weight) + (all.per_head ? 0 : h * args.dim);
      if (all.per_head) r = inverse_root(head_squares(x, args.dim) / C(args.dim) + C(all.eps));
      for (int p = lane; p < half; p += 32) {
        const int i = pair_first(args, p), j = pair_second(args, p);
        const C u = C(x[i]) * r * weight[i], v = C(x[j]) * r * weight[j], c = cos_row[p], s = sin_row[p];
        out[i] = T(u * c - v * s);
        out[j] = T(v * c + u * s);
      }
    }
    __syncthreads();
  }
}

// The gradient of one pair, rotated back (args.inverse is set).
template <class T>
struct RotatedGradient {
  compute_t<T> first, second;
  __device__ __forceinline__ RotatedGradient(const RopeArgs& args, const T* grad, int p, const compute_t<T>* cos_row,
                                             const compute_t<T>* sin_row) {
    using C = compute_t<T>;
    const C u = C(grad[pair_first(args, p)]), v = C(grad[pair_second(args, p)]);
    first = u * cos_row[p] - v * sin_row[p];
    second = v * cos_row[p] + u * sin_row[p];
  }
};

// One block per token of a sample: dx = r (w g - x r^2 mean(w g x)), with g the gradient rotated back; the mean is over
// each head (PerHead) or all of them.
template <class T, bool PerHead>
__global__ void __launch_bounds__(kThreads, 1) backward_rows(const __grid_constant__ NormRopeGradArgs grads) {
  using C = compute_t<T>;
  extern __shared__ __align__(16) char shared[];
  __shared__ C scratch[32];
  const NormRopeArgs& all = grads.forward;
  const RopeArgs& args = all.rope;
  const int half = args.dim / 2, lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  const int heads = int(args.heads);
  C *cos_row = reinterpret_cast<C*>(shared), *sin_row = cos_row + half;
  const int64_t b = blockIdx.y;
  const auto head_dot = [&](int h, int64_t n) {
    const T* x = rope_head<const T>(args.x, args.x_strides, b, n, h);
    const T* grad = rope_head<const T>(grads.grad, grads.grad_strides, b, n, h);
    const C* weight = static_cast<const C*>(all.weight) + (PerHead ? 0 : h * args.dim);
    C dot = C(0);
#pragma unroll 1
    for (int p = lane; p < half; p += 32) {
      const RotatedGradient<T> g(args, grad, p, cos_row, sin_row);
      const int i = pair_first(args, p), j = pair_second(args, p);
      dot += g.first * weight[i] * C(x[i]) + g.second * weight[j] * C(x[j]);
    }
    return warp_sum(dot);
  };
  for (int64_t n = blockIdx.x; n < args.tokens; n += gridDim.x) {
    load_rotation(args, n, cos_row, sin_row);
    C* stats = static_cast<C*>(grads.stats) + (b * args.tokens + n) * (PerHead ? heads : 1);
    C r = C(0), mean = C(0);
    if constexpr (!PerHead) {
      r = token_factor<T>(args, b, n, all.eps, scratch);
      if (threadIdx.x == 0) *stats = r;
      for (int h = warp; h < heads; h += kWarps) mean += head_dot(h, n);
      mean = sum_of_warps(mean, scratch) / C(heads * args.dim);
    }
    for (int h = warp; h < heads; h += kWarps) {
      const T* x = rope_head<const T>(args.x, args.x_strides, b, n, h);
      if constexpr (PerHead) {
        r = inverse_root(head_squares(x, args.dim) / C(args.dim) + C(all.eps));
        mean = head_dot(h, n) / C(args.dim);
        if (lane == 0) stats[h] = r;
      }
      const T* grad = rope_head<const T>(grads.grad, grads.grad_strides, b, n, h);
      T* grad_x = rope_head<T>(args.out, args.out_strides, b, n, h);
      const C* weight = static_cast<const C*>(all.weight) + (PerHead ? 0 : h * args.dim);
      const C pull = mean * r * r;
#pragma unroll 1
      for (int p = lane; p < half; p += 32) {
        const RotatedGradient<T> g(args, grad, p, cos_row, sin_row);
        const int i = pair_first(args, p), j = pair_second(args, p);
        const C xi = C(x[i]), xj = C(x[j]);
        grad_x[i] = T(r * (g.first * weight[i] - xi * pull));
        grad_x[j] = T(r * (g.second * weight[j] - xj * pull));
      }
    }
    __syncthreads();
  }
}

// One thread per pair of the weight and chunk of tokens: partial sums of g x r.
template <class T>
__global__ void __launch_bounds__(kThreads) backward_partial(const __grid_constant__ NormRopeGradArgs grads) {
  using C = compute_t<T>;
  const NormRopeArgs& all = grads.forward;
  const RopeArgs& args = all.rope;
  const int half = args.dim / 2;
  const int64_t b = blockIdx.z, j0 = blockIdx.x, chunk = b * grads.chunks_per_sample + j0;
  const int64_t begin = j0 * grads.chunk_tokens;
  const int64_t end = begin + grads.chunk_tokens < args.tokens ? begin + grads.chunk_tokens : args.tokens;
  const int pairs = all.per_head ? half : int(args.heads) * half;
  for (int64_t pair = int64_t(blockIdx.y) * kThreads + threadIdx.x; pair < pairs;
       pair += int64_t(gridDim.y) * kThreads) {
    const int64_t first = pair / half, last = all.per_head ? args.heads : first + 1;
    const int p = pair - int(first) * half, i = pair_first(args, p), j = pair_second(args, p);
    C sum_i = C(0), sum_j = C(0);
    RopeCursor cursor(args.segments, args.segment_count, args.token_offset + begin);
    for (int64_t n = begin; n < end; ++n) {
      C c, s;
      pair_rotation(args, cursor, p, c, s);
      for (int64_t h = first; h < last; ++h) {
        const T* x = rope_head<const T>(args.x, args.x_strides, b, n, h);
        const T* grad = rope_head<const T>(grads.grad, grads.grad_strides, b, n, h);
        const int64_t token = b * args.tokens + n;
        const C r = static_cast<const C*>(grads.stats)[all.per_head ? token * args.heads + h : token];
        const C u = C(grad[i]), v = C(grad[j]);
        sum_i += (u * c - v * s) * C(x[i]) * r;
        sum_j += (v * c + u * s) * C(x[j]) * r;
      }
      if (n + 1 < end) cursor.advance();
    }
    const int64_t width = all.per_head ? args.dim : args.heads * args.dim;
    C* sums = static_cast<C*>(grads.partial) + chunk * width + (all.per_head ? 0 : first * args.dim);
    sums[i] = sum_i;
    sums[j] = sum_j;
  }
}

// One thread per weight: the sums of all chunks, in order.
template <class C>
__global__ void __launch_bounds__(kThreads) backward_weight(const C* partial, C* total, int64_t chunks, int64_t width) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= width) return;
  C sum = C(0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * width + i];
  total[i] = sum;
}

dim3 blocks_for(const RopeArgs& args) {
  return dim3(unsigned(args.tokens < kMaxBlocks ? args.tokens : kMaxBlocks), unsigned(args.batch));
}

}  // namespace

void norm_rope3d(const NormRopeArgs& args, cudaStream_t stream) {
  dispatch_float(args.rope.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const size_t shared = size_t(args.rope.dim) * sizeof(compute_t<T>);
    forward_kernel<T><<<blocks_for(args.rope), kThreads, shared, stream>>>(args);
  });
  TD_CHECK_LAUNCH("norm_rope3d");
}

void norm_rope3d_backward(const NormRopeGradArgs& given, cudaStream_t stream) {
  NormRopeGradArgs args = given;
  RopeArgs& rope = args.forward.rope;
  rope.inverse = !rope.inverse;
  const int64_t width = args.forward.per_head ? rope.dim : rope.heads * rope.dim;
  const int64_t chunks = rope.batch * args.chunks_per_sample;
  dispatch_float(rope.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    const size_t shared = size_t(rope.dim) * sizeof(C);
    if (args.forward.per_head) {
      backward_rows<T, true><<<blocks_for(rope), kThreads, shared, stream>>>(args);
    } else {
      backward_rows<T, false><<<blocks_for(rope), kThreads, shared, stream>>>(args);
    }
    TD_CHECK_LAUNCH("norm_rope3d_backward");
    const unsigned tiles = unsigned((width / 2 + kThreads - 1) / kThreads);
    backward_partial<T>
        <<<dim3(unsigned(args.chunks_per_sample), tiles, unsigned(rope.batch)), kThreads, 0, stream>>>(args);
    TD_CHECK_LAUNCH("norm_rope3d_backward");
    backward_weight<C><<<unsigned((width + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
        static_cast<const C*>(args.partial), static_cast<C*>(args.grad_weight), chunks, width);
    TD_CHECK_LAUNCH("norm_rope3d_backward");
  });
}

}  // namespace td::cuda
