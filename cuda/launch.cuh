// SPDX-License-Identifier: Apache-2.0
// What every kernel file needs: launches with error checks, shared memory, warp and block sums in a fixed order.
// Kernels are compiled by nvcc and, for tests without a GPU, by a host compiler (tests/simt), hence no <<<>>>
// elsewhere.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "core/kernel.h"

namespace td {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// More than 48 KB of shared memory must be asked for.
template <class Kernel>
void allow_shared_bytes(const char* op, Kernel kernel, size_t bytes) {
  if (bytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), op);
  }
}

// Does a block of the current device have that much? 163 to 227 KB on data-centre GPUs, 99 KB on others.
inline bool shared_bytes_exist(const char* op, size_t bytes) {
  int device = 0, most = 0;
  check_cuda(cudaGetDevice(&device), op);
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), op);
  return bytes <= size_t(most);
}

// launch("rope3d", kernel, blocks, threads, bytes of shared memory, stream, arguments of the kernel...)
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  allow_shared_bytes(op, kernel, shared_bytes);
#if defined(__CUDACC__)
  kernel<<<blocks, threads, shared_bytes, stream>>>(Parameters(arguments)...);
  check_cuda(cudaGetLastError(), op);
#else
  using Values = std::tuple<Parameters...>;
  const std::pair<void (*)(Parameters...), Values> call(kernel, Values(Parameters(arguments)...));
  simt::run(
      op, reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes,
      [](const void* context) {
        const auto& [function, values] = *static_cast<const decltype(call)*>(context);
        std::apply(function, values);
      },
      &call);
#endif
}

// The block's dynamic shared memory, aligned to 16 bytes.
#if defined(__CUDACC__)
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
#else
using simt::dynamic_shared;
#endif

// Sum over the 32 lanes of a warp; every lane gets it. The order of additions is fixed.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sums over a block of up to kWarps (a power of two) whole warps; every thread gets them. One barrier: `shared`, kWarps
// * K elements, must not be what the block's last sums used, unless there was another barrier since.
template <int kWarps, int K, class T>
__device__ __forceinline__ void block_sums_apart(T (&values)[K], T* shared) {
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31, warps = int(blockDim.x) >> 5;
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = warp_sum(values[k]);
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) shared[kWarps * k + warp] = values[k];
  }
  __syncthreads();
  const int other = lane & (kWarps - 1);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    values[k] = other < warps ? shared[kWarps * k + other] : T(0);
#pragma unroll
    for (int offset = kWarps / 2; offset > 0; offset >>= 1) {
      values[k] += __shfl_xor_sync(0xffffffffu, values[k], offset);
    }
  }
}

// The same for up to 1024 threads, with a barrier before; `shared` holds 32 * K elements.
template <int K, class T>
__device__ __forceinline__ void block_sums(T (&values)[K], T* shared) {
  __syncthreads();
  block_sums_apart<32>(values, shared);
}

template <class T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
  T values[1] = {value};
  block_sums(values, shared);
  return values[0];
}

// Blocks of a persistent kernel: as many as run at a time, at most `most`.
template <class Kernel>
unsigned resident_blocks(const char* op, Kernel kernel, int threads, size_t shared_bytes, int64_t most) {
  int device = 0, multiprocessors = 0, per_multiprocessor = 0;
  allow_shared_bytes(op, kernel, shared_bytes);
  check_cuda(cudaGetDevice(&device), op);
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), op);
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, shared_bytes), op);
  const int64_t blocks = int64_t(multiprocessors) * (per_multiprocessor > 0 ? per_multiprocessor : 1);
  return unsigned(blocks < most ? blocks : most);
}

}  // namespace td
