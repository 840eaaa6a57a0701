// SPDX-License-Identifier: Apache-2.0
// What one thread of audio_attention works with: its part of the workspace, the audio of a frame packed for vector
// loads, and blocks of query rows in compute precision.
#pragma once

#include "core/audio_attention.h"
#include "cpu/audio_rows.h"

namespace td::TD_ISA {

// A block of kLanes token rows of one head as compute precision with whole registers. Rows that already are that are
// used in place; others are converted into `staging`. Rows beyond `count` repeat the last one.
template <class T>
struct RowBlock {
  using C = compute_t<T>;
  const C* rows[kLanes<C>];

  TD_INLINE void set(const T* first, int64_t stride, int count, int64_t dim, int64_t padded, C* staging) {
    constexpr int lanes = kLanes<C>;
    if constexpr (std::is_same_v<T, C>) {
      if (dim % lanes == 0) {
        for (int t = 0; t < lanes; ++t) rows[t] = first + (t < count ? t : count - 1) * stride;
        return;
      }
    }
    for (int t = 0; t < lanes; ++t) {
      rows[t] = staging + (t < count ? t : count - 1) * padded;
      if (t >= count) continue;
      const T* source = first + t * stride;
      C* target = staging + t * padded;
      int64_t d = 0;
      for (; d + lanes <= dim; d += lanes) store(target + d, load(source + d));
      if (d < dim) store(target + d, load_part(source + d, int(dim - d)));
    }
  }
};

// Keys and values of the heads [first_head, end_head) that the tokens of one frame attend to,
// in the order speaker, frame, audio token, without those beyond their length.
template <class T>
struct PackedAudio {
  using C = compute_t<T>;
  C* keys;
  C* values;
  int64_t stride;  // of a key
  int64_t count;   // keys per head
  int64_t speaker_end[kMaxSpeakers];

  TD_INLINE void count_keys(const AudioAttentionArgs& args, int64_t b, int64_t frame) {
    const FrameRange range = audio_frames(args, frame);
    count = 0;
    for (int64_t p = 0; p < args.speakers; ++p) {
      for (int64_t f = range.first; f < range.end; ++f) count += audio_len(args, b, p, f);
      speaker_end[p] = count;
    }
  }

  // `InSteps`: keys lie in the order in which DotStep<T> reads rows.
  template <bool InSteps = false>
  TD_INLINE void fill(const AudioAttentionArgs& args, int64_t b, int64_t frame, int64_t first_head, int64_t end_head) {
    count_keys(args, b, frame);
    const FrameRange range = audio_frames(args, frame);
    for (int64_t h = first_head; h < end_head; ++h) {
      int64_t at = (h - first_head) * count * stride;
      for (int64_t p = 0; p < args.speakers; ++p) {
        for (int64_t f = range.first; f < range.end; ++f) {
          const T* k = static_cast<const T*>(args.k) + offset(args.k_strides, b, p, f, h);
          const T* v = static_cast<const T*>(args.v) + offset(args.v_strides, b, p, f, h);
          const int64_t len = audio_len(args, b, p, f);
          for (int64_t a = 0; a < len; ++a, at += stride) {
            copy<InSteps>(k + a * args.k_strides[3], keys + at, args.dim);
            copy<false>(v + a * args.v_strides[3], values + at, args.dim);
          }
        }
      }
    }
  }

 private:
  static TD_INLINE int64_t offset(const int64_t* strides, int64_t b, int64_t p, int64_t f, int64_t h) {
    return b * strides[0] + p * strides[1] + f * strides[2] + h * strides[4];
  }
  template <bool InSteps>
  TD_INLINE void copy(const T* source, C* target, int64_t dim) const {
    constexpr int lanes = kLanes<C>;
    int64_t d = 0;
    if constexpr (InSteps) {
      using Step = DotStep<T>;
      for (; d < dim; d += Step::width)
        for (int part = 0; part < Step::parts; ++part) store(target + d + part * lanes, Step::read(source + d, part));
      return;
    }
    for (; d + lanes <= dim; d += lanes) store(target + d, load(source + d));
    if (d < dim) {
      store(target + d, load_part(source + d, int(dim - d)));
      d += lanes;
    }
    for (; d < stride; d += lanes) store(target + d, Vec<C>{});
  }
};

// The private part of a thread.
template <class T>
struct AudioScratch {
  using C = compute_t<T>;
  PackedAudio<T> packed;
  C *scores, *staging;            // [keys][16], [16][dim]
  C *grad_scores, *grad_staging;  // backward only

  TD_INLINE AudioScratch(const AudioAttentionArgs& args, const AudioWorkspace& sizes, int64_t slot, bool backward) {
    C* at = static_cast<C*>(args.workspace) + slot * sizes.slot;
    const auto take = [&at](int64_t elements) {
      C* part = at;
      at += elements;
      return part;
    };
    packed.stride = sizes.dim;
    packed.keys = take(sizes.head_group * sizes.keys * sizes.dim);
    packed.values = take(sizes.head_group * sizes.keys * sizes.dim);
    scores = take(sizes.keys * AudioWorkspace::kAlign);
    staging = take(AudioWorkspace::kAlign * sizes.dim);
    grad_scores = backward ? take(sizes.keys * AudioWorkspace::kAlign) : nullptr;
    grad_staging = backward ? take(AudioWorkspace::kAlign * sizes.dim) : nullptr;
  }
};

// Softmax over the keys [first, end) of a block of scores, in place.
template <class C>
TD_INLINE void softmax_keys(C* scores, int64_t first, int64_t end) {
  constexpr int lanes = kLanes<C>;
  if (first == end) return;
  Vec<C> highest = load(scores + first * lanes);
  for (int64_t a = first + 1; a < end; ++a) highest = maximum(highest, load(scores + a * lanes));
  Vec<C> total{};
  for (int64_t a = first; a < end; ++a) {
    const Vec<C> e = exp_negative(load(scores + a * lanes) - highest);
    total += e;
    store(scores + a * lanes, e);
  }
  const Vec<C> inverse = C(1) / total;
  for (int64_t a = first; a < end; ++a) store(scores + a * lanes, load(scores + a * lanes) * inverse);
}

// Weights of a speaker for `count` tokens from `token` on; one where there are none.
template <class C>
TD_INLINE Vec<C> speaker_weights(const AudioAttentionArgs& args, int64_t b, int64_t p, int64_t token, int count) {
  if (args.weights == nullptr) return splat(C(1));
  const C* source =
      static_cast<const C*>(args.weights) + b * args.weight_strides[0] + p * args.weight_strides[1] + token;
  return count >= kLanes<C> ? load(source) : load_part(source, count);
}

}  // namespace td::TD_ISA
