// SPDX-License-Identifier: Apache-2.0
// A block's part of a matrix product C = A B', summed over the axis that A and B share: 128 x 128 results from tiles in
// shared memory, which kernels fill as they like (a matrix: load_tile below; patches: framepack.cuh) while the
// previous ones are multiplied. Cores are in gemm_cores.cuh.
//
// A tile of an operand holds 128 of its rows and kDepth<T> elements of the summed axis, 16 KB. Layout::sum: a line is a
// row, the summed axis is contiguous. Layout::row: a line is an element of the summed axis, the rows are contiguous.
#pragma once

#include "gemm_cores.cuh"
#include "vector.cuh"

namespace td::cuda {

constexpr int kStages = 3;  // tiles of A and B in flight
constexpr int kTilesBytes = kStages * 2 * kTileBytes;

// Copies 16 bytes into a tile, of which the first `count` elements come from `source` and the rest is zero.
template <class T>
__device__ __forceinline__ void load_chunk(char* target, const T* source, int64_t count, bool vectors) {
  constexpr int kCount = 16 / int(sizeof(T));
  const int whole = count < 0 ? 0 : count < kCount ? int(count) : kCount;
  if (vectors) {
    copy_async<16>(target, source, whole * int(sizeof(T)));
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) reinterpret_cast<T*>(target)[i] = i < whole ? source[i] : T(0);
  }
}

// Fills a tile with rows of a matrix. `line(i)` points to the first element that line i of the tile may read, or to
// anything valid if `count(i)` elements, the number it has, is not positive.
template <class T, Layout kLayout, int kThreads, class Line>
__device__ __forceinline__ void load_lines(char* tile, bool vectors, const Line& line) {
  constexpr int kChunks = TileShape<T, kLayout>::chunks, kCount = 16 / int(sizeof(T));
#pragma unroll 2
  for (int i = 0; i < kTileBytes / 16 / kThreads; ++i) {
    const int item = i * kThreads + int(threadIdx.x), at = item / kChunks, chunk = item % kChunks;
    int64_t count;
    const T* source = line(at, count);
    const int64_t left = count - chunk * kCount;
    load_chunk(tile + TileShape<T, kLayout>::offset(at, chunk), left > 0 ? source + chunk * kCount : source, left,
               vectors);
  }
}

// A matrix in memory: `lines` of `elements` that are neighbours, `stride` elements apart.
template <class T>
struct Matrix {
  const T* origin;
  int64_t stride, lines, elements;
  bool vectors;  // 16-byte pieces of lines are aligned
};

// Fills a tile with lines `line`, `line + 1`, .. of a matrix, from `element` on, and with zeros beyond its ends. Most
// tiles are whole: they need no comparisons, and one address that goes on by the same number of lines.
template <class T, Layout kLayout, int kThreads>
__device__ __forceinline__ void load_tile(char* tile, const Matrix<T>& matrix, int64_t line, int64_t element) {
  using Shape = TileShape<T, kLayout>;
  constexpr int kStep = kThreads / Shape::chunks, kCount = 16 / int(sizeof(T));
  static_assert(kThreads % Shape::chunks == 0);
  if (matrix.vectors && line + Shape::lines <= matrix.lines && element + Shape::elements <= matrix.elements) {
    const int at = int(threadIdx.x) / Shape::chunks, chunk = int(threadIdx.x) % Shape::chunks;
    const T* source = matrix.origin + (line + at) * matrix.stride + element + chunk * kCount;
    const int64_t ahead = kStep * matrix.stride;
#pragma unroll
    for (int i = 0; i < kTileBytes / 16 / kThreads; ++i, source += ahead)
      copy_async<16>(tile + Shape::offset(at + i * kStep, chunk), source, 16);
    return;
  }
  load_lines<T, kLayout, kThreads>(tile, matrix.vectors, [&](int i, int64_t& count) {
    count = line + i < matrix.lines ? matrix.elements - element : 0;
    return count > 0 ? matrix.origin + (line + i) * matrix.stride + element : matrix.origin;
  });
}

