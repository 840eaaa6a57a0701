// SPDX-License-Identifier: Apache-2.0
// A row that a block holds in registers, to eight-bit codes and a scale, see core/eight_bit.h.
#pragma once

#if defined(__CUDACC__)
#include <cuda_fp8.h>
#endif

#include "core/eight_bit.h"
#include "launch.cuh"

namespace td::cuda {

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  return a > b ? a : b;
}

// The largest of a block of up to kWarps (a power of two) whole warps; every thread gets it. One barrier: `shared`,
// kWarps words, must not be what the block has read since its last barrier.
template <int kWarps>
__device__ __forceinline__ uint32_t block_largest_apart(uint32_t value, uint32_t* shared) {
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31, warps = int(blockDim.x) >> 5;
#if defined(__CUDA_ARCH__)
  value = __reduce_max_sync(0xffffffffu, value);
#else
  for (int offset = 16; offset > 0; offset >>= 1) value = larger(value, __shfl_xor_sync(0xffffffffu, value, offset));
#endif
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  const int other = lane & (kWarps - 1);
  value = other < warps ? shared[other] : 0u;
#pragma unroll
  for (int offset = kWarps / 2; offset > 0; offset >>= 1) {
    value = larger(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

// The same with a barrier before.
template <int kWarps>
__device__ __forceinline__ uint32_t block_largest(uint32_t value, uint32_t* shared) {
  __syncthreads();
  return block_largest_apart<kWarps>(value, shared);
}

template <EightBit Q>
__device__ __forceinline__ uint32_t pair_of_codes(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  if constexpr (Q == EightBit::float8) {
    return __nv_cvt_float2_to_fp8x2(float2{low, high}, __NV_SATFINITE, __NV_E4M3);
  }
#endif
  return code_of(low, Q) | code_of(high, Q) << 8;
}

// The vectors [kVectors][8] of a row that a thread has, as codes in the row's place. Columns as in modulate.cuh; L is
// the type that values are rounded to on the way if that is asked for.
template <EightBit Q, int kWarps, class L, int kVectors, class Columns>
__device__ __forceinline__ void store_codes(const CodeRows& codes, int64_t b, int64_t n, float (&row)[kVectors][8],
                                            const Columns& columns, uint32_t* shared) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!columns.inside[i]) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (!std::is_same_v<L, float> && codes.exact) row[i][j] = float(L(row[i][j]));
      largest = larger(largest, magnitude_bits(row[i][j]));
    }
  }
  const RowScale scale(block_largest_apart<kWarps>(largest, shared), Q);
  if (threadIdx.x == 0) codes.scales[b * codes.scale_batch_stride + n * codes.scale_token_stride] = scale.scale;
  uint8_t* target = codes.data + b * codes.batch_stride + n * codes.token_stride + columns.first;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!columns.inside[i]) continue;
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      words[j] = pair_of_codes<Q>(row[i][2 * j] * scale.factor, row[i][2 * j + 1] * scale.factor);
    }
    *reinterpret_cast<uint2*>(target + columns.step(i)) = uint2{words[0] | words[1] << 16, words[2] | words[3] << 16};
  }
}

// May codes be stored in accesses of eight bytes?
inline bool whole(const CodeRows& codes) {
  return (reinterpret_cast<uint64_t>(codes.data) | uint64_t(codes.batch_stride) | uint64_t(codes.token_stride)) % 8 ==
         0;
}

// Do samples of so many tokens follow each other without a gap?
inline bool without_gaps(const CodeRows& codes, int64_t tokens) {
  return codes.batch_stride == tokens * codes.token_stride &&
         codes.scale_batch_stride == tokens * codes.scale_token_stride;
}

// Calls fn(std::integral_constant<EightBit, Q>{}).
template <class F>
void dispatch_kind(EightBit kind, F&& fn) {
  if (kind == EightBit::int8) {
    fn(std::integral_constant<EightBit, EightBit::int8>{});
  } else {
    fn(std::integral_constant<EightBit, EightBit::float8>{});
  }
}

}  // namespace td::cuda
