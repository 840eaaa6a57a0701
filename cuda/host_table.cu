// SPDX-License-Identifier: Apache-2.0
#include "core/host_table.h"

#include "launch.cuh"

namespace td::cuda {
namespace {

__global__ void __launch_bounds__(kTableWords) table_kernel(const __grid_constant__ TableArgs args) {
  if (int(threadIdx.x) < args.count) args.out[threadIdx.x] = args.words[threadIdx.x];
}

}  // namespace

void host_table(const TableArgs& args, cudaStream_t stream) {
  launch("host_table", table_kernel, 1, kTableWords, 0, stream, args);
}

}  // namespace td::cuda
