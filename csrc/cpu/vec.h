// SPDX-License-Identifier: Apache-2.0
// One vector register of the instruction set being compiled for, with conversions from and to every storage type.
// Compiler vector types carry the arithmetic (+ - * and comparisons work on them), so the same source serves SSE2,
// AVX2, AVX-512 and NEON. Everything lives in the namespace of the instruction set.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__AVX512F__)
#define TD_VEC_BYTES 64
#elif defined(__AVX2__)
#define TD_VEC_BYTES 32
#else
#define TD_VEC_BYTES 16
#endif

namespace td::TD_ISA {

typedef float FloatVec __attribute__((vector_size(TD_VEC_BYTES)));
typedef double DoubleVec __attribute__((vector_size(TD_VEC_BYTES)));
typedef uint32_t WordVec __attribute__((vector_size(TD_VEC_BYTES)));
typedef uint16_t HalfVec __attribute__((vector_size(TD_VEC_BYTES / 2)));

// Arithmetic vector for a compute type (float or double): Vec<C>, with kLanes<C> elements.
template <class C>
struct VecOf;
template <>
struct VecOf<float> {
  using type = FloatVec;
};
template <>
struct VecOf<double> {
  using type = DoubleVec;
};
template <class C>
using Vec = typename VecOf<C>::type;
template <class C>
constexpr int kLanes = TD_VEC_BYTES / int(sizeof(C));

template <class C>
TD_INLINE Vec<C> splat(C value) {
  return value - Vec<C>{};  // x - 0 is x whatever its sign, so that a broadcast is left of it; x + 0 is an addition
}

// ---- loads: kLanes elements of a storage type, unaligned ----
TD_INLINE FloatVec load(const float* source) {
  FloatVec v;
  std::memcpy(&v, source, sizeof v);
  return v;
}
TD_INLINE DoubleVec load(const double* source) {
  DoubleVec v;
  std::memcpy(&v, source, sizeof v);
  return v;
}
TD_INLINE FloatVec load(const bf16* source) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return (FloatVec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return (FloatVec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  HalfVec half;
  std::memcpy(&half, source, sizeof half);
  return (FloatVec)(__builtin_convertvector(half, WordVec) << 16);
#endif
}
TD_INLINE FloatVec load(const fp16* source) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__AVX2__)
  return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  FloatVec v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = float(source[i]);
  return v;
#endif
}

// ---- conversion of a float vector to 16-bit storage, rounded to nearest even ----
// As bfloat16 in the low halves of words; of numbers alone, or of NaN too.
TD_INLINE WordVec bf16_numbers(FloatVec v) {
  const WordVec word = (WordVec)v;
  return (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
}
TD_INLINE WordVec bf16_words(FloatVec v) {
  const WordVec nan = ((WordVec)v >> 16) | 0x40u;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256 is_nan = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  return (WordVec)_mm256_blendv_ps((__m256)bf16_numbers(v), (__m256)nan, is_nan);
#else
  const WordVec is_nan = (WordVec)(v != v);
  return (is_nan & nan) | (~is_nan & bf16_numbers(v));
#endif
}
TD_INLINE HalfVec to_bf16(FloatVec v) {
#if defined(__AVX512BF16__)
  return (HalfVec)_mm512_cvtneps_pbh((__m512)v);
#elif defined(__AVX512F__)
  const __m512i bits = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 is_nan512 = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i safe = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), is_nan512, _mm512_set1_epi32(0x7fc0));
  return (HalfVec)_mm512_cvtepi32_epi16(safe);
#elif defined(__AVX2__)
  const __m256i result = (__m256i)bf16_words(v);
  return (HalfVec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0xd8));
#else
  return __builtin_convertvector(bf16_words(v), HalfVec);
#endif
}
TD_INLINE HalfVec to_fp16(FloatVec v) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (HalfVec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  HalfVec half;
  for (int i = 0; i < kLanes<float>; ++i) half[i] = fp16(v[i]).bits;
  return half;
#endif
}

// Asks for memory that will be read soon.
TD_INLINE void prefetch(const void* address) {
  __builtin_prefetch(address, 0, 2);
}

// ---- stores ----
TD_INLINE void store(float* target, FloatVec v) {
  std::memcpy(target, &v, sizeof v);
}
TD_INLINE void store(double* target, DoubleVec v) {
  std::memcpy(target, &v, sizeof v);
}
TD_INLINE void store(bf16* target, FloatVec v) {
  const HalfVec half = to_bf16(v);
  std::memcpy(target, &half, sizeof half);
}
TD_INLINE void store(fp16* target, FloatVec v) {
  const HalfVec half = to_fp16(v);
  std::memcpy(target, &half, sizeof half);
}

