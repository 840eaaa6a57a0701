// SPDX-License-Identifier: Apache-2.0
// Any head dim, any number of keys, every type and any alignment: a warp per (token, head), or the whole block when a
// head is wide; lanes share the channels. The audio of a (frame, head) is staged in shared memory in tiles, and the
// softmax runs online over the tiles. Backward in two steps: the gradient of q, which leaves the statistics of the
// softmax behind, and the gradients of k and v, where a row of lanes owns one audio token of one head and walks over
// all tokens that attend to it: nothing is added atomically.
#pragma once

#include <cfloat>

#include "core/audio_attention.h"
#include "launch.cuh"

namespace td::cuda {

constexpr int kGeneralThreads = 256;
constexpr int kTokensPerBlock = 64;
constexpr int kTileBytes = 32768;  // keys and values of a tile

// Channels of a row that belong to one of its L lanes: lane, lane + L, ...
template <int L, int V, class C, class T>
__device__ __forceinline__ void load_row(C (&row)[V], const T* source, int64_t dim, int lane) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int d = lane + L * i;
    row[i] = d < dim ? C(source[d]) : C(0);
  }
}

template <int L, int V, class C, class T>
__device__ __forceinline__ void store_row(T* target, const C (&row)[V], int64_t dim, int lane) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int d = lane + L * i;
    if (d < dim) target[d] = T(row[i]);
  }
}

// Sum over the lanes of a row.
template <int L, class C>
__device__ __forceinline__ C row_sum(C value) {
  if constexpr (L == 32) {
    return warp_sum(value);
  } else {
    __shared__ C partial[32];
    return block_sum(value, partial);
  }
}

template <int L, int V, class C>
__device__ __forceinline__ C dot_row(const C (&row)[V], const C* key, int64_t dim, int lane) {
  C total = C(0);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int d = lane + L * i;
    if (d < dim) total += row[i] * key[d];
  }
  return row_sum<L>(total);
}

__device__ __forceinline__ float exponential(float x) {
  return expf(x);
}
__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}
__device__ __forceinline__ float lowest(float) {
  return -FLT_MAX;
}
__device__ __forceinline__ double lowest(double) {
  return -DBL_MAX;
}

// Which tokens a block of the first two kernels works on: one frame, one head, up to kTokensPerBlock tokens.
struct Place {
  int64_t b, h, frame;
  FrameRange tokens;
};

__device__ __forceinline__ Place place_of(const AudioAttentionArgs& args, uint32_t item, uint32_t chunks) {
  Place place;
  // 32 bits are enough (the launcher checks it): a division of 64 bits costs registers and time.
  const uint32_t heads = uint32_t(args.heads), per_frame = uint32_t(args.tokens_per_frame);
  const uint32_t first_frame = uint32_t(args.token_offset) / per_frame;
  const uint32_t frames = uint32_t(args.token_offset + args.tokens - 1) / per_frame - first_frame + 1;
  uint32_t rest = item / chunks;
  const uint32_t chunk = item - rest * chunks;
  const uint32_t row = rest / heads;
  place.h = rest - row * heads;
  place.b = row / frames;
  place.frame = first_frame + (row - uint32_t(place.b) * frames);
  place.tokens = audio_tokens(args, place.frame, place.frame + 1);
  place.tokens.first += int64_t(chunk) * kTokensPerBlock;
  if (place.tokens.first + kTokensPerBlock < place.tokens.end) place.tokens.end = place.tokens.first + kTokensPerBlock;
  return place;
}

template <class T>
__device__ __forceinline__ const T* audio_row(const void* base, const int64_t* strides, int64_t b, int64_t p, int64_t f,
                                              int64_t a, int64_t h) {
  return static_cast<const T*>(base) + b * strides[0] + p * strides[1] + f * strides[2] + a * strides[3] +
         h * strides[4];
}

// Stages keys (times scale) and values of audio tokens [first, first + count) of a frame.
template <class T, class C>
__device__ __forceinline__ void stage(const AudioAttentionArgs& args, const Place& place, int64_t p, int64_t f,
                                      int64_t first, int count, C* keys, C* values) {
  const int dim = int(args.dim);
  __syncthreads();
  for (int i = int(threadIdx.x); i < count * dim; i += int(blockDim.x)) {
    const int a = i / dim, d = i - a * dim;
    keys[i] = C(audio_row<T>(args.k, args.k_strides, place.b, p, f, first + a, place.h)[d]) * C(args.scale);
    values[i] = C(audio_row<T>(args.v, args.v_strides, place.b, p, f, first + a, place.h)[d]);
  }
  __syncthreads();
}

