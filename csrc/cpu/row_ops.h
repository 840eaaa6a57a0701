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

// term(i, part) is summed over the row; four chains hide the latency of the addition.
template <class C, class Term>
TD_INLINE C sum_row(int dim, const Term& term) {
  constexpr int lanes = kLanes<C>;
  Vec<C> s0{}, s1{}, s2{}, s3{};
  int i = 0;
  for (; i + 4 * lanes <= dim; i += 4 * lanes) {
    s0 += term(i, Whole{});
    s1 += term(i + lanes, Whole{});
    s2 += term(i + 2 * lanes, Whole{});
    s3 += term(i + 3 * lanes, Whole{});
  }
  for (; i + lanes <= dim; i += lanes) s0 += term(i, Whole{});
  if (i < dim) s1 += term(i, Part{dim - i});
  return sum((s0 + s1) + (s2 + s3));
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

// Mean and 1 / sqrt(variance + eps) of a row, given its sum. Two passes: the row is in the cache, and nothing cancels.
template <class C>
TD_INLINE RowStats<C> row_stats(const C* row, int dim, C total, double eps) {
  const C mean = total / C(dim);
  const Vec<C> center = splat(mean);
  const C squares = sum_row<C>(dim, [&](int i, auto part) {
    const Vec<C> d = keep<C>(load(row + i, part) - center, part);
    return d * d;
  });
  return {mean, C(1) / std::sqrt(squares / C(dim) + C(eps))};
}

// Whole registers of every row can bypass the caches: everything is aligned, and the rows are too many to stay in them.
template <class C>
TD_INLINE bool rows_can_stream(const Rows& rows, int64_t bytes, int64_t threshold) {
  const int64_t size = item_size(rows.dtype);
  const uint64_t offsets =
      reinterpret_cast<uint64_t>(rows.data) | uint64_t(rows.batch_stride * size) | uint64_t(rows.token_stride * size);
  return rows.data != nullptr && bytes >= threshold && offsets % uint64_t(kLanes<C> * size) == 0;
}

}  // namespace td::TD_ISA
