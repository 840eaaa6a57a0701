// SPDX-License-Identifier: Apache-2.0
// What the tensor-core kernels of audio attention share. A warp takes 16 tokens of one head against all keys of their
// frame at once; the keys stay in shared memory, in the order in which the mma instructions want them.
//
// Sums over channels may run in any order, and columns of a result may be anywhere. Both are chosen so that whatever
// meets device memory moves in whole accesses of 16 bytes, straight from and to registers: in a chunk of 32 channels
// lane t of a row's four lanes holds channels 8t to 8t+7.
//   - As the left operand, words 2s and 2s+1 of these are step s of two.
//   - As a result, column 2t+e of the n-th product of four is channel 8t + 2n + e.
#pragma once

#include <cmath>

#include "core/audio_attention.h"
#include "mma.cuh"
#include "vector.cuh"

namespace td::cuda {

constexpr int kTileRows = 16;
constexpr int kChunk = 32;  // channels

// How a launch is cut. Keys of a speaker are packed and padded to whole blocks of 8, the same number for every frame.
// Whatever a kernel divides by comes as a FastDiv: a division would keep reciprocals in registers all along.
struct AudioPlan {
  uint32_t first_frame, frames;  // that the tokens belong to
  uint32_t head_groups, groups;  // of heads that a thread block works on; times frames, of all samples
  uint32_t tiles;                // forward: a warp's in one go; backward: of a frame and group of heads
  uint32_t chunks;               // forward: thread blocks per frame and group of heads
  uint32_t share, extra;         // backward: tiles of a thread block; the first `extra` of them have one more
  int heads;                     // per thread block
  int speaker_blocks, used;      // key blocks of a speaker, of all of them
  float scale, exponent;         // of scores: as given, and for powers of two
  FastDiv by_head_groups, by_frames, by_tiles, by_chunks, by_speaker_keys;

  AudioPlan(const AudioAttentionArgs& args, int heads_per_block)
      : first_frame(0), frames(0), tiles(1), chunks(1), share(0), extra(0), heads(heads_per_block) {
    const int64_t end = args.token_offset + args.tokens;
    check_count(end);
    if (args.tokens > 0) {
      first_frame = uint32_t(args.token_offset / args.tokens_per_frame);
      frames = uint32_t((end - 1) / args.tokens_per_frame) + 1 - first_frame;
    }
    head_groups = uint32_t((args.heads + heads - 1) / heads);
    groups = check_count(args.batch * frames * head_groups);
    speaker_blocks = int(AudioTile::speaker_blocks(args.audio, args.frames, args.window));
    used = int(args.speakers) * speaker_blocks;
    scale = float(args.scale);
    exponent = float(args.scale * 1.4426950408889634);  // log2(e)
  }

  // Call when the rest is known.
  void finish() {
    by_head_groups = FastDiv(head_groups);
    by_frames = FastDiv(frames > 0 ? frames : 1);
    by_tiles = FastDiv(tiles);
    by_chunks = FastDiv(chunks);
    by_speaker_keys = FastDiv(uint32_t(8 * speaker_blocks));
  }

  // First tile of a thread block of the backward, and the block that has a tile.
  TD_HD uint32_t begin(uint32_t block) const { return block * share + (block < extra ? block : extra); }
  TD_HD uint32_t owner(uint32_t tile) const {
    return tile < extra * (share + 1) ? tile / (share + 1) : (tile - extra) / share;
  }

