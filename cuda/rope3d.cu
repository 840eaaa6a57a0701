// SPDX-License-Identifier: Apache-2.0
#include "core/rope3d.h"
#include "launch.cuh"
#include "rope_row.cuh"

namespace td::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;

// One block per token of a sample: the token's rotation goes to shared memory once and is applied to every head.
template <class T>
__global__ void __launch_bounds__(kThreads) rope3d_kernel(const __grid_constant__ RopeArgs args) {
  using C = compute_t<T>;
  extern __shared__ __align__(16) char shared[];
  const int half = args.dim / 2;
  C *cos_row = reinterpret_cast<C*>(shared), *sin_row = cos_row + half;
  for (int64_t n = blockIdx.x; n < args.tokens; n += gridDim.x) {
    load_rotation(args, n, cos_row, sin_row);
    const int lane = int(threadIdx.x) & 31;
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
  const dim3 blocks(unsigned(args.tokens < kMaxBlocks ? args.tokens : kMaxBlocks), unsigned(args.batch));
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    rope3d_kernel<T><<<blocks, kThreads, size_t(args.dim) * sizeof(compute_t<T>), stream>>>(args);
  });
  TD_CHECK_LAUNCH("rope3d");
}

}  // namespace td::cuda
