// SPDX-License-Identifier: Apache-2.0
// How a block multiplies two tiles: on tensor cores (16-bit types) or with multiplications and additions (the others).
// A core keeps 128 x 128 sums in registers, takes tiles with step(), and parks half of its rows in shared memory.
#pragma once

#include "copy_async.cuh"
#include "gemm_mma.cuh"

namespace td::cuda {

constexpr int kTileRows = 128;  // of A, and of B: columns of the result
constexpr int kTileBytes = 16384;
constexpr int kPitch = 136;  // of parked results: lanes that write pairs of neighbours meet no bank twice
template <class T>
constexpr int kDepth = kTileBytes / kTileRows / int(sizeof(T));  // elements of the summed axis

enum class Layout { sum, row };  // which axis of a tile is contiguous

// Lines of a tile and their 16-byte chunks. Chunks change places from line to line, so that eight lanes that read the
// same chunk of eight lines, or eight chunks of a line, meet all banks.
template <class T, Layout kLayout>
struct TileShape {
  static constexpr int lines = kLayout == Layout::sum ? kTileRows : kDepth<T>;
  static constexpr int elements = kLayout == Layout::sum ? kDepth<T> : kTileRows;
  static constexpr int chunks = elements * int(sizeof(T)) / 16;
  TD_HD static int offset(int line, int chunk) { return (line * chunks + (chunk ^ (line & 7))) * 16; }
};

// m16n8k16 on tensor cores with float32 sums: four warps of 64 x 64 results each.
template <class T, Layout kA, Layout kB>
struct MmaCore {
  using C = float;
  static constexpr int kThreads = 128;
  float sums[4][8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void step(const char* a, const char* b) {
    const int warp = int(threadIdx.x) >> 5, row = (warp & 1) * 64, column = (warp >> 1) * 64;
#pragma unroll
    for (int depth = 0; depth < kDepth<T>; depth += 16) {
      uint32_t fa[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment<kA, false>(fa[i], a, row + 16 * i, depth);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t fb[4];
        fragment<kB, true>(fb, b, column + 16 * j, depth);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mma_16x8x16<T>(sums[i][2 * j], fa[i], fb[0], fb[1]);
          mma_16x8x16<T>(sums[i][2 * j + 1], fa[i], fb[2], fb[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void finish() {}

  // Writes rows half * 64 .. half * 64 + 63 to `target`, kPitch elements apart.
  __device__ __forceinline__ void park(int half, float* target) const {
    const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
    if ((warp & 1) != half) return;
    struct alignas(8) Pair {
      float left, right;
    };
    float* corner = target + (lane >> 2) * kPitch + (warp >> 1) * 64 + (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float* at = corner + 16 * i * kPitch + 8 * j;
        *reinterpret_cast<Pair*>(at) = Pair{sums[i][j][0], sums[i][j][1]};
        *reinterpret_cast<Pair*>(at + 8 * kPitch) = Pair{sums[i][j][2], sums[i][j][3]};
      }
    }
  }

 private:
  // 16 rows x 16 elements of the summed axis in the registers that the instruction expects: of A, or of B for two
  // instructions (their eight columns each, one after the other).
  template <Layout kLayout, bool kIsB>
  __device__ __forceinline__ static void fragment(uint32_t (&registers)[4], const char* tile, int row, int depth) {
    const int lane = int(threadIdx.x) & 31;
    // Lanes 8 i .. 8 i + 7 point to the lines of register i. Registers of A go down the rows first, those of B along
    // the sum.
    const int low = (lane >> 3) & 1, high = lane >> 4, rows = kIsB ? high : low, sum = kIsB ? low : high;
    if constexpr (kLayout == Layout::sum) {
      load_matrices<false>(registers,
                           tile + TileShape<T, kLayout>::offset(row + 8 * rows + (lane & 7), depth / 8 + sum));
    } else {
      load_matrices<true>(registers,
                          tile + TileShape<T, kLayout>::offset(depth + 8 * sum + (lane & 7), row / 8 + rows));
    }
  }
};

// Multiplications and additions in the type itself, 8 x 8 results in each of 16 x 16 threads. A sum of thousands of
// float32 terms loses digits; partial sums of a few hundred, added up, do not.
template <class T, Layout kA, Layout kB>
struct FmaCore {
  using C = T;
  static constexpr int kThreads = 256;
  static constexpr bool kTwoLevels = sizeof(T) == 4;
  static constexpr int kCount = 16 / int(sizeof(T));  // elements per chunk
  static constexpr int kFlush = 8;                    // steps per partial sum
  T sums[8][8], totals[kTwoLevels ? 8 : 1][8];
  int steps;

  __device__ __forceinline__ void clear() {
    steps = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sums[i][j] = T(0);
        if constexpr (kTwoLevels) totals[i][j] = T(0);
      }
    }
  }

  __device__ __forceinline__ void step(const char* a, const char* b) {
    const int row = int(threadIdx.x) >> 4, column = int(threadIdx.x) & 15;
#pragma unroll 1
    for (int depth = 0; depth < kDepth<T>; depth += kCount) {
      T va[kCount][8], vb[kCount][8];
      values<kA>(va, a, row, depth);
      values<kB>(vb, b, column, depth);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) sums[i][j] += va[k][i] * vb[k][j];
        }
      }
    }
    if (kTwoLevels && ++steps == kFlush) finish();
  }

