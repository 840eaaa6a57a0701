// SPDX-License-Identifier: Apache-2.0
// The rotation of one token, laid out for vector registers and kept up to date while walking along the sequence.
#pragma once

#include "core/parallel.h"
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

  // Rotates one head: get(d, part) reads elements d.., put(d, v, part) takes the rotated ones (part: Whole or Part). A
  // register is read before it is written, so both may work on the same memory.
  template <class Get, class Put>
  TD_INLINE void rotate(const Get& get, const Put& put) const {
    if (args_.interleaved) {  // pairs are (x[2i], x[2i+1])
      for_vectors<C>(args_.dim, [&](int d, auto part) {
        const Vec<C> v = get(d, part);
        put(d, v * load(cos_ + d) + swap_pairs(v) * load(sin_ + d), part);
      });
    } else {  // pairs are (x[i], x[i + dim / 2])
      const int half = args_.dim / 2;
      for_vectors<C>(half, [&](int d, auto part) {
        const Vec<C> a = get(d, part), b = get(half + d, part), c = load(cos_ + d), s = load(sin_ + d);
        put(d, a * c - b * s, part);
        put(half + d, b * c + a * s, part);
      });
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

// Registers of the result can bypass the caches: all of them are aligned (half a head lies between two registers in
// half-split pairing), and the result is too large to stay.
template <class T>
bool rope_can_stream(const RopeArgs& args) {
  const int64_t bytes = args.batch * args.tokens * args.heads * args.dim * int64_t(sizeof(T));
  uint64_t offsets = reinterpret_cast<uint64_t>(args.out) | uint64_t(args.dim / 2) * sizeof(T);
  for (const int64_t stride : args.out_strides) offsets |= uint64_t(stride) * sizeof(T);
  return bytes >= stream_threshold() && args.out != args.x && offsets % (kLanes<compute_t<T>> * sizeof(T)) == 0;
}

}  // namespace td::TD_ISA
