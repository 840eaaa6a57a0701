// SPDX-License-Identifier: Apache-2.0
// Rows of one token: conversion between storage types and the arithmetic type, and sums with a fixed order.
#pragma once

#include "core/modulate.h"
#include "cpu/vec.h"

namespace td::TD_ISA {

// fn(type_tag<T>{}) for the storage types that compute in C.
template <class C, class F>
TD_INLINE void dispatch_storage(DType dtype, const F& fn) {
  if constexpr (sizeof(C) == 8) {
    fn(type_tag<double>{});
  } else if (dtype == DType::float32) {
    fn(type_tag<float>{});
  } else if (dtype == DType::bfloat16) {
    fn(type_tag<bf16>{});
  } else {
    fn(type_tag<fp16>{});
  }
}

template <class T>
TD_INLINE T* row_pointer(const Rows& rows, int64_t b, int64_t n) {
  return static_cast<T*>(rows.data) + b * rows.batch_stride + n * rows.token_stride;
}
template <class C>
TD_INLINE const C* row_pointer(const GroupRows& rows, int64_t b, int64_t g) {
  return static_cast<const C*>(rows.data) + b * rows.batch_stride + g * rows.group_stride;
}

template <class C>
TD_INLINE void load_row(const Rows& rows, int64_t b, int64_t n, C* target, int dim) {
  dispatch_storage<C>(rows.dtype, [&](auto tag) {
    const auto* source = row_pointer<typename decltype(tag)::type>(rows, b, n);
    for_vectors<C>(dim, [&](int i, auto part) { put(target + i, load(source + i, part), part); });
  });
}

template <bool Stream, class C>
TD_INLINE void store_row(const Rows& rows, int64_t b, int64_t n, const C* source, int dim) {
  dispatch_storage<C>(rows.dtype, [&](auto tag) {
    auto* target = row_pointer<typename decltype(tag)::type>(rows, b, n);
    for_vectors<C>(dim, [&](int i, auto part) { put<Stream>(target + i, load(source + i, part), part); });
  });
}

// The lanes of `v` that a part has, zero in the others.
template <class C>
TD_INLINE Vec<C> keep(Vec<C> v, Whole) {
  return v;
}
template <class C>
TD_INLINE Vec<C> keep(Vec<C> v, Part part) {
  C buffer[kLanes<C>];
  store(buffer, v);
  return load_part(buffer, part.count);
}

template <class C>
struct RowStats {
  C mean, inverse_deviation;
};

// The mean of k elements spread over the row: within sqrt(n / k) deviations of the row's mean whatever the data, so
// little can cancel in sums of x - pivot. As many elements for small registers as for large ones.
template <class T>
TD_INLINE compute_t<T> row_pivot(const T* row, int dim) {
  using C = compute_t<T>;
  constexpr int lanes = kLanes<C>, registers = 256 / TD_VEC_BYTES;
  if (dim >= registers * lanes) {
    const int step = (dim - lanes) / (registers - 1);
    Vec<C> total[2] = {load(row), load(row + step)};
#pragma GCC unroll 8
    for (int i = 2; i < registers; i += 2) {
      total[0] += load(row + i * step);
      total[1] += load(row + (i + 1) * step);
    }
    return sum(total[0] + total[1]) / C(registers * lanes);
  }
  C pivot = C(0);
  for (int i = 0; i < dim; ++i) pivot += C(row[i]);
  return pivot / C(dim);
}

// From the mean and the mean square of x - pivot.
template <class C>
TD_INLINE RowStats<C> stats_of(C pivot, C offset, C square, double eps) {
  const C variance = square - offset * offset;
  return {pivot + offset, C(1) / std::sqrt((variance > C(0) ? variance : C(0)) + C(eps))};
}

// Mean and 1 / sqrt(variance + eps) of a row in one pass.
template <class T>
TD_INLINE RowStats<compute_t<T>> row_stats(const T* row, int dim, double eps) {
  using C = compute_t<T>;
  constexpr int lanes = kLanes<C>;
  const C pivot = row_pivot(row, dim);
  const Vec<C> center = splat(pivot);
  constexpr int chains = TD_VEC_BYTES == 64 ? 2 : 4;  // small registers hold fewer sums, and long ones round more
  Vec<C> s[chains]{}, q[chains]{};
  int i = 0;
  for (; i + chains * lanes <= dim; i += chains * lanes) {
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) {
      const Vec<C> a = load(row + i + c * lanes) - center;
      s[c] += a;
      q[c] += a * a;
    }
  }
  for_vectors<C>(dim - i, [&](int j, auto part) {
    const Vec<C> a = keep<C>(load(row + i + j, part) - center, part);
    s[0] += a;
    q[0] += a * a;
  });
  for (int c = chains / 2; c > 0; c /= 2) {
    for (int j = 0; j < c; ++j) {
      s[j] += s[j + c];
      q[j] += q[j + c];
    }
  }
  return stats_of(pivot, sum(s[0]) / C(dim), sum(q[0]) / C(dim), eps);
}

// Rows can bypass the caches: every one begins with a line, and all results of the call, `bytes`, are too many to stay.
TD_INLINE bool rows_can_stream(const Rows& rows, int64_t bytes, int64_t threshold) {
  const int64_t size = item_size(rows.dtype);
  const uint64_t offsets =
      reinterpret_cast<uint64_t>(rows.data) | uint64_t(rows.batch_stride * size) | uint64_t(rows.token_stride * size);
  return rows.data != nullptr && bytes >= threshold && offsets % kLineBytes == 0;
}

}  // namespace td::TD_ISA
