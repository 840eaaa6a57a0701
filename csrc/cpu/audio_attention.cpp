// SPDX-License-Identifier: Apache-2.0
// A thread walks along its tokens. For every frame it packs the audio of a group of heads once; a block of tokens is
// then taken through all heads of the group, so that rows are read in the order they lie in memory.
#include "core/audio_attention.h"

#include "core/parallel.h"
#include "cpu/audio_pack.h"

namespace td::TD_ISA {
namespace {

constexpr int64_t kWorkPerThread = 16384;  // products worth a thread of its own

int64_t used_slots(const AudioAttentionArgs& args, int64_t rows) {
  const int64_t wanted = rows * args.dim / kWorkPerThread + 1;
  return wanted < args.slots ? wanted : args.slots;
}

AudioWorkspace workspace(const AudioAttentionArgs& args, bool backward) {
  return AudioWorkspace(args.speakers, args.frames, args.audio, args.heads, args.dim, args.window, args.batch,
                        args.slots, backward);
}

// `InSteps`: rows are multiplied as they are stored, in the steps of DotStep<T>.
template <class T, bool InSteps, bool Stream>
void forward_heads(const AudioAttentionArgs& args, AudioScratch<T>& scratch, int64_t b, int64_t first, int64_t end,
                   int64_t first_head, int64_t end_head) {
  using C = compute_t<T>;
  constexpr int lanes = kLanes<C>;
  const PackedAudio<T>& packed = scratch.packed;
  const int keys = int(packed.count);
  T* out[lanes];
  constexpr int64_t kTokens = 2 * lanes;  // that meet the keys of a head before the next head's take their place
  for (int64_t from = first; from < end; from += kTokens) {
    // While the heads are worked on, the rows of the next block are fetched in the order they lie in memory.
    const T* upcoming = static_cast<const T*>(args.q) + b * args.q_strides[0] + (from + kTokens) * args.q_strides[1];
    int64_t row_ahead = 0, head_ahead = first_head;
    for (int64_t h = first_head; h < end_head; ++h) {
      const int64_t at = (h - first_head) * packed.count * packed.stride;
      for (int64_t n = from; n < from + kTokens && n < end; n += lanes) {
        const int count = end - n < lanes ? int(end - n) : lanes;
        const T* q =
            static_cast<const T*>(args.q) + b * args.q_strides[0] + n * args.q_strides[1] + h * args.q_strides[2];
        if constexpr (InSteps) {
          const T *rows[lanes], *next[lanes];
          for (int t = 0; t < lanes; ++t) {
            rows[t] = q + (t < count ? t : count - 1) * args.q_strides[1];
            next[t] = upcoming + row_ahead * args.q_strides[1] + head_ahead * args.q_strides[2];
            if (++head_ahead == end_head) {
              head_ahead = first_head;
              ++row_ahead;
            }
          }
          dot_rows(rows, packed.keys + at, packed.stride, keys, int(args.dim), C(args.scale), next, scratch.scores);
        } else {
          RowBlock<T> block;
          block.set(q, args.q_strides[1], count, args.dim, packed.stride, scratch.staging);
          const int padded = int((args.dim + lanes - 1) / lanes) * lanes;
          dot_rows<C>(block.rows, packed.keys + at, packed.stride, keys, padded, C(args.scale), nullptr,
                      scratch.scores);
        }
        int64_t begin = 0;
        for (int64_t p = 0; p < args.speakers; ++p) {
          softmax_keys(scratch.scores, begin, packed.speaker_end[p]);
          if (args.weights != nullptr) {
            const Vec<C> weight = speaker_weights<C>(args, b, p, n, count);
            for (int64_t a = begin; a < packed.speaker_end[p]; ++a)
              store(scratch.scores + a * lanes, load(scratch.scores + a * lanes) * weight);
          }
          begin = packed.speaker_end[p];
        }
        for (int t = 0; t < count; ++t)
          out[t] = static_cast<T*>(args.out) + b * args.out_strides[0] + (n + t) * args.out_strides[1] +
                   h * args.out_strides[2];
        mix_rows<Stream>(scratch.scores, keys, packed.values + at, packed.stride, args.dim, out, count);
      }
    }
  }
}

template <class T, bool InSteps, bool Stream>
void forward(const AudioAttentionArgs& args) {
  const int64_t total = args.batch * args.tokens, slots = used_slots(args, total * args.heads);
  const AudioWorkspace sizes = workspace(args, false);
  parallel_for(slots, 1, [&](int64_t first_slot, int64_t end_slot) {
    for (int64_t slot = first_slot; slot < end_slot; ++slot) {
      AudioScratch<T> scratch(args, sizes, slot, false);
      const int64_t end = total * (slot + 1) / slots;
      for (int64_t at = total * slot / slots; at < end;) {
        const int64_t b = at / args.tokens, n = at - b * args.tokens;
        const int64_t frame = (args.token_offset + n) / args.tokens_per_frame;
        int64_t stop = audio_tokens(args, frame, frame + 1).end;
        if (stop - n > end - at) stop = n + end - at;
        for (int64_t h = 0; h < args.heads; h += sizes.head_group) {
          const int64_t end_head = h + sizes.head_group < args.heads ? h + sizes.head_group : args.heads;
          scratch.packed.template fill<InSteps>(args, b, frame, h, end_head);
          forward_heads<T, InSteps, Stream>(args, scratch, b, n, stop, h, end_head);
        }
        at += stop - n;
      }
    }
    if constexpr (Stream) stream_fence();
  });
}

// Probabilities and the gradients of q . k of a block, from scores and grad_scores = grad . v; the probabilities end up
// times the speaker's weight. Lanes beyond `count` become zero, they must not count in sums over tokens.
template <class T>
TD_INLINE void backward_scores(const AudioAttentionArgs& args, AudioScratch<T>& scratch, int64_t b, int64_t h,
                               int64_t n, int count) {
  using C = compute_t<T>;
  constexpr int lanes = kLanes<C>;
  C valid[lanes];
  for (int t = 0; t < lanes; ++t) valid[t] = t < count ? C(1) : C(0);
  int64_t begin = 0;
  for (int64_t p = 0; p < args.speakers; ++p) {
    const int64_t end = scratch.packed.speaker_end[p];
    softmax_keys(scratch.scores, begin, end);
    Vec<C> mean{};
    for (int64_t a = begin; a < end; ++a)
      mean += load(scratch.scores + a * lanes) * load(scratch.grad_scores + a * lanes);
    if (args.grad_weights != nullptr) {
      C* target = static_cast<C*>(args.grad_weights) + ((b * args.speakers + p) * args.heads + h) * args.tokens + n;
      store_part(target, mean, count);
    }
    const Vec<C> weight = speaker_weights<C>(args, b, p, n, count) * load(valid);
    for (int64_t a = begin; a < end; ++a) {
      const Vec<C> weighted = load(scratch.scores + a * lanes) * weight;
      const Vec<C> grad = weighted * (load(scratch.grad_scores + a * lanes) - mean);
      store(scratch.grad_scores + a * lanes, grad * C(args.scale));
      store(scratch.scores + a * lanes, weighted);
    }
    begin = end;
  }
}

// Gradient of q for the tokens of a frame, and the sums over these tokens for the gradients of k and v.
template <class T>
void backward_heads(const AudioAttentionArgs& args, AudioScratch<T>& scratch, const AudioWorkspace& sizes, int64_t b,
                    FrameRange tokens, int64_t first_head, int64_t end_head, compute_t<T>* partial) {
  using C = compute_t<T>;
  constexpr int lanes = kLanes<C>;
  const PackedAudio<T>& packed = scratch.packed;
  const int keys = int(packed.count);
  const int64_t stride = packed.stride;
  const int vecs = int((args.dim + lanes - 1) / lanes);
  RowBlock<T> q, grad;
  T* out[lanes];
  for (int64_t n = tokens.first; n < tokens.end; n += lanes) {
    const int count = tokens.end - n < lanes ? int(tokens.end - n) : lanes;
    for (int64_t h = first_head; h < end_head; ++h) {
      const int64_t at = (h - first_head) * packed.count * stride;
      C* grad_k = partial + (h - first_head) * sizes.partial;
      C* grad_v = grad_k + sizes.partial / 2;
      q.set(static_cast<const T*>(args.q) + b * args.q_strides[0] + n * args.q_strides[1] + h * args.q_strides[2],
            args.q_strides[1], count, args.dim, stride, scratch.staging);
      grad.set(static_cast<const T*>(args.grad_out) + b * args.grad_out_strides[0] + n * args.grad_out_strides[1] +
                   h * args.grad_out_strides[2],
               args.grad_out_strides[1], count, args.dim, stride, scratch.grad_staging);
      dot_rows<C>(q.rows, packed.keys + at, stride, keys, vecs * lanes, C(args.scale), nullptr, scratch.scores);
      dot_rows<C>(grad.rows, packed.values + at, stride, keys, vecs * lanes, C(1), nullptr, scratch.grad_scores);
      backward_scores(args, scratch, b, h, n, count);
      for (int t = 0; t < count; ++t)
        out[t] = static_cast<T*>(args.out) + b * args.out_strides[0] + (n + t) * args.out_strides[1] +
                 h * args.out_strides[2];
      mix_rows<false>(scratch.grad_scores, keys, packed.keys + at, stride, args.dim, out, count);
      gather_rows(scratch.grad_scores, keys, q.rows, vecs, grad_k, stride);
      gather_rows(scratch.scores, keys, grad.rows, vecs, grad_v, stride);
    }
  }
}

// Adds up what the frames that attend to the audio of `frame` have left, in the order of these frames.
template <class T>
void sum_partials(const AudioAttentionArgs& args, const AudioWorkspace& sizes, const compute_t<T>* partials, int64_t b,
                  int64_t frame, int64_t h) {
  using C = compute_t<T>;
  constexpr int lanes = kLanes<C>;
  const FrameRange range = audio_frames(args, frame);
  for (int64_t p = 0; p < args.speakers; ++p) {
    const int64_t len = audio_len(args, b, p, frame);
    for (int64_t a = 0; a < args.audio; ++a) {
      const int64_t at =
          ((((b * args.speakers + p) * args.frames + frame) * args.audio + a) * args.heads + h) * args.dim;
      T* targets[2] = {static_cast<T*>(args.grad_k) + at, static_cast<T*>(args.grad_v) + at};
      for (int side = 0; side < 2; ++side) {
        for (int64_t d = 0; d < args.dim; d += lanes) {
          Vec<C> total{};
          for (int64_t f = range.first; f < range.end && a < len; ++f) {
            // Where the tokens of frame f have packed this audio token.
            const FrameRange seen = audio_frames(args, f);
            int64_t key = a;
            for (int64_t s = 0; s <= p; ++s)
              for (int64_t g = seen.first; g < (s < p ? seen.end : frame); ++g) key += audio_len(args, b, s, g);
            const C* row = partials + ((b * args.frames + f) * args.heads + h) * sizes.partial +
                           side * (sizes.partial / 2) + key * sizes.dim;
            total += load(row + d);
          }
          if (d + lanes <= args.dim) {
            store(targets[side] + d, total);
          } else {
            store_part(targets[side] + d, total, int(args.dim - d));
          }
        }
      }
    }
  }
}

template <class T>
void backward(const AudioAttentionArgs& args) {
  using C = compute_t<T>;
  const int64_t total = args.batch * args.frames * args.heads;
  const int64_t slots = used_slots(args, args.batch * args.tokens * args.heads);
  const AudioWorkspace sizes = workspace(args, true);
  C* partials = static_cast<C*>(args.workspace) + args.slots * sizes.slot;
  parallel_for(slots, 1, [&](int64_t first_slot, int64_t end_slot) {
    for (int64_t slot = first_slot; slot < end_slot; ++slot) {
      AudioScratch<T> scratch(args, sizes, slot, true);
      const int64_t end = total * (slot + 1) / slots;
      for (int64_t at = total * slot / slots; at < end;) {
        const int64_t row = at / args.heads, h = at - row * args.heads, b = row / args.frames;
        const int64_t frame = row - b * args.frames;
        int64_t end_head = h + sizes.head_group < args.heads ? h + sizes.head_group : args.heads;
        if (end_head - h > end - at) end_head = h + end - at;
        C* partial = partials + at * sizes.partial;
        for (int64_t i = 0; i < (end_head - h) * sizes.partial; i += AudioWorkspace::kAlign)
          for (int j = 0; j < AudioWorkspace::kAlign; j += kLanes<C>) store(partial + i + j, Vec<C>{});
        const FrameRange tokens = audio_tokens(args, frame, frame + 1);
        if (tokens.first < tokens.end) {
          scratch.packed.fill(args, b, frame, h, end_head);
          backward_heads<T>(args, scratch, sizes, b, tokens, h, end_head, partial);
        }
        at += end_head - h;
      }
    }
  });
  parallel_for(total, 1 + 64 / (args.audio + 1), [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      const int64_t row = i / args.heads, b = row / args.frames;
      sum_partials<T>(args, sizes, partials, b, row - b * args.frames, i - row * args.heads);
    }
  });
}

template <class T>
bool can_stream(const AudioAttentionArgs& args) {
  const int64_t bytes = args.batch * args.tokens * args.heads * args.dim * int64_t(sizeof(T));
  uint64_t offsets = reinterpret_cast<uint64_t>(args.out) | uint64_t(args.dim) * sizeof(T);
  for (const int64_t stride : args.out_strides) offsets |= uint64_t(stride) * sizeof(T);
  return bytes >= stream_threshold() && offsets % kLineBytes == 0;
}

template <class T, bool Stream>
void forward_as(const AudioAttentionArgs& args) {
  if (args.dim % DotStep<T>::width == 0) return forward<T, true, Stream>(args);
  forward<T, false, Stream>(args);
}

}  // namespace

void audio_attention(const AudioAttentionArgs& args) {
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    can_stream<T>(args) ? forward_as<T, true>(args) : forward_as<T, false>(args);
  });
}

void audio_attention_backward(const AudioAttentionArgs& args) {
  dispatch_float(args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args); });
}

}  // namespace td::TD_ISA
