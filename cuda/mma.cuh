// SPDX-License-Identifier: Apache-2.0
// Tensor cores, one warp at a time: D += A B with A [16, K] by rows and B [K, 8] by columns, K = 16 or 8, 16-bit inputs
// and float32 sums. With g = lane / 4 and t = lane % 4 a lane holds, two neighbours to a word, the first in its lower
// half:
//   A  a0: row g, columns 2t, 2t+1;  a1: row g+8;  K = 16 also a2, a3: the same rows, columns 2t+8, 2t+9
//   B  b0: rows 2t, 2t+1 of column g;  K = 16 also b1: rows 2t+8, 2t+9
//   C  c0, c1: row g, columns 2t, 2t+1;  c2, c3: row g+8
// All 32 lanes take part.
#pragma once

#include "core/dtype.h"
#include "launch.cuh"

namespace td::cuda {

// Two numbers rounded to a word.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
#else
  return uint32_t(T(low).bits) | uint32_t(T(high).bits) << 16;
#endif
}

#if defined(__CUDACC__)

template <class T>
__device__ __forceinline__ void mma_k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, fp16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

template <class T>
__device__ __forceinline__ void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
  } else {
    static_assert(std::is_same_v<T, fp16>);
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
  }
}

// Four 8x8 matrices of 16-bit elements from shared memory, transposed: lane i gives the address of row i % 8 (16 bytes,
// aligned) of matrix i / 8, and gets rows 2t, 2t+1 of column g of all four.
__device__ __forceinline__ void load_transposed(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

#else

namespace emulated {

template <class T>
float half_of(uint32_t word, int half) {
  T value;
  value.bits = uint16_t(half == 0 ? word : word >> 16);
  return float(value);
}

// What the lanes hold of A and B, as they show it to one another.
struct MmaWords {
  uint32_t a[4], b[2];
};

template <class T>
void mma(float (&c)[4], const MmaWords& mine, int depth, const char* operation) {
  const char* lanes = simt::exchange(&mine, sizeof mine, 0xffffffffu, operation);
  const auto words = [&](int row, int k) {
    return reinterpret_cast<const MmaWords*>(lanes + 64 * (4 * row + k % 8 / 2));
  };
  const int g = simt::lane() / 4, t = simt::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (int k = 0; k < depth; ++k) {
      const float a = half_of<T>(words(row % 8, k)->a[row / 8 + 2 * (k / 8)], k % 2);
      c[i] += a * half_of<T>(words(column, k)->b[k / 8], k % 2);
    }
  }
}

}  // namespace emulated

template <class T>
void mma_k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulated::mma<T>(c, {{a0, a1, a2, a3}, {b0, b1}}, 16, "mma.m16n8k16");
}

template <class T>
void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  emulated::mma<T>(c, {{a0, a1, 0, 0}, {b0, 0}}, 8, "mma.m16n8k8");
}

inline void load_transposed(uint32_t (&words)[4], const void* row) {
  const char* lanes = simt::exchange(static_cast<const uint4*>(row), 16, 0xffffffffu, "ldmatrix.x4.trans");
  const int g = simt::lane() / 4, t = simt::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int k) {
      uint16_t bits;
      std::memcpy(&bits, lanes + 64 * (8 * i + k) + 2 * g, sizeof bits);
      return uint32_t(bits);
    };
    words[i] = element(2 * t) | element(2 * t + 1) << 16;
  }
}

#endif

}  // namespace td::cuda
