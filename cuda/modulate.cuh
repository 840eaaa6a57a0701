// SPDX-License-Identifier: Apache-2.0
// What forward and backward of modulate share: rows of any dtype, element by element, and rows in whole vectors.
#pragma once

#include "copy_async.cuh"
#include "core/modulate.h"
#include "vector.cuh"

namespace td::cuda {

constexpr int kScalarThreads = 256;
constexpr int kWidth = 8;  // elements of a vector: 16 bytes of a 16-bit type
constexpr int64_t kMaxBlocks = 1 << 20;

__device__ __forceinline__ int64_t at(const Rows& rows, int64_t b, int64_t n) {
  return b * rows.batch_stride + n * rows.token_stride;
}

template <class C>
__device__ __forceinline__ C load_as(const Rows& rows, int64_t at) {
  if constexpr (sizeof(C) == 8) {
    return static_cast<const double*>(rows.data)[at];
  } else {
    if (rows.dtype == DType::float32) return static_cast<const float*>(rows.data)[at];
    if (rows.dtype == DType::bfloat16) return float(static_cast<const bf16*>(rows.data)[at]);
    return float(static_cast<const fp16*>(rows.data)[at]);
  }
}

template <class C>
__device__ __forceinline__ void store_as(const Rows& rows, int64_t at, C value) {
  if constexpr (sizeof(C) == 8) {
    static_cast<double*>(rows.data)[at] = value;
  } else {
    if (rows.dtype == DType::float32) {
      static_cast<float*>(rows.data)[at] = value;
    } else if (rows.dtype == DType::bfloat16) {
      static_cast<bf16*>(rows.data)[at] = bf16(value);
    } else {
      static_cast<fp16*>(rows.data)[at] = fp16(value);
    }
  }
}

template <class C>
__device__ __forceinline__ const C* group_row(const GroupRows& rows, int64_t b, int64_t g) {
  return static_cast<const C*>(rows.data) + b * rows.batch_stride + g * rows.group_stride;
}

__device__ __forceinline__ float inverse_root(float v) {
  return rsqrtf(v);
}
__device__ __forceinline__ double inverse_root(double v) {
  return rsqrt(v);
}

// Sample and token of an item; a division of 64 bits is left to very large tensors.
__device__ __forceinline__ void locate(int64_t item, int64_t tokens, int64_t& b, int64_t& n) {
  b = (item | tokens) < (int64_t(1) << 32) ? int64_t(uint32_t(item) / uint32_t(tokens)) : item / tokens;
  n = item - b * tokens;
}

// The vectors of a row that a thread has: kVectors, 32 apart, so that the distance between them is known to the
// compiler.
template <int kVectors>
struct Columns {
  int first;  // element where the first begins
  bool inside[kVectors];

  __device__ __forceinline__ explicit Columns(int dim) {
    const int vector = (int(threadIdx.x) >> 5) * 32 * kVectors + (int(threadIdx.x) & 31);
    first = vector * kWidth;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) inside[i] = vector + 32 * i < dim / kWidth;
  }
  static constexpr int step(int i) { return 32 * kWidth * i; }
};

// A thread's vectors of a row in shared memory, kOffset bytes into its warp's part. The thread that copies is the one
// that reads, so no barrier is needed; what is not inside the row reads as zero.
template <class T, int kVectors, int kOffset>
struct Staged {
  static constexpr int kPieces = int(sizeof(T)) * kWidth / 16, kEnd = kOffset + 512 * kPieces * kVectors;
  char* own;

  __device__ __forceinline__ explicit Staged(char* thread_memory) : own(thread_memory) {}
  // Before anything else: what no copy will fill becomes zero.
  __device__ __forceinline__ void clear_outside(const Columns<kVectors>& columns) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        if (!columns.inside[i]) *reinterpret_cast<uint4*>(at(i, p)) = uint4{};
      }
    }
  }
  // A warp's pieces of 16 bytes lie side by side.
  __device__ __forceinline__ char* at(int i, int piece) const { return own + kOffset + 512 * (i * kPieces + piece); }
  // Requests vector i; `row` is where the thread's first one begins.
  __device__ __forceinline__ void request(int i, const T* row, const Columns<kVectors>& columns) const {
    if (!columns.inside[i]) return;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      copy_async<16>(at(i, p), row + columns.step(i) + p * (16 / int(sizeof(T))));
    }
  }
  __device__ __forceinline__ void read(int i, Vector<T, kWidth>& vector) const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const uint4 part = *reinterpret_cast<const uint4*>(at(i, p));
      vector.words[4 * p] = part.x;
      vector.words[4 * p + 1] = part.y;
      vector.words[4 * p + 2] = part.z;
      vector.words[4 * p + 3] = part.w;
    }
  }
  __device__ __forceinline__ void write(int i, const Vector<T, kWidth>& vector) const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      *reinterpret_cast<uint4*>(at(i, p)) =
          uint4{vector.words[4 * p], vector.words[4 * p + 1], vector.words[4 * p + 2], vector.words[4 * p + 3]};
    }
  }
};

