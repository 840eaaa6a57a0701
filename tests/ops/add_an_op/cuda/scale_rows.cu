// SPDX-License-Identifier: Apache-2.0
#include "core/scale_rows.h"

#include "launch.cuh"

namespace td::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;

template <class T>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(const __grid_constant__ ScaleRowsArgs args) {
  using C = compute_t<T>;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    for (int64_t i = threadIdx.x; i < args.dim; i += kThreads) out[i] = T(C(x[i]) * C(args.factor));
  }
}

}  // namespace

void scale_rows(const ScaleRowsArgs& args, cudaStream_t stream) {
  dispatch_float(args.dtype, [&](auto tag) {
    const dim3 blocks(unsigned(args.rows < kMaxBlocks ? args.rows : kMaxBlocks));
    launch("scale_rows", scale_rows_kernel<typename decltype(tag)::type>, blocks, kThreads, 0, stream, args);
  });
}

}  // namespace td::cuda
