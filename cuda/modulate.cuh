// SPDX-License-Identifier: Apache-2.0
// What forward and backward of modulate share: rows of any dtype, element by element, and rows in whole vectors.
#pragma once

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

// Vector `index` of a row.
template <class T>
__device__ __forceinline__ void load_vector(Vector<T, kWidth>& vector, const Rows& rows, int64_t b, int64_t n,
                                            int index) {
  vector.load(static_cast<const T*>(rows.data) + at(rows, b, n) + index * kWidth);
}
template <class T>
__device__ __forceinline__ void store_vector(const Rows& rows, int64_t b, int64_t n, int index,
                                             const float (&values)[kWidth]) {
  Vector<T, kWidth> vector;
  vector.set(values);
  vector.store(static_cast<T*>(rows.data) + at(rows, b, n) + index * kWidth);
}
__device__ __forceinline__ Vector<float, kWidth> group_vector(const float* row, int index) {
  Vector<float, kWidth> vector;
  vector.load(row + index * kWidth);
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
