// SPDX-License-Identifier: Apache-2.0
// The three products of attention over few keys. A block is kLanes tokens of one head; scores are kept with the tokens
// in the lanes ([key][token]), so that the softmax over keys needs no sum across a register.
#pragma once

#include "cpu/vec_math.h"

namespace td::TD_ISA {

#if defined(TD_ISA_avx512)  // 32 registers
constexpr int kKeyBlock = 6, kRowBlock = 4;
#else
constexpr int kKeyBlock = 2, kRowBlock = 2;
#endif

// scores[c][t] = rows[t] . keys[c] for KC keys. `next`: rows to fetch meanwhile, or null.
template <int KC, class T, class C>
TD_INLINE void dot_keys(const T* const* rows, const C* keys, int64_t key_stride, int vecs, const T* const* next,
                        C* scores) {
  constexpr int lanes = kLanes<C>, group = lanes < 4 ? lanes : 4, groups = lanes / group;
  Vec<C> parts[KC][groups];
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g) {
    if (next != nullptr) {
      for (int t = 0; t < group; ++t)
        for (int d = 0; d < vecs * lanes; d += 64 / int(sizeof(T))) __builtin_prefetch(next[g * group + t] + d, 0, 2);
    }
    Vec<C> acc[KC][group] = {};
    for (int i = 0; i < vecs; ++i) {
      Vec<C> x[group];
#pragma GCC unroll 4
      for (int t = 0; t < group; ++t) {
        x[t] = load(rows[g * group + t] + i * lanes);
      }
#pragma GCC unroll 8
      for (int c = 0; c < KC; ++c) {
        const Vec<C> key = load(keys + c * key_stride + i * lanes);
#pragma GCC unroll 4
        for (int t = 0; t < group; ++t) acc[c][t] += x[t] * key;
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < KC; ++c) parts[c][g] = fold_all<C, 1, group>(acc[c]);
  }
#pragma GCC unroll 8
  for (int c = 0; c < KC; ++c) store(scores + c * lanes, fold_all<C, group, groups>(parts[c]));
}

// scores[a][t] = rows[t] . keys[a] for all `count` keys. Rows and keys hold `vecs` full registers.
template <class T, class C>
void dot_rows(const T* const* rows, const C* keys, int64_t key_stride, int count, int vecs, const T* const* next,
              C* scores) {
  for (int a = 0; a < count; a += kKeyBlock, next = nullptr) {
    const C* key = keys + a * key_stride;
    C* target = scores + a * kLanes<C>;
    switch (count - a) {
      case 1:
        dot_keys<1>(rows, key, key_stride, vecs, next, target);
        break;
#if defined(TD_ISA_avx512)
      case 2:
        dot_keys<2>(rows, key, key_stride, vecs, next, target);
        break;
      case 3:
        dot_keys<3>(rows, key, key_stride, vecs, next, target);
        break;
      case 4:
        dot_keys<4>(rows, key, key_stride, vecs, next, target);
        break;
      case 5:
        dot_keys<5>(rows, key, key_stride, vecs, next, target);
        break;
#endif
      default:
        dot_keys<kKeyBlock>(rows, key, key_stride, vecs, next, target);
    }
  }
}

template <bool Stream, int DV, class T, class C>
TD_INLINE void mix_columns(const C* p, int count, const C* keys, int64_t key_stride, T* const* out, int64_t d,
                           int tokens, int part) {
  constexpr int lanes = kLanes<C>;
  for (int t = 0; t < tokens; t += kRowBlock) {
    Vec<C> acc[kRowBlock][DV] = {};
    for (int a = 0; a < count; ++a) {
      Vec<C> value[DV];
#pragma GCC unroll 4
      for (int i = 0; i < DV; ++i) value[i] = load(keys + a * key_stride + d + i * lanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRowBlock; ++r) {
        const Vec<C> weight = splat(p[a * lanes + t + r]);
#pragma GCC unroll 4
        for (int i = 0; i < DV; ++i) acc[r][i] += weight * value[i];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRowBlock; ++r) {
      if (t + r >= tokens) break;
      if (part > 0) {
        store_part(out[t + r] + d, acc[r][0], part);
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < DV; ++i) put<Stream>(out[t + r] + d + i * lanes, acc[r][i]);
      }
    }
  }
}

// out[t] = sum over keys of p[a][t] * keys[a], for the first `tokens` rows, rounded to the type of out.
template <bool Stream, class T, class C>
void mix_rows(const C* p, int count, const C* keys, int64_t key_stride, int64_t dim, T* const* out, int tokens) {
  constexpr int lanes = kLanes<C>;
  int64_t d = 0;
  for (; d + 4 * lanes <= dim; d += 4 * lanes) mix_columns<Stream, 4>(p, count, keys, key_stride, out, d, tokens, 0);
  for (; d + lanes <= dim; d += lanes) mix_columns<Stream, 1>(p, count, keys, key_stride, out, d, tokens, 0);
  if (d < dim) mix_columns<Stream, 1>(p, count, keys, key_stride, out, d, tokens, int(dim - d));
}

template <int KC, int DV, class C>
TD_INLINE void gather_columns(const C* weights, const C* const* rows, C* target, int64_t target_stride, int64_t d) {
  constexpr int lanes = kLanes<C>;
  Vec<C> acc[KC][DV];
#pragma GCC unroll 4
  for (int c = 0; c < KC; ++c)
#pragma GCC unroll 4
    for (int i = 0; i < DV; ++i) acc[c][i] = load(target + c * target_stride + d + i * lanes);
  for (int t = 0; t < lanes; ++t) {
    Vec<C> row[DV];
#pragma GCC unroll 4
    for (int i = 0; i < DV; ++i) row[i] = load(rows[t] + d + i * lanes);
#pragma GCC unroll 4
    for (int c = 0; c < KC; ++c) {
      const Vec<C> weight = splat(weights[c * lanes + t]);
#pragma GCC unroll 4
      for (int i = 0; i < DV; ++i) acc[c][i] += weight * row[i];
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < KC; ++c)
#pragma GCC unroll 4
    for (int i = 0; i < DV; ++i) store(target + c * target_stride + d + i * lanes, acc[c][i]);
}

template <int KC, class C>
TD_INLINE void gather_keys(const C* weights, const C* const* rows, int64_t vecs, C* target, int64_t target_stride) {
  constexpr int lanes = kLanes<C>;
  int64_t i = 0;
  for (; i + 4 <= vecs; i += 4) gather_columns<KC, 4>(weights, rows, target, target_stride, i * lanes);
  for (; i < vecs; ++i) gather_columns<KC, 1>(weights, rows, target, target_stride, i * lanes);
}

// target[a] += sum over the tokens of the block of weights[a][t] * rows[t].
template <class C>
void gather_rows(const C* weights, int count, const C* const* rows, int64_t vecs, C* target, int64_t target_stride) {
  int a = 0;
  for (; a + kRowBlock <= count; a += kRowBlock)
    gather_keys<kRowBlock>(weights + a * kLanes<C>, rows, vecs, target + a * target_stride, target_stride);
  for (; a < count; ++a) gather_keys<1>(weights + a * kLanes<C>, rows, vecs, target + a * target_stride, target_stride);
}

}  // namespace td::TD_ISA
