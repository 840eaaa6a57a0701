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
// little can cancel in sums of x - pivot.
template <class T>
TD_INLINE compute_t<T> row_pivot(const T* row, int dim) {
  using C = compute_t<T>;
  constexpr int lanes = kLanes<C>;
  if (dim >= 4 * lanes) {
    const int step = (dim - lanes) / 3;
    return sum((load(row) + load(row + step)) + (load(row + 2 * step) + load(row + 3 * step))) / C(4 * lanes);
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
  Vec<C> s0{}, s1{}, q0{}, q1{};
  int i = 0;
  for (; i + 2 * lanes <= dim; i += 2 * lanes) {
    const Vec<C> a = load(row + i) - center, b = load(row + i + lanes) - center;
    s0 += a;
    s1 += b;
    q0 += a * a;
    q1 += b * b;
  }
  for_vectors<C>(dim - i, [&](int j, auto part) {
    const Vec<C> a = keep<C>(load(row + i + j, part) - center, part);
    s0 += a;
    q0 += a * a;
  });
  return stats_of(pivot, sum(s0 + s1) / C(dim), sum(q0 + q1) / C(dim), eps);
}

// Rows can bypass the caches: every one begins with a line, and all results of the call, `bytes`, are too many to stay.
TD_INLINE bool rows_can_stream(const Rows& rows, int64_t bytes, int64_t threshold) {
  const int64_t size = item_size(rows.dtype);
  const uint64_t offsets =
      reinterpret_cast<uint64_t>(rows.data) | uint64_t(rows.batch_stride * size) | uint64_t(rows.token_stride * size);
  return rows.data != nullptr && bytes >= threshold && offsets % kLineBytes == 0;
}

}  // namespace td::TD_ISA
