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

// gelu(x) = x / (1 + exp(-v)), v = 2 sqrt(2 / pi) (x + 0.044715 x^3). The exponential is taken of -|v|, which cannot
// overflow: for v < 0 both sides of the fraction are multiplied with exp(v).
constexpr float kGeluFactor = 1.5957691216057308f, kGeluCubic = 0.044715f;
TD_INLINE FloatVec gelu(FloatVec x) {
  const FloatVec v = (x + x * x * x * kGeluCubic) * kGeluFactor;
  const FloatVec e = exp_negative(v > 0.0f ? -v : v);
  const FloatVec result = (v < 0.0f ? x * e : x) / (e + 1.0f);
  return x != x ? x : result;
}
// Its derivative s + x s (1 - s) v', where s = 1 / (1 + exp(-v)). Beyond 20 it is 0 or 1, and there x^2 may overflow.
TD_INLINE FloatVec gelu_slope(FloatVec x) {
  const FloatVec near = x > 20.0f ? splat(20.0f) : x < -20.0f ? splat(-20.0f) : x;
  const FloatVec square = near * near;
  const FloatVec v = (near + near * square * kGeluCubic) * kGeluFactor;
  const FloatVec e = exp_negative(v > 0.0f ? -v : v);
  const FloatVec inverse = 1.0f / (e + 1.0f);
  const FloatVec steep = near * (square * (3.0f * kGeluCubic) + 1.0f) * kGeluFactor;  // x v'
  const FloatVec result = ((v < 0.0f ? e : splat(1.0f)) + steep * e * inverse) * inverse;
  return x != x ? x : result;
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
