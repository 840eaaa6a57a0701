// SPDX-License-Identifier: Apache-2.0
// Forward on tensor cores. A thread block stages keys and values of one frame for one to four neighbouring heads; each
// of its warps then streams 16 tokens of one head at a time: the next rows are on their way as soon as the scores of
// these have been taken from them.
#pragma once

#include "audio_attention.cuh"

namespace td::cuda {

constexpr int kForwardWarps = 4;

template <int D, int NB>
constexpr int kForwardHeadBytes = 2 * NB * (D / kChunk) * 32 * 16;

// Thread blocks of a multiprocessor at a time, as far as registers allow: of each warp up to 4 KB of rows are on their
// way.
constexpr int forward_residents(int dim, int key_blocks) {
  if (key_blocks <= 2) return dim > 64 ? 5 : 6;
  if (key_blocks <= 4) return dim > 64 ? 4 : 5;
  return key_blocks <= 8 ? 4 : 3;
}

template <class T, int D, int NB>
__global__ void __launch_bounds__(32 * kForwardWarps, forward_residents(D, NB))
    tensor_forward_kernel(const __grid_constant__ AudioAttentionArgs args, const __grid_constant__ AudioPlan plan) {
  constexpr int kChunks = D / kChunk;
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  // Neighbouring blocks work on neighbouring heads of the same tokens.
  const uint32_t of_heads = plan.by_head_groups.div(blockIdx.x), of_frame = plan.by_chunks.div(of_heads);
  const uint32_t chunk = of_heads - of_frame * plan.chunks, head_group = blockIdx.x - of_heads * plan.head_groups;
  const AudioPlace place(args, plan, of_frame * plan.head_groups + head_group);

  uint4* fragments = reinterpret_cast<uint4*>(dynamic_shared());
  constexpr int kMatrix = NB * kChunks * 32;
  const KeyList<NB> keys(fragments + 2 * plan.heads * kMatrix);
  keys.fill(args, plan, place.b, place.frame, thread);
  __syncthreads();
  const auto as_rows = [](const T* base, const int64_t* rows, int j, int c, int lane) {
    return row_fragment(base, rows, j, c, lane);
  };
  const auto as_columns = [](const T* base, const int64_t* rows, int j, int c, int lane) {
    return column_fragment(base, rows, j, c, lane);
  };
  fill_fragments<T, D, NB>(fragments, 2 * kMatrix, args, plan, place, args.k, args.k_strides[4], keys.k_rows, thread,
                           as_rows);
  fill_fragments<T, D, NB>(fragments + kMatrix, 2 * kMatrix, args, plan, place, args.v, args.v_strides[4], keys.v_rows,
                           thread, as_columns);
  __syncthreads();

  const int slots = kForwardWarps / plan.heads, slot = warp / plan.heads;
  const int64_t head = place.head + warp % plan.heads;
  const int step = slots * kTileRows;
  if (head >= args.heads) return;
  const uint4 *k_fragments = fragments + (warp % plan.heads) * 2 * kMatrix, *v_fragments = k_fragments + kMatrix;
  const int share = step * int(plan.tiles), tokens = int(place.tokens.end - place.tokens.first);
  const int begin = int(chunk) * share, end = begin + share < tokens ? begin + share : tokens;
  const T* q = token_head<T>(args.q, args.q_strides, place.b, place.tokens.first, head);
  T* out = token_head<T>(args.out, args.out_strides, place.b, place.tokens.first, head);

  TileRows<T, D> rows;
  int row = begin + slot * kTileRows;
  rows.load(q, args.q_strides[1], row, end, lane);
  for (; row < end; row += step) {
    float s[NB][4];
    dot_keys<T, D>(s, rows, k_fragments, plan.used, lane);
    rows.load(q, args.q_strides[1], row + step, end, lane);
#pragma unroll
    for (int j = 0; j < NB; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] *= plan.exponent;
    for (int p = 0; p < int(args.speakers); ++p) {
      float weights[2];
      load_weights(weights, args, place.b, p, place.tokens.first, row, end, lane);
      softmax_keys(s, p * plan.speaker_blocks, plan.speaker_blocks, keys.counts[p], lane, weights);
    }
    uint32_t packed[NB][2];
#pragma unroll
    for (int j = 0; j < NB; ++j) {
      packed[j][0] = pack_pair<T>(s[j][0], s[j][1]);
      packed[j][1] = pack_pair<T>(s[j][2], s[j][3]);
    }
#pragma unroll 1  // registers hold more warps instead
    for (int c = 0; c < kChunks; ++c) {
      float sums[4][4];
      mix_keys<T, D>(sums, packed, v_fragments, c, lane);
      store_chunk(out, args.out_strides[1], row, end, c, lane, sums, 1.0f);
    }
  }
}

}  // namespace td::cuda
