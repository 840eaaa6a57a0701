// SPDX-License-Identifier: Apache-2.0
// Helpers of the launchers: error checks, 16-byte vectors, warp and block sums in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "core/kernel.h"

namespace td {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Call after every launch: TD_CHECK_LAUNCH("rope3d").
#define TD_CHECK_LAUNCH(op) ::td::check_cuda(cudaGetLastError(), op)

// Sum over the 32 lanes of a warp; every lane gets it. The order of additions is fixed.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sum over a block of up to 1024 threads (a multiple of 32); every thread gets it. `shared` holds 32 elements.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
  value = warp_sum(value);
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  __syncthreads();
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  const int warps = int(blockDim.x) >> 5;
  return warp_sum(lane < warps ? shared[lane] : T(0));
}

}  // namespace td