// Multiplies the tiles of steps begin .. end - 1. load(step, a, b) fills the tiles of a step; seen(a) is called with
// every tile of A once it is there. Ends with all of shared memory free.
template <class Core, class Load, class Seen>
__device__ __forceinline__ void multiply(Core& core, char* shared, int begin, int end, const Load& load, Seen&& seen) {
  const auto tiles = [&](int step) { return shared + ((step - begin) % kStages) * 2 * kTileBytes; };
  core.clear();
#pragma unroll 1
  for (int step = begin; step < begin + kStages - 1; ++step) {
    if (step < end) load(step, tiles(step), tiles(step) + kTileBytes);
    commit_copies();
  }
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the tiles of this step are there, and those of the previous one are free
    const int next = step + kStages - 1;
    if (next < end) load(next, tiles(next), tiles(next) + kTileBytes);
    commit_copies();
    seen(tiles(step));
    core.step(tiles(step), tiles(step) + kTileBytes);
  }
  wait_copies<0>();
  core.finish();
}

template <class C>
struct alignas(16) Quad {
  C v[4];
};

// Asks for the 128 bytes around an address, to have them near when they are read.
__device__ __forceinline__ void prefetch(const void* address) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  static_cast<void>(address);
#endif
}

struct Nothing {};

// The first of the four columns of results that a thread is handed, the same ones in every row.
__device__ __forceinline__ int result_column() {
  return int(threadIdx.x) % (kTileRows / 4) * 4;
}

// Hands the results out in rows: store(row, four results from result_column() on, what fetch(row) gave), row and column
// within the block. Several fetches go before the first store, which may be to the same memory.
template <class Core, class Fetch, class Store>
__device__ __forceinline__ void store_results(const Core& core, char* shared, const Fetch& fetch, const Store& store) {
  using C = typename Core::C;
  constexpr int kHalf = kTileRows / 2, kWidth = kTileRows / 4, kRows = Core::kThreads / kWidth, kBatch = 8;
  static_assert(kHalf * kPitch * sizeof(C) <= kTilesBytes && kHalf % (kRows * kBatch) == 0);
  C* sums = reinterpret_cast<C*>(shared);
  const int first = int(threadIdx.x) / kWidth, column = result_column();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncthreads();
    core.park(half, sums);
    __syncthreads();
#pragma unroll 1
    for (int row = first; row < kHalf; row += kRows * kBatch) {
      decltype(fetch(0)) fetched[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) fetched[i] = fetch(half * kHalf + row + i * kRows);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const C* found = sums + (row + i * kRows) * kPitch + column;
        store(half * kHalf + row + i * kRows, *reinterpret_cast<const Quad<C>*>(found), fetched[i]);
      }
    }
  }
}

// Writes four neighbours at once.
template <class T, class C>
__device__ __forceinline__ void store_whole_quad(T* target, const Quad<C>& values) {
  Vector<T, 4> packed;
  packed.set(values.v);
  if constexpr (packed.kBytes == 8) {
    *reinterpret_cast<uint64_t*>(target) = uint64_t(packed.words[1]) << 32 | packed.words[0];  // nvcc halves a uint2
  } else {
    packed.store(target);
  }
}

// Writes the first `count` of four neighbours, at once where `vectors` says that they are aligned.
template <class T, class C>
__device__ __forceinline__ void store_quad(T* target, const Quad<C>& values, int64_t count, bool vectors) {
  if (vectors && count >= 4) {
    store_whole_quad(target, values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) target[i] = T(values.v[i]);
    }
  }
}

// What goes with four neighbouring columns, the first `count` of which exist; `none` where there is nothing or no
// column.
template <class C, class T>
__device__ __forceinline__ Quad<C> column_values(const T* first, int64_t count, C none) {
  Quad<C> values;
#pragma unroll
  for (int i = 0; i < 4; ++i) values.v[i] = first != nullptr && i < count ? C(first[i]) : none;
  return values;
}

}  // namespace td::cuda