  // Tokens of the frame that has most.
  static int64_t longest(const AudioAttentionArgs& args) {
    return args.tokens_per_frame < args.tokens ? args.tokens_per_frame : args.tokens;
  }
  static uint32_t check_count(int64_t count) {
    if (count >= int64_t(1) << 31) throw std::invalid_argument("audio_attention: too large for one launch on CUDA");
    return uint32_t(count);
  }
};

// Key blocks that the tokens of a frame attend to, or 0 where tensor cores are no option.
inline int64_t tensor_blocks(const AudioAttentionArgs& args, int64_t most) {
  const int64_t blocks = args.speakers * AudioTile::speaker_blocks(args.audio, args.frames, args.window);
  const bool fits = AudioTile::takes(args.dtype, args.dim) && blocks <= most &&
                    aligned_rows(args.q, args.q_strides, 3, 2) && aligned_rows(args.k, args.k_strides, 5, 2) &&
                    aligned_rows(args.v, args.v_strides, 5, 2) && aligned_rows(args.out, args.out_strides, 3, 2);
  return fits ? blocks : 0;
}

// One frame and group of heads.
struct AudioPlace {
  int64_t b, frame, head;
  FrameRange tokens;
  __device__ __forceinline__ AudioPlace(const AudioAttentionArgs& args, const AudioPlan& plan, uint32_t group) {
    const uint32_t row = plan.by_head_groups.div(group), sample = plan.by_frames.div(row);
    head = int64_t(group - row * plan.head_groups) * plan.heads;
    b = sample;
    frame = plan.first_frame + (row - sample * plan.frames);
    tokens = audio_tokens(args, frame, frame + 1);
  }
};

// The keys that a frame attends to: where their rows of head 0 begin (elements; -1 where there is none), and their
// number per speaker.
template <int NB>
struct KeyList {
  int64_t *k_rows, *v_rows;
  int* counts;

  // A speaker has one block at least.
  static constexpr int kBytes = NB * 8 * 2 * int(sizeof(int64_t)) + (NB + 3) / 4 * 16;

  __device__ __forceinline__ explicit KeyList(void* memory)
      : k_rows(static_cast<int64_t*>(memory)),
        v_rows(k_rows + 8 * NB),
        counts(reinterpret_cast<int*>(v_rows + 8 * NB)) {}

  __device__ __forceinline__ void fill(const AudioAttentionArgs& args, const AudioPlan& plan, int64_t b, int64_t frame,
                                       int thread) const {
    const FrameRange range = audio_frames(args, frame);
    for (int i = thread; i < 8 * NB; i += int(blockDim.x)) {
      const int p = int(plan.by_speaker_keys.div(uint32_t(i))), place = i - p * 8 * plan.speaker_blocks;
      int64_t k_row = -1, v_row = -1, count = 0;
      for (int64_t f = range.first; f < range.end && p < args.speakers; ++f) {
        const int64_t len = audio_len(args, b, p, f), a = place - count;
        if (a >= 0 && a < len) {
          k_row = b * args.k_strides[0] + p * args.k_strides[1] + f * args.k_strides[2] + a * args.k_strides[3];
          v_row = b * args.v_strides[0] + p * args.v_strides[1] + f * args.v_strides[2] + a * args.v_strides[3];
        }
        count += len;
      }
      k_rows[i] = k_row;
      v_rows[i] = v_row;
      if (place == 0) counts[p] = int(count);
    }
  }
};

// The thread's number, which the compiler cannot carry over from an earlier call: what follows from it is worked out
// again instead of lying in registers.
__device__ __forceinline__ int fresh_thread() {
#if defined(__CUDA_ARCH__)
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return int(threadIdx.x);
#endif
}

// Row of token n and head h of a [B, N, H, D] tensor.
template <class T, class P>
__device__ __forceinline__ auto token_head(P* base, const int64_t* strides, int64_t b, int64_t n, int64_t h) {
  using Element = std::conditional_t<std::is_const_v<P>, const T, T>;
  return static_cast<Element*>(base) + b * strides[0] + n * strides[1] + h * strides[2];
}

template <class T>
__device__ __forceinline__ uint4 load_unit(const T* row, int channel) {
  return *reinterpret_cast<const uint4*>(row + channel);
}

// Right operand of a product with the transpose: key block j and chunk c of rows, for sums over channels.
template <class T>
__device__ __forceinline__ uint4 row_fragment(const T* base, const int64_t* rows, int j, int c, int lane) {
  const int64_t row = rows[8 * j + lane / 4];
  return row < 0 ? uint4{0, 0, 0, 0} : load_unit(base + row, kChunk * c + 8 * (lane % 4));
}

// Right operand of a product with the rows themselves, for sums over keys: word n of lane (g, t) holds keys 2t and 2t+1
// at column g of product n.
template <class T>
__device__ __forceinline__ uint4 column_fragment(const T* base, const int64_t* rows, int j, int c, int lane) {
  const int g = lane / 4, t = lane % 4;
  const int64_t even = rows[8 * j + 2 * t], odd = rows[8 * j + 2 * t + 1];
  const int channel = kChunk * c + 8 * (g / 2);
  const uint4 a = even < 0 ? uint4{0, 0, 0, 0} : load_unit(base + even, channel);
  const uint4 b = odd < 0 ? uint4{0, 0, 0, 0} : load_unit(base + odd, channel);
  const bool upper = g % 2 != 0;
  const auto pair = [upper](uint32_t low, uint32_t high) {
    return upper ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
  };
  return uint4{pair(a.x, b.x), pair(a.y, b.y), pair(a.z, b.z), pair(a.w, b.w)};
}

// Fills fragments of all key blocks and chunks of `heads` heads, `per_head` apart: lane after lane, 16 bytes each.
template <class T, int D, int NB, class Fragment>
__device__ __forceinline__ void fill_fragments(uint4* target, int per_head, const AudioAttentionArgs& args,
                                               const AudioPlan& plan, const AudioPlace& place, const void* source,
                                               int64_t head_stride, const int64_t* rows, int thread,
                                               const Fragment& fragment) {
  constexpr int kChunks = D / kChunk;
  const int lane = thread % 32, warps = int(blockDim.x) / 32;
  for (int h = 0; h < plan.heads; ++h) {
    const bool present = place.head + h < args.heads;
    const T* base = static_cast<const T*>(source) + (present ? (place.head + h) * head_stride : 0);
    for (int i = thread / 32; i < NB * kChunks; i += warps) {
      const int j = i / kChunks, c = i - j * kChunks;
      target[h * per_head + i * 32 + lane] = present ? fragment(base, rows, j, c, lane) : uint4{0, 0, 0, 0};
    }
  }
}

// 16 rows of a warp as the left operand of products that sum over channels: rows g and g+8.
template <class T, int D>
struct TileRows {
  static constexpr int kChunks = D / kChunk;
  uint4 low[kChunks], high[kChunks];

