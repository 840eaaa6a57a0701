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
    if (args_.interleaved) {
      for_vectors<C>(args_.dim, [&](int d, auto part) { put(d, swapped(get, d, part), part); });
    } else {
      rotate_halves(get, put);
    }
  }

  // The same where finish(d, v, part) is what is stored: registers that lie side by side go together.
  template <bool Stream, class T, class Get, class Finish>
  TD_INLINE void rotate_into(T* out, const Get& get, const Finish& finish) const {
    const auto keep = [&](int d, auto v, auto part) { put<Stream>(out + d, finish(d, v, part), part); };
    if (!args_.interleaved) return rotate_halves(get, keep);
    constexpr int lanes = kLanes<C>;
    int d = 0;
    for (; d + 2 * lanes <= args_.dim; d += 2 * lanes) {
      const Vec<C> low = finish(d, swapped(get, d, Whole{}), Whole{});
      const Vec<C> high = finish(d + lanes, swapped(get, d + lanes, Whole{}), Whole{});
      put_two<Stream>(out + d, low, high);
    }
    for_vectors<C>(args_.dim - d, [&](int i, auto part) { keep(d + i, swapped(get, d + i, part), part); });
  }
  template <bool Stream, class T, class Get>
  TD_INLINE void rotate_into(T* out, const Get& get) const {
    rotate_into<Stream>(out, get, [](int, auto v, auto) { return v; });
  }

 private:
  // Pairs are (x[2i], x[2i+1]).
  template <class Get, class Portion>
  TD_INLINE Vec<C> swapped(const Get& get, int d, Portion part) const {
    const Vec<C> v = get(d, part);
    return v * load(cos_ + d) + swap_pairs(v) * load(sin_ + d);
  }
  // Pairs are (x[i], x[i + dim / 2]).
  template <class Get, class Put>
  TD_INLINE void rotate_halves(const Get& get, const Put& put) const {
    const int half = args_.dim / 2;
    for_vectors<C>(half, [&](int d, auto part) {
      const Vec<C> a = get(d, part), b = get(half + d, part), c = load(cos_ + d), s = load(sin_ + d);
      put(d, a * c - b * s, part);
      put(half + d, b * c + a * s, part);
    });
  }

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

// The result can bypass the caches: heads, and their halves in half-split pairing, begin with a line (registers may be
// stored two at a time), and it is too large to stay.
template <class T>
bool rope_can_stream(const RopeArgs& args) {
  const int64_t bytes = args.batch * args.tokens * args.heads * args.dim * int64_t(sizeof(T));
  uint64_t offsets = reinterpret_cast<uint64_t>(args.out) | uint64_t(args.dim / 2) * sizeof(T);
  for (const int64_t stride : args.out_strides) offsets |= uint64_t(stride) * sizeof(T);
  return bytes >= stream_threshold() && args.out != args.x && offsets % kLineBytes == 0;
}

}  // namespace td::TD_ISA