  __device__ __forceinline__ void finish() {
    if constexpr (kTwoLevels) {
      steps = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          totals[i][j] += sums[i][j];
          sums[i][j] = T(0);
        }
      }
    }
  }

  __device__ __forceinline__ void park(int half, T* target) const {
    const int row = int(threadIdx.x) >> 4, column = int(threadIdx.x) & 15;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i / 4 != half) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j)
        target[(place<kA>(row, i) - 64 * half) * kPitch + place<kB>(column, j)] = result(i, j);
    }
  }

 private:
  __device__ __forceinline__ T result(int i, int j) const {
    if constexpr (kTwoLevels) {
      return totals[i][j];
    } else {
      return sums[i][j];
    }
  }

  // The i-th of the eight rows of thread t, out of 16.
  template <Layout kLayout>
  TD_HD static int place(int t, int i) {
    return kLayout == Layout::sum ? t + 16 * i : (t + 16 * (i / kCount)) * kCount + i % kCount;
  }

  // kCount elements of the summed axis of eight rows.
  template <Layout kLayout>
  __device__ __forceinline__ static void values(T (&found)[kCount][8], const char* tile, int t, int depth) {
    struct alignas(16) Chunk {
      T v[kCount];
    };
    using Shape = TileShape<T, kLayout>;
    if constexpr (kLayout == Layout::sum) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const Chunk chunk = *reinterpret_cast<const Chunk*>(tile + Shape::offset(t + 16 * i, depth / kCount));
#pragma unroll
        for (int k = 0; k < kCount; ++k) found[k][i] = chunk.v[k];
      }
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int i = 0; i < 8; i += kCount) {
          const Chunk chunk = *reinterpret_cast<const Chunk*>(tile + Shape::offset(depth + k, t + 16 * (i / kCount)));
#pragma unroll
          for (int e = 0; e < kCount; ++e) found[k][i + e] = chunk.v[e];
        }
      }
    }
  }
};

template <class T, Layout kA, Layout kB>
struct core_of {
  using type = MmaCore<T, kA, kB>;
};
template <Layout kA, Layout kB>
struct core_of<float, kA, kB> {
  using type = FmaCore<float, kA, kB>;
};
template <Layout kA, Layout kB>
struct core_of<double, kA, kB> {
  using type = FmaCore<double, kA, kB>;
};
template <class T, Layout kA, Layout kB>
using core_t = typename core_of<T, kA, kB>::type;

}  // namespace td::cuda
