// SPDX-License-Identifier: Apache-2.0
// The three products of attention over few keys. A block is kLanes tokens of one head; scores are kept with the tokens
// in the lanes ([key][token]), so that the softmax over keys needs no sum across a register.
#pragma once

#include "cpu/vec_math.h"

namespace td::TD_ISA {

// Keys and tokens of a block of dot products: their sums, the rows and a key are in registers together. Rows are read
// once for all keys of a block.
constexpr int kKeyBlock = 6, kTokenBlock = TD_VEC_BYTES == 64 ? 4 : 2;
constexpr int kRowBlock = TD_VEC_BYTES == 64 ? 4 : 2;

// What a dot product takes in one step of `width` elements: `parts` registers of a row against as many of a key. A
// register has two bfloat16 per lane: the even ones are a shift away and the odd ones a mask, and keys are stored in
// that order. (AVX-512's product of such pairs took as long as four of float32 on the one processor measured.)
template <class T>
struct DotStep {
  using C = compute_t<T>;
  static constexpr int parts = 1, width = kLanes<C>;
  static TD_INLINE Vec<C> read(const T* source, int) { return load(source); }
};
template <>
struct DotStep<bf16> {
  static constexpr int parts = 2, width = 2 * kLanes<float>;
  static TD_INLINE FloatVec read(const bf16* source, int part) {
    WordVec pair;
    std::memcpy(&pair, source, sizeof pair);
    return (FloatVec)(part == 0 ? pair << 16 : pair & 0xffff0000u);
  }
};

// scores[c][t] = scale * rows[t] . keys[c] for KC keys. `next`: rows to fetch meanwhile, or null.
template <int KC, class T, class C>
TD_INLINE void dot_keys(const T* const* rows, const C* keys, int64_t key_stride, int dim, C scale, const T* const* next,
                        C* scores) {
  using Step = DotStep<T>;
  constexpr int lanes = kLanes<C>, group = lanes < kTokenBlock ? lanes : kTokenBlock, groups = lanes / group;
  Vec<C> parts[KC][groups];
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g) {
    Vec<C> acc[KC][group] = {};
    for (int d = 0; d < dim; d += Step::width) {
      if (next != nullptr && d % (64 / int(sizeof(T))) == 0) {
#pragma GCC unroll 4
        for (int t = 0; t < group; ++t) __builtin_prefetch(next[g * group + t] + d, 0, 2);
      }
#pragma GCC unroll 2
      for (int part = 0; part < Step::parts; ++part) {
        Vec<C> x[group];
#pragma GCC unroll 4
        for (int t = 0; t < group; ++t) x[t] = Step::read(rows[g * group + t] + d, part);
#pragma GCC unroll 8
        for (int c = 0; c < KC; ++c) {
          const Vec<C> key = load(keys + c * key_stride + d + part * lanes);
#pragma GCC unroll 4
          for (int t = 0; t < group; ++t) acc[c][t] += x[t] * key;
        }
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < KC; ++c) parts[c][g] = fold_all<C, 1, group>(acc[c]);
  }
#pragma GCC unroll 8
  for (int c = 0; c < KC; ++c) store(scores + c * lanes, fold_all<C, group, groups>(parts[c]) * scale);
}

// scores[a][t] = scale * rows[t] . keys[a] for all `count` keys. Rows and keys hold `dim` elements in full registers.
template <class T, class C>
void dot_rows(const T* const* rows, const C* keys, int64_t key_stride, int count, int dim, C scale,
              const T* const* next, C* scores) {
  for (int a = 0; a < count; a += kKeyBlock, next = nullptr) {
    const C* key = keys + a * key_stride;
    C* target = scores + a * kLanes<C>;
    switch (count - a) {
      case 1:
        dot_keys<1>(rows, key, key_stride, dim, scale, next, target);
        break;
      case 2:
        dot_keys<2>(rows, key, key_stride, dim, scale, next, target);
        break;
      case 3:
        dot_keys<3>(rows, key, key_stride, dim, scale, next, target);
        break;
      case 4:
        dot_keys<4>(rows, key, key_stride, dim, scale, next, target);
        break;
      case 5:
        dot_keys<5>(rows, key, key_stride, dim, scale, next, target);
        break;
      default:
        dot_keys<kKeyBlock>(rows, key, key_stride, dim, scale, next, target);
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
        for (int i = 0; i + 2 <= DV; i += 2) put_two<Stream>(out[t + r] + d + i * lanes, acc[r][i], acc[r][i + 1]);
        if constexpr (DV % 2 == 1) put<Stream>(out[t + r] + d + (DV - 1) * lanes, acc[r][DV - 1]);
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