template <class C>
__device__ __forceinline__ C speaker_weight(const AudioAttentionArgs& args, int64_t b, int64_t p, int64_t n) {
  if (args.weights == nullptr) return C(1);
  return static_cast<const C*>(args.weights)[b * args.weight_strides[0] + p * args.weight_strides[1] + n];
}

template <class T>
__device__ __forceinline__ const T* token_row(const void* base, const int64_t* strides, int64_t b, int64_t n,
                                              int64_t h) {
  return static_cast<const T*>(base) + b * strides[0] + n * strides[1] + h * strides[2];
}

template <class T, int L, int V>
__global__ void __launch_bounds__(kGeneralThreads, 1)
    forward_kernel(AudioAttentionArgs args, uint32_t items, uint32_t chunks, int tile) {
  using C = compute_t<T>;
  char* shared = dynamic_shared();
  C* keys = reinterpret_cast<C*>(shared);
  C* values = keys + tile * args.dim;
  const int lane = int(threadIdx.x) % L, warp = int(threadIdx.x) / L;
  constexpr int kRows = kGeneralThreads / L;
  for (uint32_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Place place = place_of(args, item, chunks);
    if (place.tokens.first >= place.tokens.end) continue;
    const FrameRange range = audio_frames(args, place.frame);
    // Every row of lanes takes the same number of turns: staging synchronises the block.
    for (int turn = 0; turn < kTokensPerBlock / kRows; ++turn) {
      const int64_t n = place.tokens.first + turn * kRows + warp;
      if (place.tokens.first + turn * kRows >= place.tokens.end) break;
      const bool active = n < place.tokens.end;
      const int64_t row = active ? n : place.tokens.end - 1;
      C q[V], out[V] = {};
      load_row<L>(q, token_row<T>(args.q, args.q_strides, place.b, row, place.h), args.dim, lane);
      for (int64_t p = 0; p < args.speakers; ++p) {
        C highest = lowest(C(0)), total = C(0), acc[V] = {};
        for (int64_t f = range.first; f < range.end; ++f) {
          const int64_t len = audio_len(args, place.b, p, f);
          for (int64_t first = 0; first < len; first += tile) {
            const int count = int(len - first < tile ? len - first : tile);
            // One tile that holds everything stays in place for all turns.
            if (turn == 0 || len > tile || args.speakers > 1 || range.end - range.first > 1)
              stage<T>(args, place, p, f, first, count, keys, values);
            for (int a = 0; a < count; ++a) {
              const C score = dot_row<L>(q, keys + a * args.dim, args.dim, lane);
              const C top = score > highest ? score : highest;
              const C shrink = exponential(highest - top), e = exponential(score - top);
              highest = top;
              total = total * shrink + e;
#pragma unroll
              for (int i = 0; i < V; ++i) {
                const int d = lane + L * i;
                acc[i] = acc[i] * shrink + (d < args.dim ? e * values[a * args.dim + d] : C(0));
              }
            }
          }
        }
        if (total > C(0)) {
          const C factor = speaker_weight<C>(args, place.b, p, row) / total;
#pragma unroll
          for (int i = 0; i < V; ++i) out[i] += acc[i] * factor;
        }
      }
      if (active) {
        store_row<L>(static_cast<T*>(args.out) + place.b * args.out_strides[0] + n * args.out_strides[1] +
                         place.h * args.out_strides[2],
                     out, args.dim, lane);
      }
    }
    __syncthreads();
  }
}

// Statistics of the softmax of (sample, speaker, head, token): its logarithmic sum and the mean of grad . v.
template <class C>
__device__ __forceinline__ C* statistics(const AudioAttentionArgs& args, int64_t b, int64_t p, int64_t h, int64_t n) {
  return static_cast<C*>(args.workspace) + 2 * (((b * args.speakers + p) * args.heads + h) * args.tokens + n);
}

