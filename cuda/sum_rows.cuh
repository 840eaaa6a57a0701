// SPDX-License-Identifier: Apache-2.0
// The second stage of sums over tokens: adds up the rows that the blocks of the first stage left, in a fixed order.
#pragma once

#include "launch.cuh"

namespace td::cuda {

// Sums of rows [begin, end) of `partial` at column `column`, taken by the 8 warps of a block in turns and added up by
// the first. Only threads of warp 0 get the sum. `scratch` holds 256 elements. `column` must differ between lanes only.
template <class C>
__device__ __forceinline__ C column_sum(const C* partial, int64_t begin, int64_t end, int64_t stride, bool inside,
                                        C* scratch) {
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  C sum = C(0);
  if (inside) {
#pragma unroll 8
    for (int64_t row = begin + warp; row < end; row += 8) sum += partial[row * stride];
  }
  __syncthreads();
  scratch[warp * 32 + lane] = sum;
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int i = 1; i < 8; ++i) sum += scratch[i * 32 + lane];
  }
  return sum;
}

}  // namespace td::cuda
