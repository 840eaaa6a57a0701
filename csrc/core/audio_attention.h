// SPDX-License-Identifier: Apache-2.0
// Attention of video tokens to the audio tokens of their own frame, or of frames around it. The contract is in
// talkingdit/ops/audio_attention.py.
#pragma once

#include "core/kernel.h"

namespace td {

constexpr int kMaxSpeakers = 64;

struct AudioAttentionArgs {
  const void* q;         // [B, N, H, D]
  const void* k;         // [B, P, F, A, H, D]
  const void* v;         // as k
  const void* grad_out;  // [B, N, H, D]; backward only
  void* out;             // [B, N, H, D]: the result, or the gradient of q
  void* grad_k;          // [B, P, F, A, H, D], contiguous
  void* grad_v;          // as grad_k
  const void* weights;   // [B, P, N] in compute precision, or null: one
  void* grad_weights;    // [B, P, H, N] in compute precision, contiguous: one term per head; with weights only
  const int64_t* lens;   // [B, P, F] valid audio tokens, or null: A
  const int64_t* clips;  // [F, 2] first frame and end of each frame's clip, contiguous, or null: one clip
  void* workspace;       // compute precision; AudioWorkspace elements, on CUDA audio_cuda_workspace
  int64_t q_strides[3], grad_out_strides[3], out_strides[3], k_strides[5], v_strides[5];
  int64_t weight_strides[2], len_strides[3];
  int64_t batch, tokens, heads, speakers, frames, audio, dim;
  int64_t tokens_per_frame, token_offset, window;
  int64_t slots;  // parts of the workspace, one per thread
  double scale;
  DType dtype;
};

struct FrameRange {
  int64_t first, end;
};

// Frames that the tokens of `frame` attend to. The relation is symmetric: they are also the frames whose tokens attend
// to the audio of `frame`.
TD_HD FrameRange audio_frames(const AudioAttentionArgs& args, int64_t frame) {
  FrameRange range{frame - args.window, frame + args.window + 1};
  const int64_t low = args.clips ? args.clips[2 * frame] : 0;
  const int64_t high = args.clips ? args.clips[2 * frame + 1] : args.frames;
  if (range.first < low) range.first = low;
  if (range.end > high) range.end = high;
  return range;
}

// Tokens of the shard that belong to frames [first, end), as a range of local indices.
TD_HD FrameRange audio_tokens(const AudioAttentionArgs& args, int64_t first, int64_t end) {
  FrameRange range{first * args.tokens_per_frame - args.token_offset, end * args.tokens_per_frame - args.token_offset};
  if (range.first < 0) range.first = 0;
  if (range.end > args.tokens) range.end = args.tokens;
  return range;
}

// Valid audio tokens of a frame; a length out of range is cut, it must not lead out of the tensor.
TD_HD int64_t audio_len(const AudioAttentionArgs& args, int64_t b, int64_t p, int64_t frame) {
  if (args.lens == nullptr) return args.audio;
  const int64_t len = args.lens[b * args.len_strides[0] + p * args.len_strides[1] + frame * args.len_strides[2]];
  return len < 0 ? 0 : (len > args.audio ? args.audio : len);
}

// How the CPU kernels cut their workspace: `slots` private parts, then (backward) the partial key and value gradients
// that every (sample, frame of the queries, head) leaves for the summation. Counts are elements.
struct AudioWorkspace {
  static constexpr int64_t kAlign = 16;      // a multiple of the lanes of every instruction set, and the largest block
  static constexpr int64_t kPacked = 49152;  // packed keys and values of a group of heads should stay in the L2 cache
  int64_t keys, dim, head_group, slot, partial, total;

  AudioWorkspace(int64_t speakers, int64_t frames, int64_t audio, int64_t heads, int64_t head_dim, int64_t window,
                 int64_t batch, int64_t slots, bool backward) {
    const int64_t reach = 2 * window + 1 < frames ? 2 * window + 1 : frames;
    keys = speakers * reach * audio;
    dim = (head_dim + kAlign - 1) / kAlign * kAlign;
    const int64_t per_head = 2 * keys * dim;
    head_group = per_head > 0 ? kPacked / per_head : heads;
    head_group = head_group < 1 ? 1 : (head_group > heads ? heads : head_group);
    // Packed keys and values; one block of scores (backward: and of their gradients); one block of staged rows each.
    slot = head_group * per_head + (backward ? 2 : 1) * (keys * kAlign + kAlign * dim);
    partial = backward ? per_head : 0;
    total = slots * slot + batch * frames * heads * partial;
  }
};

// Sizes of the CUDA backward on tensor cores, for 16-bit types and head dims of 32, 64 and 128 (the forward has room
// for half as many keys more). Keys of a speaker are padded to blocks of 8; a kernel takes up to `key_blocks` of them.
struct AudioTile {
  static constexpr int64_t kMaxBlocks = 8, kMaxParts = 640;
  int warps_per_head, warps, heads;  // heads are per thread block
  constexpr AudioTile(int64_t dim, int64_t key_blocks) : warps_per_head(1), warps(4), heads(4) {
    // Gradients of keys and values are kept in registers: at most 80 of a thread, 40 where keys are few and registers
    // decide how many rows are on their way.
    const int64_t most = dim * key_blocks <= 128 ? 80 : 160;
    while (dim * key_blocks > most * warps_per_head) warps_per_head *= 2;
    if (warps < warps_per_head) warps = warps_per_head;
    heads = warps / warps_per_head;
  }

  // The kernel that takes this many blocks.
  static constexpr int64_t fitting(int64_t blocks) {
    return blocks <= 2 ? blocks : (blocks <= 4 ? 4 : (blocks <= 5 ? 5 : kMaxBlocks));
  }
  static int64_t speaker_blocks(int64_t audio, int64_t frames, int64_t window) {
    const int64_t reach = 2 * window + 1 < frames ? 2 * window + 1 : frames;
    return (reach * audio + 7) / 8;
  }
  static bool takes(DType dtype, int64_t dim) {
    return (dtype == DType::bfloat16 || dtype == DType::float16) && (dim == 32 || dim == 64 || dim == 128);
  }
};

// Elements of the workspace of the CUDA backward: the statistics of the softmax, or the parts of the gradients of keys
// and values that thread blocks leave for the summation.
inline int64_t audio_cuda_workspace(DType dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t dim,
                                    int64_t speakers, int64_t frames, int64_t audio, int64_t window) {
  const int64_t statistics = 2 * batch * speakers * heads * tokens;
  const int64_t used = speakers * AudioTile::speaker_blocks(audio, frames, window);
  if (!AudioTile::takes(dtype, dim) || used > AudioTile::kMaxBlocks) return statistics;
  const int64_t blocks = AudioTile::fitting(used);
  const AudioTile tile(dim, blocks);
  const int64_t groups = batch * ((heads + tile.heads - 1) / tile.heads);
  // A frame that the shard cuts may take a tile more than its tokens need.
  const int64_t tiles = groups * (3 * tokens / (16 * tile.warps_per_head) + frames + 2);
  const int64_t parts = groups * frames + (tiles < AudioTile::kMaxParts ? tiles : AudioTile::kMaxParts);
  const int64_t sums = parts * tile.heads * 2 * 8 * blocks * dim;
  return sums > statistics ? sums : statistics;
}

TD_DECLARE_KERNEL(audio_attention, const AudioAttentionArgs&)
TD_DECLARE_KERNEL(audio_attention_backward, const AudioAttentionArgs&)

}  // namespace td