// Gradient of q and the statistics. Per speaker: one pass over the keys for the statistics, one for the gradient.
template <class T, int L, int V>
__global__ void __launch_bounds__(kGeneralThreads, 1)
    grad_q_kernel(AudioAttentionArgs args, uint32_t items, uint32_t chunks, int tile) {
  using C = compute_t<T>;
  char* shared = dynamic_shared();
  C* keys = reinterpret_cast<C*>(shared);
  C* values = keys + tile * args.dim;
  const int lane = int(threadIdx.x) % L, warp = int(threadIdx.x) / L;
  constexpr int kRows = kGeneralThreads / L;
  for (uint32_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Place place = place_of(args, item, chunks);
    if (place.tokens.first >= place.tokens.end) continue;
    const FrameRange range = audio_frames(args, place.frame);
    for (int turn = 0; turn < kTokensPerBlock / kRows; ++turn) {
      const int64_t n = place.tokens.first + turn * kRows + warp;
      if (place.tokens.first + turn * kRows >= place.tokens.end) break;
      const bool active = n < place.tokens.end;
      const int64_t row = active ? n : place.tokens.end - 1;
      C q[V], grad[V], out[V] = {};
      load_row<L>(q, token_row<T>(args.q, args.q_strides, place.b, row, place.h), args.dim, lane);
      load_row<L>(grad, token_row<T>(args.grad_out, args.grad_out_strides, place.b, row, place.h), args.dim, lane);
      for (int64_t p = 0; p < args.speakers; ++p) {
        const C weight = speaker_weight<C>(args, place.b, p, row);
        C highest = lowest(C(0)), total = C(0), mean = C(0), log_sum = C(0);
        for (int pass = 0; pass < 2; ++pass) {
          for (int64_t f = range.first; f < range.end; ++f) {
            const int64_t len = audio_len(args, place.b, p, f);
            for (int64_t first = 0; first < len; first += tile) {
              const int count = int(len - first < tile ? len - first : tile);
              if ((turn == 0 && pass == 0) || len > tile || args.speakers > 1 || range.end - range.first > 1)
                stage<T>(args, place, p, f, first, count, keys, values);
              for (int a = 0; a < count; ++a) {
                const C score = dot_row<L>(q, keys + a * args.dim, args.dim, lane);
                const C slope = dot_row<L>(grad, values + a * args.dim, args.dim, lane);
                if (pass == 0) {
                  const C top = score > highest ? score : highest;
                  const C shrink = exponential(highest - top), e = exponential(score - top);
                  highest = top;
                  total = total * shrink + e;
                  mean = mean * shrink + e * slope;
                } else {
                  const C factor = weight * exponential(score - log_sum) * (slope - mean);
#pragma unroll
                  for (int i = 0; i < V; ++i) {
                    const int d = lane + L * i;
                    if (d < args.dim) out[i] += factor * keys[a * args.dim + d];
                  }
                }
              }
            }
          }
          if (pass == 0 && total > C(0)) {
            mean /= total;
            log_sum = highest + C(log(total));
          }
        }
        if (active && lane == 0) {
          C* target = statistics<C>(args, place.b, p, place.h, n);
          target[0] = log_sum;
          target[1] = mean;
          if (args.grad_weights != nullptr) {
            static_cast<C*>(
                args.grad_weights)[((place.b * args.speakers + p) * args.heads + place.h) * args.tokens + n] = mean;
          }
        }
      }
      if (active) {
        store_row<L>(static_cast<T*>(args.out) + place.b * args.out_strides[0] + n * args.out_strides[1] +
                         place.h * args.out_strides[2],
                     out, args.dim, lane);
      }
    }
    __syncthreads();
  }
}

// Gradients of k and v: a row of lanes owns one audio token of one head.
template <class T, int L, int V>
__global__ void __launch_bounds__(kGeneralThreads, 1) grad_kv_kernel(AudioAttentionArgs args, uint32_t items) {
  using C = compute_t<T>;
  const int lane = int(threadIdx.x) % L, warp = int(threadIdx.x) / L;
  constexpr int kRows = kGeneralThreads / L;
  for (uint32_t item = blockIdx.x * kRows + warp; item < items; item += gridDim.x * kRows) {
    // Neighbours in a block are the audio tokens of one frame: they read the same rows.
    const uint32_t audio = uint32_t(args.audio), heads = uint32_t(args.heads), frames = uint32_t(args.frames);
    const uint32_t of_head = item / audio, of_frame = of_head / heads, of_speaker = of_frame / frames;
    const int64_t a = item - of_head * audio, h = of_head - of_frame * heads, frame = of_frame - of_speaker * frames;
    const int64_t b = of_speaker / uint32_t(args.speakers), p = of_speaker - uint32_t(b) * uint32_t(args.speakers);
    C grad_k[V] = {}, grad_v[V] = {};
    if (a < audio_len(args, b, p, frame)) {
      C key[V], value[V];
      load_row<L>(key, audio_row<T>(args.k, args.k_strides, b, p, frame, a, h), args.dim, lane);
      load_row<L>(value, audio_row<T>(args.v, args.v_strides, b, p, frame, a, h), args.dim, lane);
      const FrameRange range = audio_frames(args, frame);
      const FrameRange tokens = audio_tokens(args, range.first, range.end);
      for (int64_t n = tokens.first; n < tokens.end; ++n) {
        C q[V], grad[V];
        load_row<L>(q, token_row<T>(args.q, args.q_strides, b, n, h), args.dim, lane);
        load_row<L>(grad, token_row<T>(args.grad_out, args.grad_out_strides, b, n, h), args.dim, lane);
        C score = C(0), slope = C(0);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          score += q[i] * key[i];
          slope += grad[i] * value[i];
        }
        const C* stats = statistics<C>(args, b, p, h, n);
        const C weighted = speaker_weight<C>(args, b, p, n) * exponential(row_sum<L>(score) * C(args.scale) - stats[0]);
        const C factor = weighted * (row_sum<L>(slope) - stats[1]) * C(args.scale);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          grad_k[i] += factor * q[i];
          grad_v[i] += weighted * grad[i];
        }
      }
    }
    const int64_t at = ((((b * args.speakers + p) * args.frames + frame) * args.audio + a) * args.heads + h) * args.dim;
    store_row<L>(static_cast<T*>(args.grad_k) + at, grad_k, args.dim, lane);
    store_row<L>(static_cast<T*>(args.grad_v) + at, grad_v, args.dim, lane);
  }
}