// ---- stores that bypass the caches, for results larger than the last one; `target` is aligned to the bytes stored
// ---- (a loop over them ends with stream_fence()), which are a line at most. Elsewhere than on x86 they are ordinary
// ---- stores.
constexpr int kLineBytes = 64;
TD_INLINE void stream_bytes(void* target, const void* source, int bytes) {
#if defined(__AVX512F__)
  if (bytes == 64) return _mm512_stream_si512(static_cast<__m512i*>(target), *static_cast<const __m512i*>(source));
#endif
#if defined(__AVX2__)
  if (bytes == 32) return _mm256_stream_si256(static_cast<__m256i*>(target), *static_cast<const __m256i*>(source));
#endif
#if defined(__SSE2__)
  if (bytes == 16) return _mm_stream_si128(static_cast<__m128i*>(target), *static_cast<const __m128i*>(source));
#endif
  std::memcpy(target, source, size_t(bytes));
}
TD_INLINE void stream(float* target, FloatVec v) {
  stream_bytes(target, &v, sizeof v);
}
TD_INLINE void stream(double* target, DoubleVec v) {
  stream_bytes(target, &v, sizeof v);
}
TD_INLINE void stream(bf16* target, FloatVec v) {
  const HalfVec half = to_bf16(v);
  stream_bytes(target, &half, sizeof half);
}
TD_INLINE void stream(fp16* target, FloatVec v) {
  const HalfVec half = to_fp16(v);
  stream_bytes(target, &half, sizeof half);
}
TD_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
template <bool Stream, class T, class V>
TD_INLINE void put(T* target, V v) {
  if constexpr (Stream) {
    stream(target, v);
  } else {
    store(target, v);
  }
}

// Two registers of results that lie side by side: bfloat16 goes in one store, a whole line where registers have 64
// bytes.
template <bool Stream, class T, class V>
TD_INLINE void put_two(T* target, V low, V high) {
#if defined(__AVX512BF16__) || (defined(__AVX2__) && !defined(__AVX512F__))
  if constexpr (std::is_same_v<T, bf16>) {
#if defined(__AVX512BF16__)
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
    // One look for NaN at both.
    const bool nan = _mm256_movemask_ps(_mm256_cmp_ps((__m256)low, (__m256)high, _CMP_UNORD_Q)) != 0;
    const __m256i words[2] = {(__m256i)(__builtin_expect(nan, 0) ? bf16_words(low) : bf16_numbers(low)),
                              (__m256i)(__builtin_expect(nan, 0) ? bf16_words(high) : bf16_numbers(high))};
    // Packing takes the halves of registers one by one.
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(words[0], words[1]), 0xd8);
#endif
    if constexpr (Stream) {
      stream_bytes(target, &both, sizeof both);
    } else {
      std::memcpy(static_cast<void*>(target), &both, sizeof both);
    }
    return;
  }
#endif
  put<Stream>(target, low);
  put<Stream>(target + kLanes<compute_t<T>>, high);
}

// ---- the first `count` < kLanes elements; the rest reads as zero ----
template <class T>
TD_INLINE Vec<compute_t<T>> load_part(const T* source, int count) {
  T buffer[kLanes<compute_t<T>>];
  std::memset(static_cast<void*>(buffer), 0, sizeof buffer);
  std::memcpy(static_cast<void*>(buffer), source, size_t(count) * sizeof(T));
  return load(buffer);
}
template <class T>
TD_INLINE void store_part(T* target, Vec<compute_t<T>> v, int count) {
  T buffer[kLanes<compute_t<T>>];
  store(buffer, v);
  std::memcpy(static_cast<void*>(target), buffer, size_t(count) * sizeof(T));
}

// ---- rows: body(i, Whole{}) for every whole register of [0, n), body(i, Part{rest}) for what is left ----
struct Whole {};
struct Part {
  int count;
};
template <class C, class Body>
TD_INLINE void for_vectors(int n, const Body& body) {
  int i = 0;
  for (; i + kLanes<C> <= n; i += kLanes<C>) body(i, Whole{});
  if (i < n) body(i, Part{n - i});
}
template <class T>
TD_INLINE Vec<compute_t<T>> load(const T* source, Whole) {
  return load(source);
}
template <class T>
TD_INLINE Vec<compute_t<T>> load(const T* source, Part part) {
  return load_part(source, part.count);
}
template <bool Stream = false, class T>
TD_INLINE void put(T* target, Vec<compute_t<T>> v, Whole) {
  put<Stream>(target, v);
}
template <bool Stream = false, class T>
TD_INLINE void put(T* target, Vec<compute_t<T>> v, Part part) {
  store_part(target, v, part.count);
}

// ---- horizontal ----
TD_INLINE float sum(FloatVec v) {
  float lanes[kLanes<float>];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = kLanes<float> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
TD_INLINE double sum(DoubleVec v) {
  double lanes[kLanes<double>];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = kLanes<double> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// (a b c d ...) -> (b a d c ...)
TD_INLINE FloatVec swap_pairs(FloatVec v) {
#if TD_VEC_BYTES == 64
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif TD_VEC_BYTES == 32
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return __builtin_shufflevector(v, v, 1, 0, 3, 2);
#endif
}
TD_INLINE DoubleVec swap_pairs(DoubleVec v) {
#if TD_VEC_BYTES == 64
  return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#elif TD_VEC_BYTES == 32
  return __builtin_shufflevector(v, v, 1, 0, 3, 2);
#else
  return __builtin_shufflevector(v, v, 1, 0);
#endif
}

}  // namespace td::TD_ISA
