// SPDX-License-Identifier: Apache-2.0
// Functions of vector registers beyond arithmetic: exponential, maximum, sums across lanes of many registers at once.
#pragma once

#include <utility>

#include "cpu/vec.h"

namespace td::TD_ISA {

template <class V>
TD_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}

// exp(x) for x <= 0, within 1.5 units of the last place; below -87 it is zero.
TD_INLINE FloatVec exp_negative(FloatVec x) {
  const FloatVec clamped = maximum(x, splat(-87.0f));
  // n = round(x / ln 2): adding 1.5 * 2^23 leaves n in the low bits. ln 2 in two parts keeps the remainder exact.
  const FloatVec shifted = clamped * 1.44269504089f + 12582912.0f;
  const FloatVec n = shifted - 12582912.0f;
  const FloatVec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  FloatVec e = splat(1.9875691500e-4f);
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * r * r + r + 1.0f;
  const WordVec power = ((WordVec)shifted + (127u - 0x4b400000u)) << 23;
  const FloatVec result = e * (FloatVec)power;
  return x < -87.0f ? FloatVec{} : result;
}
TD_INLINE DoubleVec exp_negative(DoubleVec x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

namespace detail {
template <int W, class V, int... I>
TD_INLINE V fold(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = int(sizeof...(I));
  return __builtin_shufflevector(a, b, ((I & W) ? n + I : I)...) +
         __builtin_shufflevector(a, b, ((I & W) ? n + (I ^ W) : (I ^ W))...);
}
}  // namespace detail

// Lane i of the result: lanes i and i ^ W added up, of b where i has bit W, of a elsewhere.
template <class C, int W>
TD_INLINE Vec<C> fold(Vec<C> a, Vec<C> b) {
  return detail::fold<W>(a, b, std::make_integer_sequence<int, kLanes<C>>{});
}

// Folds Count registers into one with W, 2 W, 4 W ... With W = 1 and Count = kLanes, lane i is the sum of register i.
template <class C, int W, int Count>
TD_INLINE Vec<C> fold_all(Vec<C>* v) {
  if constexpr (Count == 1) {
    return v[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < Count / 2; ++i) v[i] = fold<C, W>(v[2 * i], v[2 * i + 1]);
    return fold_all<C, 2 * W, Count / 2>(v);
  }
}

}  // namespace td::TD_ISA
