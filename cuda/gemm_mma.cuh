// SPDX-License-Identifier: Apache-2.0
// What matrix products ask of a warp: fragments of matrices from shared memory, and the tensor core's m16n8k16. Each
// has a second form for kernels compiled for the host (tests/simt). All 32 lanes take part.
#pragma once

#include "core/dtype.h"
#include "launch.cuh"

namespace td::cuda {

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + r points to line r (16 bytes, aligned) of matrix i. Lane l gets
// elements 2 (l % 4) and 2 (l % 4) + 1 of line l / 4 of all four; transposed, element l / 4 of lines 2 (l % 4) and
// 2 (l % 4) + 1.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const char* line) {
#if defined(__CUDACC__)
  const uint32_t address = uint32_t(__cvta_generic_to_shared(line));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
#else
  const char* lines = simt::exchange(reinterpret_cast<const uint4*>(line), 16, 0xffffffffu,
                                     kTransposed ? "ldmatrix.x4.trans" : "ldmatrix.x4");
  const int row = simt::lane() / 4, pair = simt::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    uint16_t elements[2];
    for (int e = 0; e < 2; ++e) {
      const char* at =
          kTransposed ? lines + 64 * (8 * i + pair + e) + 2 * row : lines + 64 * (8 * i + row) + 2 * (pair + e);
      std::memcpy(&elements[e], at, 2);
    }
    words[i] = elements[0] | uint32_t(elements[1]) << 16;
  }
#endif
}

#if !defined(__CUDACC__)
namespace emulated {

// What a lane holds of A and B, as lanes show it to one another.
struct Fragments {
  float a[4][2], b[2][2];
};

template <class T>
void unpack(float (&values)[2], uint32_t word) {
  T low, high;
  low.bits = uint16_t(word);
  high.bits = uint16_t(word >> 16);
  values[0] = float(low);
  values[1] = float(high);
}

}  // namespace emulated
#endif

// sums [16, 8] += A [16, 16] B [16, 8]. With g = lane / 4, t = lane % 4, and two neighbours to a word: a0 is columns
// 2t, 2t+1 of row g, a1 of row g+8, a2 and a3 columns 2t+8, 2t+9 of the same rows; b0 is rows 2t, 2t+1 of column g, b1
// rows 2t+8, 2t+9; sums are columns 2t, 2t+1 of row g, then of row g+8.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  emulated::Fragments mine;
  for (int i = 0; i < 4; ++i) emulated::unpack<T>(mine.a[i], a[i]);
  emulated::unpack<T>(mine.b[0], b0);
  emulated::unpack<T>(mine.b[1], b1);
  const char* lanes = simt::exchange(&mine, sizeof mine, 0xffffffffu, "mma.m16n8k16");
  const auto of = [&](int lane) { return reinterpret_cast<const emulated::Fragments*>(lanes + 64 * lane); };
  const int g = simt::lane() / 4, t = simt::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; k += 2) {
      const float* x = of(4 * g + k % 8 / 2)->a[i / 2 + 2 * (k / 8)];
      const float* y = of(4 * (2 * t + i % 2) + k % 8 / 2)->b[k / 8];
      sums[i] += x[0] * y[0];
      sums[i] += x[1] * y[1];
    }
  }
#endif
}

}  // namespace td::cuda