  // Rows from `end` on are zero.
  __device__ __forceinline__ void load(const T* base, int64_t stride, int row, int end, int lane) {
    const int first = row + lane / 4;
    const T* source = base + first * stride;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int channel = kChunk * c + 8 * (lane % 4);
      low[c] = first < end ? load_unit(source, channel) : uint4{0, 0, 0, 0};
      high[c] = first + 8 < end ? load_unit(source + 8 * stride, channel) : uint4{0, 0, 0, 0};
    }
  }
};

// products[j] = rows times the keys (or values) of block j; uses the rows up. Left alone, the compiler fills all
// registers, and more, with fragments: where there are many, blocks from `used` on are skipped by a branch, and wide
// rows are turned chunk by chunk in a loop that is one.
template <class T, int D, int NB>
__device__ __forceinline__ void dot_keys(float (&products)[NB][4], TileRows<T, D>& rows, const uint4* fragments,
                                         int used, int lane) {
  constexpr int kChunks = D / kChunk;
#pragma unroll
  for (int j = 0; j < NB; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) products[j][i] = 0.0f;
  const auto add_chunk = [&](int c, const uint4& low, const uint4& high) {
#pragma unroll
    for (int j = 0; j < NB; ++j) {
      if (NB > 4 && j >= used) continue;
      const uint4 f = fragments[(j * kChunks + c) * 32 + lane];
      mma_k16<T>(products[j], low.x, high.x, low.y, high.y, f.x, f.y);
      mma_k16<T>(products[j], low.z, high.z, low.w, high.w, f.z, f.w);
    }
  };
  if constexpr (kChunks > 1) {
#pragma unroll 1
    for (int c = 0; c < kChunks; ++c) {
      add_chunk(c, rows.low[0], rows.high[0]);
#pragma unroll
      for (int i = 0; i + 1 < kChunks; ++i) {
        rows.low[i] = rows.low[i + 1];
        rows.high[i] = rows.high[i + 1];
      }
    }
  } else {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) add_chunk(c, rows.low[c], rows.high[c]);
  }
}

