// SPDX-License-Identifier: Apache-2.0
// The rotation of one token, laid out for vector registers and kept up to date while walking along the sequence.
#pragma once

#include "core/rope3d.h"
#include "cpu/vec.h"

namespace td::TD_ISA {

constexpr int kMaxHeadDim = 1024;
constexpr int64_t kParallelBytes = 64 << 10;  // work worth a thread of its own

template <class C>
class RopeRow {
 public:
  TD_INLINE RopeRow(const RopeArgs& args, int64_t token)
      : args_(args), cursor_(args.segments, args.segment_count, args.token_offset + token) {
    refresh(3);
  }

  TD_INLINE void advance() { refresh(cursor_.advance()); }

  // Pairs are (x[2i], x[2i+1]); out may be x itself. Stream: bypass the caches (out is aligned).
  template <bool Stream, class T>
  TD_INLINE void rotate_interleaved(const T* x, T* out) const {
    constexpr int lanes = kLanes<C>;
    int d = 0;
    for (; d + lanes <= args_.dim; d += lanes) {
      const Vec<C> v = load(x + d);
      put<Stream>(out + d, v * load(cos_ + d) + swap_pairs(v) * load(sin_ + d));
    }
    if (const int rest = args_.dim - d; rest > 0) {
      const Vec<C> v = load_part(x + d, rest);
      store_part(out + d, v * load(cos_ + d) + swap_pairs(v) * load(sin_ + d), rest);
    }
  }

  // Pairs are (x[i], x[i + dim / 2]); out may be x itself.
  template <bool Stream, class T>
  TD_INLINE void rotate_halves(const T* x, T* out) const {
    constexpr int lanes = kLanes<C>;
    const int half = args_.dim / 2;
    int d = 0;
    for (; d + lanes <= half; d += lanes) {
      const Vec<C> a = load(x + d), b = load(x + half + d), c = load(cos_ + d), s = load(sin_ + d);
      put<Stream>(out + d, a * c - b * s);
      put<Stream>(out + half + d, b * c + a * s);
    }
    if (const int rest = half - d; rest > 0) {
      const Vec<C> a = load_part(x + d, rest), b = load_part(x + half + d, rest), c = load(cos_ + d),
                   s = load(sin_ + d);
      store_part(out + d, a * c - b * s, rest);
      store_part(out + half + d, b * c + a * s, rest);
    }
  }

 private:
  // Copies the rows of the last `axes` axes into the buffers. Interleaved: every cos twice, and (-sin, sin).
  TD_INLINE void refresh(int axes) {
    int at = args_.dim / 2;
    const C sign = args_.inverse ? C(-1) : C(1);
    for (int axis = 2; axis >= 3 - axes; --axis) {
      const int count = args_.pairs[axis];
      at -= count;
      const int64_t row = cursor_.row(axis, args_.pairs);
      const C* c = static_cast<const C*>(args_.cos) + row;
      const C* s = static_cast<const C*>(args_.sin) + row;
      if (args_.interleaved) {
        for (int i = 0; i < count; ++i) {
          cos_[2 * (at + i)] = cos_[2 * (at + i) + 1] = c[i];
          sin_[2 * (at + i)] = -sign * s[i];
          sin_[2 * (at + i) + 1] = sign * s[i];
        }
      } else {
        for (int i = 0; i < count; ++i) {
          cos_[at + i] = c[i];
          sin_[at + i] = sign * s[i];
        }
      }
    }
  }

  const RopeArgs& args_;
  RopeCursor cursor_;
  // One vector of slack: tails load a whole register.
  alignas(64) C cos_[kMaxHeadDim + kLanes<C>] = {};
  alignas(64) C sin_[kMaxHeadDim + kLanes<C>] = {};
};

}  // namespace td::TD_ISA
