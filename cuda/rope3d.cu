// SPDX-License-Identifier: Apache-2.0
#include "core/rope3d.h"
#include "launch.cuh"

namespace td::cuda {
namespace {

constexpr int kThreads = 256;

// One block per token: the token's rotation goes to shared memory once and is applied to every head of every sample.
template <class T>
__global__ void __launch_bounds__(kThreads) rope3d_kernel(RopeArgs args) {
  using C = compute_t<T>;
  extern __shared__ __align__(16) char shared[];
  C* cos_row = reinterpret_cast<C*>(shared);
  const int half = args.dim / 2;
  C* sin_row = cos_row + half;
  for (int64_t n = blockIdx.x; n < args.tokens; n += gridDim.x) {
    const RopeCursor cursor(args.segments, args.segment_count, args.token_offset + n);
    for (int p = int(threadIdx.x); p < half; p += kThreads) {
      const int axis = p < args.pairs[0] ? 0 : (p < args.pairs[0] + args.pairs[1] ? 1 : 2);
      const int first = axis == 0 ? 0 : (axis == 1 ? args.pairs[0] : args.pairs[0] + args.pairs[1]);
      const int64_t at = cursor.row(axis, args.pairs) + p - first;
      cos_row[p] = static_cast<const C*>(args.cos)[at];
      const C s = static_cast<const C*>(args.sin)[at];
      sin_row[p] = args.inverse ? -s : s;
    }
    __syncthreads();
    const int rows = int(args.batch * args.heads);
    for (int item = int(threadIdx.x); item < rows * half; item += kThreads) {
      const int row = item / half, p = item - row * half;
      const int64_t b = row / args.heads, h = row - b * args.heads;
      const T* x =
          static_cast<const T*>(args.x) + b * args.x_strides[0] + n * args.x_strides[1] + h * args.x_strides[2];
      T* out = static_cast<T*>(args.out) + b * args.out_strides[0] + n * args.out_strides[1] + h * args.out_strides[2];
      const int i = args.interleaved ? 2 * p : p, j = args.interleaved ? 2 * p + 1 : p + half;
      const C u = C(x[i]), v = C(x[j]), c = cos_row[p], s = sin_row[p];
      out[i] = T(u * c - v * s);
      out[j] = T(v * c + u * s);
    }
    __syncthreads();
  }
}

}  // namespace

void rope3d(const RopeArgs& args, cudaStream_t stream) {
  const unsigned blocks = unsigned(args.tokens < 1048576 ? args.tokens : 1048576);
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    rope3d_kernel<T><<<blocks, kThreads, size_t(args.dim) * sizeof(compute_t<T>), stream>>>(args);
  });
  TD_CHECK_LAUNCH("rope3d");
}

}  // namespace td::cuda