struct GeneralCut {
  uint32_t items, chunks;
  int tile, shared_bytes;
  unsigned blocks;
};

inline uint32_t small(int64_t count) {
  if (count >= int64_t(1) << 31) throw std::invalid_argument("audio_attention: too large for one launch on CUDA");
  return uint32_t(count);
}

inline unsigned capped(int64_t blocks) {
  return unsigned(blocks < 1048576 ? (blocks > 0 ? blocks : 1) : 1048576);
}

template <class C>
GeneralCut general_cut(const AudioAttentionArgs& args) {
  GeneralCut cut;
  const int64_t first_frame = args.token_offset / args.tokens_per_frame;
  const int64_t frames = (args.token_offset + args.tokens - 1) / args.tokens_per_frame - first_frame + 1;
  const int64_t longest = args.tokens_per_frame < args.tokens ? args.tokens_per_frame : args.tokens;
  cut.chunks = small((longest + kTokensPerBlock - 1) / kTokensPerBlock);
  small(args.token_offset + args.tokens);
  cut.items = small(args.batch * args.heads * frames * cut.chunks);
  const int64_t row = 2 * args.dim * int64_t(sizeof(C));
  cut.tile = int(kTileBytes / row < args.audio ? kTileBytes / row : args.audio);
  cut.shared_bytes = int(cut.tile * row);
  cut.blocks = capped(cut.items);
  return cut;
}

// Calls fn with the lanes per row and the channels per lane as types.
template <class F>
void dispatch_channels(int64_t dim, F&& fn) {
  using Warp = std::integral_constant<int, 32>;
  if (dim <= 32) return fn(Warp{}, std::integral_constant<int, 1>{});
  if (dim <= 64) return fn(Warp{}, std::integral_constant<int, 2>{});
  if (dim <= 128) return fn(Warp{}, std::integral_constant<int, 4>{});
  if (dim <= 256) return fn(Warp{}, std::integral_constant<int, 8>{});
  if (dim <= 1024) return fn(std::integral_constant<int, kGeneralThreads>{}, std::integral_constant<int, 4>{});
  throw std::invalid_argument("audio_attention: the head dim must be at most 1024 on CUDA");
}

inline void general_forward(const AudioAttentionArgs& args, cudaStream_t stream) {
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const GeneralCut cut = general_cut<compute_t<T>>(args);
    dispatch_channels(args.dim, [&](auto lanes, auto channels) {
      launch("audio_attention", forward_kernel<T, decltype(lanes)::value, decltype(channels)::value>, cut.blocks,
             kGeneralThreads, cut.shared_bytes, stream, args, cut.items, cut.chunks, cut.tile);
    });
  });
}

inline void general_backward(const AudioAttentionArgs& args, cudaStream_t stream) {
  const int64_t owners = args.batch * args.speakers * args.frames * args.heads * args.audio;
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_channels(args.dim, [&](auto lanes, auto channels) {
      constexpr int L = decltype(lanes)::value, V = decltype(channels)::value;
      if (args.tokens > 0) {
        const GeneralCut cut = general_cut<compute_t<T>>(args);
        launch("audio_attention_backward", grad_q_kernel<T, L, V>, cut.blocks, kGeneralThreads, cut.shared_bytes,
               stream, args, cut.items, cut.chunks, cut.tile);
      }
      launch("audio_attention_backward", grad_kv_kernel<T, L, V>,
             capped((owners + kGeneralThreads / L - 1) / (kGeneralThreads / L)), kGeneralThreads, 0, stream, args,
             small(owners));
    });
  });
}

}  // namespace td::cuda