// One chunk of the sums over keys: weights, rounded to T, times rows of keys (or values).
template <class T, int D, int NB>
__device__ __forceinline__ void mix_keys(float (&sums)[4][4], const uint32_t (&weights)[NB][2], const uint4* fragments,
                                         int c, int lane) {
  constexpr int kChunks = D / kChunk;
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
#pragma unroll
  for (int j = 0; j < NB; j += 2) {
    const uint4 even = fragments[(j * kChunks + c) * 32 + lane];
    const uint32_t a[4] = {even.x, even.y, even.z, even.w};
    if (j + 1 < NB) {
      const uint4 odd = fragments[((j + 1) * kChunks + c) * 32 + lane];
      const uint32_t b[4] = {odd.x, odd.y, odd.z, odd.w};
      const uint32_t (&other)[2] = weights[j + 1 < NB ? j + 1 : j];
#pragma unroll
      for (int n = 0; n < 4; ++n) mma_k16<T>(sums[n], weights[j][0], weights[j][1], other[0], other[1], a[n], b[n]);
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n) mma_k8<T>(sums[n], weights[j][0], weights[j][1], a[n]);
    }
  }
}

// Stores one chunk of 16 rows.
template <class T>
__device__ __forceinline__ void store_chunk(T* base, int64_t stride, int row, int end, int c, int lane,
                                            const float (&sums)[4][4], float factor) {
  const int first = row + lane / 4;
  T* target = base + first * stride + kChunk * c + 8 * (lane % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (first + 8 * half >= end) continue;
    uint32_t words[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) words[n] = pack_pair<T>(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor);
    *reinterpret_cast<uint4*>(target + 8 * half * stride) = uint4{words[0], words[1], words[2], words[3]};
  }
}

// Sum, or maximum, over the four lanes of a row.
__device__ __forceinline__ float row_total(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}
__device__ __forceinline__ float row_highest(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// Within two units in the last place, without the branch that keeps registers for subnormal divisors.
__device__ __forceinline__ float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// Softmax over the `count` keys in blocks [first, first + blocks), of base-2 exponents. `scale` holds the factor of the
// two rows' results.
template <int NB>
__device__ __forceinline__ void softmax_keys(float (&s)[NB][4], int first, int blocks, int count, int lane,
                                             const float (&scale)[2]) {
  const int place = 2 * (lane % 4);
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < NB; ++j) {
    if (j < first || j >= first + blocks) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (8 * (j - first) + place + i % 2 >= count) s[j][i] = -INFINITY;
      top[i / 2] = fmaxf(top[i / 2], s[j][i]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = row_highest(top[r]);
    if (top[r] == -INFINITY) top[r] = 0.0f;  // no keys at all: zeros
  }
#pragma unroll
  for (int j = 0; j < NB; ++j) {
    if (j < first || j >= first + blocks) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[j][i] = exp2f(s[j][i] - top[i / 2]);
      total[i / 2] += s[j][i];
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] = row_total(total[r]);
    total[r] = total[r] > 0.0f ? quotient(scale[r], total[r]) : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < NB; ++j) {
    if (j < first || j >= first + blocks) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] *= total[i / 2];
  }
}

// Weights of a speaker for the two rows of a lane; `first` is the token of row 0.
__device__ __forceinline__ void load_weights(float (&weights)[2], const AudioAttentionArgs& args, int64_t b, int p,
                                             int64_t first, int row, int end, int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int n = row + lane / 4 + 8 * r;
    weights[r] = 1.0f;
    if (args.weights != nullptr && n < end) {
      weights[r] =
          static_cast<const float*>(args.weights)[b * args.weight_strides[0] + p * args.weight_strides[1] + first + n];
    }
  }
}

}  // namespace td::cuda
