// SPDX-License-Identifier: Apache-2.0
// A row of numbers to eight-bit codes and a scale, see core/eight_bit.h.
#pragma once

#include "core/eight_bit.h"
#include "cpu/vec.h"

namespace td::TD_ISA {

typedef uint8_t ByteVec __attribute__((vector_size(TD_VEC_BYTES / 4)));
typedef int32_t IntVec __attribute__((vector_size(TD_VEC_BYTES)));

// To the nearest even integer. The product in front of it must not be fused with an addition, hence the instruction.
TD_INLINE IntVec to_int(FloatVec v) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
  return (IntVec)_mm_cvtps_epi32((__m128)v);
#else
  IntVec result;
  for (int i = 0; i < kLanes<float>; ++i) result[i] = int32_t(std::nearbyint(v[i]));
  return result;
#endif
}

// Like int8_code and float8_code, of numbers that are not beyond the largest code by more than rounding.
TD_INLINE WordVec int8_codes(FloatVec v) {
  const IntVec code = to_int(v);
  return (WordVec)(code > 127 ? IntVec{} + 127 : code < -127 ? IntVec{} - 127 : code);
}
TD_INLINE WordVec float8_codes(FloatVec v) {
  const WordVec bits = (WordVec)v, magnitude = bits & 0x7fffffffu;
  const WordVec small = (WordVec)((FloatVec)magnitude + 16384.0f) - 0x46800000u;
  const WordVec normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
  const WordVec most = magnitude > 0x7f800000u ? WordVec{} + 0x7fu : WordVec{} + 0x7eu;
  const WordVec large = normal > 0x7eu ? most : normal;
  return (bits >> 24 & 0x80u) | (magnitude < 0x3c800000u ? small : large);
}

// The lowest byte of every lane. (As a conversion of vectors GCC 12 takes them out one by one.)
TD_INLINE ByteVec low_bytes(WordVec v) {
#if defined(__AVX512F__)
  return (ByteVec)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
  const __m256i first =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m256i each = _mm256_shuffle_epi8((__m256i)v, first);  // four bytes at the begin of either half
  const int64_t both =
      _mm_cvtsi128_si64(_mm_unpacklo_epi32(_mm256_castsi256_si128(each), _mm256_extracti128_si256(each, 1)));
  return (ByteVec)both;
#elif defined(__SSE2__)
  const __m128i low = _mm_and_si128((__m128i)v, _mm_set1_epi32(0xff));
  const __m128i words = _mm_packs_epi32(low, low);
  const int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
  return (ByteVec)bytes;
#else
  return __builtin_convertvector(v, ByteVec);
#endif
}

TD_INLINE void store_codes(uint8_t* target, WordVec codes, Whole) {
  const ByteVec bytes = low_bytes(codes);
  std::memcpy(target, &bytes, sizeof bytes);
}
TD_INLINE void store_codes(uint8_t* target, WordVec codes, Part part) {
  const ByteVec bytes = low_bytes(codes);
  std::memcpy(target, &bytes, size_t(part.count));
}

// Codes of a row of any storage type but double; its scale is returned.
template <class T>
TD_INLINE float code_row(const T* row, int dim, EightBit kind, uint8_t* codes) {
  WordVec largest{};
  for_vectors<float>(dim, [&](int i, auto part) {
    const WordVec magnitude = (WordVec)load(row + i, part) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  });
  uint32_t most = 0;
  for (int i = 0; i < kLanes<float>; ++i) most = largest[i] > most ? largest[i] : most;
  const RowScale scale(most, kind);
  if (kind == EightBit::int8) {
    for_vectors<float>(
        dim, [&](int i, auto part) { store_codes(codes + i, int8_codes(load(row + i, part) * scale.factor), part); });
  } else {
    for_vectors<float>(
        dim, [&](int i, auto part) { store_codes(codes + i, float8_codes(load(row + i, part) * scale.factor), part); });
  }
  return scale.scale;
}

// Codes of token n of sample b.
template <class T>
TD_INLINE void code_row(const CodeRows& rows, int64_t b, int64_t n, const T* row, int dim) {
  uint8_t* target = rows.data + b * rows.batch_stride + n * rows.token_stride;
  rows.scales[b * rows.scale_batch_stride + n * rows.scale_token_stride] = code_row(row, dim, rows.kind, target);
}

}  // namespace td::TD_ISA