// A block's share of the tokens of all samples, one after the other, with their sample, place and group. Index is int
// where all of these are below 2^31: registers are scarce.
template <class Index>
struct Walk {
  Index b, n, left, g, stop;  // stop: where the group ends within the shard

  template <class Args>
  __device__ __forceinline__ Walk(const Args& args, const TokenShares& shares) {
    const int64_t first = blockIdx.x * shares.share, items = args.batch * args.tokens;
    int64_t sample, token;
    locate(first, args.tokens, sample, token);
    left = Index(first + shares.share < items ? shares.share : items - first);
    b = Index(sample);
    n = Index(token);
    enter(args);
  }
  template <class Args>
  __device__ __forceinline__ void enter(const Args& args) {
    const int64_t group = args.groups.group(args.token_offset + n), end = args.groups.end(group) - args.token_offset;
    g = Index(group);
    stop = Index(end < args.tokens ? end : args.tokens);
  }
  // Goes to the next token; true: it is in another group or sample.
  template <class Args>
  __device__ __forceinline__ bool advance(const Args& args) {
    --left;
    if (++n < stop) return false;
    if (n == args.tokens) {
      n = 0;
      ++b;
    }
    if (left > 0) enter(args);
    return true;
  }
};

// A thread's place in the row of a token. It moves to the next one by an addition, unless a group or sample ends.
template <class T>
struct Track {
  T* row;

  template <class Index>
  __device__ __forceinline__ void place(const Rows& rows, const Walk<Index>& walk, int column) {
    row = static_cast<T*>(rows.data) + at(rows, walk.b, walk.n) + column;
  }
  __device__ __forceinline__ void step(const Rows& rows) { row += rows.token_stride; }
};

// What a kernel with a Walk is given besides the arguments of the op.
struct Shares : TokenShares {
  float inverse_dim, eps;

  template <class Args>
  Shares(const TokenShares& shares, const Args& args)
      : TokenShares(shares), inverse_dim(1.0f / float(args.dim)), eps(float(args.eps)) {}
};

template <class Args>
bool walks_in_int(const Args& args) {
  return args.batch * args.tokens <= INT32_MAX && args.groups.count <= INT32_MAX;
}

template <class T>
__device__ __forceinline__ void store_vector(T* target, const float (&values)[kWidth]) {
  Vector<T, kWidth> vector;
  vector.set(values);
  vector.store(target);
}
__device__ __forceinline__ Vector<float, kWidth> group_vector(const float* row, int column) {
  Vector<float, kWidth> vector;
  vector.load(row + column);
  return vector;
}

inline bool whole(const Rows& rows) {
  const int64_t strides[2] = {rows.batch_stride, rows.token_stride};
  return rows.data == nullptr || aligned_rows(rows.data, strides, 2, size_t(item_size(rows.dtype)));
}
inline bool whole(const GroupRows& rows) {
  const int64_t strides[2] = {rows.batch_stride, rows.group_stride};
  return rows.data == nullptr || aligned_rows(rows.data, strides, 2, sizeof(float));
}
inline bool has(const Rows& rows, DType dtype) {
  return rows.data == nullptr || rows.dtype == dtype;
}

// Threads that hold a row, `vectors` vectors each.
inline int row_threads(int dim, int vectors) {
  return ((dim / kWidth + vectors - 1) / vectors + 31) / 32 * 32;
}

// Calls fn(type_tag<X>{}, type_tag<L>{}) for the types of the residual stream and of the layers that have kernels: the
// same one, or a float32 stream with 16-bit layers. False for others.
template <class F>
bool dispatch_stream(DType stream, DType layers, F&& fn) {
  if (stream == DType::float64 || (stream != layers && stream != DType::float32)) return false;
  if (stream == layers) {
    if (stream == DType::float32) fn(type_tag<float>{}, type_tag<float>{});
    if (stream == DType::bfloat16) fn(type_tag<bf16>{}, type_tag<bf16>{});
    if (stream == DType::float16) fn(type_tag<fp16>{}, type_tag<fp16>{});
  } else if (layers == DType::bfloat16) {
    fn(type_tag<float>{}, type_tag<bf16>{});
  } else {
    fn(type_tag<float>{}, type_tag<fp16>{});
  }
  return true;
}

}  // namespace td::cuda
