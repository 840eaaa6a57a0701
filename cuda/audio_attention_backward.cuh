// SPDX-License-Identifier: Apache-2.0
// Backward on tensor cores: all gradients in one pass over q and the gradient of the result. The blocks of the grid
// share the tiles of all (frame, group of heads) evenly, each takes its own in order and keeps the sums for the keys
// and values of the frame at hand in registers: they are written once per frame and block, in float32, and a second
// kernel adds these parts up in the order of the tokens. Nothing is added atomically.
//
// A tile is 16 tokens per warp. A warp first works on its own tokens (scores, softmax, gradient of q), leaving rows and
// rounded weights in shared memory; then the warps of a head take the sums over all its tokens, a slice of the channels
// of one gradient each.
#pragma once

#include "audio_attention.cuh"

namespace td::cuda {

// Sizes of a kernel for up to NB key blocks.
template <int D, int NB>
struct BackwardTile {
  static constexpr int kShare = AudioTile(D, NB).warps_per_head, kWarps = AudioTile(D, NB).warps;
  static constexpr int kSlices = 2 * (D / 16);           // of 16 channels, of both gradients
  static constexpr int kOwn = kSlices / kShare;          // of a warp
  static constexpr int kMatrices = kShare == 1 ? 2 : 1;  // gradients that a warp has slices of
  static constexpr int kUnits = D / 8;                   // of 16 bytes in a row
  static constexpr int kResidents =
      kWarps > 4 ? 1 : (NB <= 2 && D < 128 ? 3 : 2);  // thread blocks of a multiprocessor at a time

  static constexpr int kWeightUnits = NB | 1;             // of a row of weights: an odd number meets all banks
  static constexpr int kMatrix = NB * (D / kChunk) * 32;  // units of a head's fragments
  static constexpr int kKeySums = 8 * NB * D;             // elements of the gradient of a head's keys, or values
  static constexpr int kHeads = kWarps / kShare;
  static constexpr int kBytes =
      16 * (3 * kHeads * kMatrix + kWarps * kTileRows * 2 * (kUnits + kWeightUnits)) + KeyList<NB>::kBytes;
};

// Where unit `unit` of a row lies, in units: eight rows below one another, and two beside one another, meet all banks.
template <int D>
__device__ __forceinline__ int spread(int row, int unit) {
  const int turn = (row & 1) << 2 | (row >> 1 & 3);
  return row * (D / 8) + (unit ^ (turn & (D / 8 - 1)));
}

template <class T, int D>
__device__ __forceinline__ void put_rows(uint4* target, const TileRows<T, D>& rows, int row, int lane) {
  const int low = row + lane / 4;
#pragma unroll
  for (int c = 0; c < D / kChunk; ++c) {
    target[spread<D>(low, 4 * c + lane % 4)] = rows.low[c];
    target[spread<D>(low + 8, 4 * c + lane % 4)] = rows.high[c];
  }
}

template <class T, int NB>
__device__ __forceinline__ void put_weights(uint4* target, const uint32_t (&weights)[NB][2], int row, int lane) {
  constexpr int kUnits = NB | 1;
  uint32_t* words = reinterpret_cast<uint32_t*>(target);
  const int low = (row + lane / 4) * kUnits;
#pragma unroll
  for (int j = 0; j < NB; ++j) {
    words[(low + j) * 4 + lane % 4] = weights[j][0];
    words[(low + 8 * kUnits + j) * 4 + lane % 4] = weights[j][1];
  }
}

// Adds 16 channels by all keys: the sum over `tokens` of rows times weights.
template <class T, int D, int NB, int kCount>
__device__ __forceinline__ void gather_slices(float (*sums)[NB][4], const uint4* rows, const uint4* weights,
                                              int first_slice, int tokens, int lane) {
#pragma unroll 1
  for (int token = 0; token < tokens; token += 16) {
    uint32_t b[(NB + 1) / 2][4];
#pragma unroll
    for (int j = 0; j < NB; j += 2) {
      int block = j + lane / 16;
      if (block >= NB) block = j;
      load_transposed(b[j / 2], weights + (token + lane % 16) * (NB | 1) + block);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      uint32_t a[4];
      load_transposed(a, rows + spread<D>(token + lane % 8 + lane / 16 * 8, 2 * (first_slice + i) + lane / 8 % 2));
#pragma unroll
      for (int j = 0; j < NB; ++j) {
        mma_k16<T>(sums[i][j], a[0], a[1], a[2], a[3], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

template <class T, int D, int NB>
__global__ void __launch_bounds__(32 * BackwardTile<D, NB>::kWarps, BackwardTile<D, NB>::kResidents)
    tensor_backward_kernel(const __grid_constant__ AudioAttentionArgs args, const __grid_constant__ AudioPlan plan) {
  using Tile = BackwardTile<D, NB>;
  constexpr int kChunks = D / kChunk, kShare = Tile::kShare, kRows = kShare * kTileRows;
  const auto as_rows = [](const T* base, const int64_t* rows, int j, int c, int lane) {
    return row_fragment(base, rows, j, c, lane);
  };
  const auto as_columns = [](const T* base, const int64_t* rows, int j, int c, int lane) {
    return column_fragment(base, rows, j, c, lane);
  };
  // The warps of a head meet: one warp is a head of its own.
  const auto meet = [] {
    if constexpr (kShare == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };

  const uint32_t part = blockIdx.x, stop = plan.begin(part + 1);
  for (uint32_t at = plan.begin(part); at < stop;) {
    const uint32_t group = plan.by_tiles.div(at), group_tile = group * plan.tiles;
    const uint32_t group_end = group_tile + plan.tiles < stop ? group_tile + plan.tiles : stop;
    const int thread = fresh_thread(), lane = thread % 32, warp = thread / 32;
    const int head_slot = warp / kShare, member = warp % kShare;

    uint4* shared = reinterpret_cast<uint4*>(dynamic_shared());
    const uint4* k_fragments = shared + head_slot * 3 * Tile::kMatrix;
    const uint4 *v_fragments = k_fragments + Tile::kMatrix, *k_columns = v_fragments + Tile::kMatrix;
    uint4* q_rows =
        shared + 3 * Tile::kHeads * Tile::kMatrix + head_slot * kRows * 2 * (Tile::kUnits + Tile::kWeightUnits);
    uint4* grad_rows = q_rows + kRows * Tile::kUnits;
    uint4* grad_weights = grad_rows + kRows * Tile::kUnits;  // of the keys: gradients of the scores
    uint4* value_weights = grad_weights + kRows * Tile::kWeightUnits;
    const KeyList<NB> keys(shared + 3 * Tile::kHeads * Tile::kMatrix +
                           Tile::kWarps * kTileRows * 2 * (Tile::kUnits + Tile::kWeightUnits));
    const AudioPlace place(args, plan, group);
    __syncthreads();
    keys.fill(args, plan, place.b, place.frame, thread);
    __syncthreads();
    fill_fragments<T, D, NB>(shared, 3 * Tile::kMatrix, args, plan, place, args.k, args.k_strides[4], keys.k_rows,
                             thread, as_rows);
    fill_fragments<T, D, NB>(shared + Tile::kMatrix, 3 * Tile::kMatrix, args, plan, place, args.v, args.v_strides[4],
                             keys.v_rows, thread, as_rows);
    fill_fragments<T, D, NB>(shared + 2 * Tile::kMatrix, 3 * Tile::kMatrix, args, plan, place, args.k,
                             args.k_strides[4], keys.k_rows, thread, as_columns);
    __syncthreads();

    const int64_t head = place.head + head_slot;
    // A warp whose head does not exist finds no tokens.
    const int end = head < args.heads ? int(place.tokens.end - place.tokens.first) : 0;
    const T* q = token_head<T>(args.q, args.q_strides, place.b, place.tokens.first, head);
    const T* grad = token_head<T>(args.grad_out, args.grad_out_strides, place.b, place.tokens.first, head);
    T* grad_q = token_head<T>(args.out, args.out_strides, place.b, place.tokens.first, head);

    float sums[Tile::kOwn][NB][4] = {};
    TileRows<T, D> rows, slopes;
    const int tile_end = int(group_end - group_tile);
    int tile = int(at - group_tile), row = tile * kRows + member * kTileRows;
    rows.load(q, args.q_strides[1], row, end, lane);
    slopes.load(grad, args.grad_out_strides[1], row, end, lane);
    for (; tile < tile_end; ++tile, row += kRows) {
      put_rows(q_rows, rows, member * kTileRows, lane);
      put_rows(grad_rows, slopes, member * kTileRows, lane);
      float s[NB][4], ds[NB][4];
      dot_keys<T, D>(s, rows, k_fragments, NB, lane);
      dot_keys<T, D>(ds, slopes, v_fragments, NB, lane);
#pragma unroll
      for (int j = 0; j < NB; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] *= plan.exponent;
      for (int p = 0; p < int(args.speakers); ++p) {
        const int first = p * plan.speaker_blocks;
        softmax_keys(s, first, plan.speaker_blocks, keys.counts[p], lane, {1.0f, 1.0f});
        float weights[2], mean[2] = {0.0f, 0.0f};
        load_weights(weights, args, place.b, p, place.tokens.first, row, end, lane);
#pragma unroll
        for (int j = 0; j < NB; ++j) {
          if (j < first || j >= first + plan.speaker_blocks) continue;
#pragma unroll
          for (int i = 0; i < 4; ++i) mean[i / 2] += s[j][i] * ds[j][i];
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          mean[r] = row_total(mean[r]);
          const int n = row + lane / 4 + 8 * r;
          if (args.grad_weights != nullptr && lane % 4 == 0 && n < end) {
            static_cast<float*>(args.grad_weights)[((place.b * args.speakers + p) * args.heads + head) * args.tokens +
                                                   place.tokens.first + n] = mean[r];
          }
        }
#pragma unroll
        for (int j = 0; j < NB; ++j) {
          if (j < first || j >= first + plan.speaker_blocks) continue;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[j][i] *= weights[i / 2];
            ds[j][i] = s[j][i] * (ds[j][i] - mean[i / 2]);
          }
        }
      }
      uint32_t packed[NB][2];
#pragma unroll
      for (int j = 0; j < NB; ++j) {
        packed[j][0] = pack_pair<T>(s[j][0], s[j][1]);
        packed[j][1] = pack_pair<T>(s[j][2], s[j][3]);
      }
      put_weights<T>(value_weights, packed, member * kTileRows, lane);
#pragma unroll
      for (int j = 0; j < NB; ++j) {
        packed[j][0] = pack_pair<T>(ds[j][0], ds[j][1]);
        packed[j][1] = pack_pair<T>(ds[j][2], ds[j][3]);
      }
      put_weights<T>(grad_weights, packed, member * kTileRows, lane);
      // The next rows are on their way while the gradients are summed. Behind the last tile there are none: a load that
      // might not happen would keep these rows in their registers until here.
      const int next_end = tile + 1 < tile_end ? end : 0;
      rows.load(q, args.q_strides[1], row + kRows, next_end, lane);
      slopes.load(grad, args.grad_out_strides[1], row + kRows, next_end, lane);
#pragma unroll 1
      for (int c = 0; c < kChunks; ++c) {
        float chunk[4][4];
        mix_keys<T, D>(chunk, packed, k_columns, c, lane);
        store_chunk(grad_q, args.out_strides[1], row, end, c, lane, chunk, plan.scale);
      }
      meet();
      if constexpr (Tile::kMatrices == 2) {
        gather_slices<T, D, NB, D / 16>(sums, q_rows, grad_weights, 0, kRows, lane);
        gather_slices<T, D, NB, D / 16>(sums + D / 16, grad_rows, value_weights, 0, kRows, lane);
      } else {
        const bool of_values = member >= kShare / 2;
        gather_slices<T, D, NB, Tile::kOwn>(sums, of_values ? grad_rows : q_rows,
                                            of_values ? value_weights : grad_weights,
                                            member % (kShare / 2) * Tile::kOwn, kRows, lane);
      }
      meet();
    }
    at = group_end;
    float* sums_at =
        static_cast<float*>(args.workspace) + ((int64_t(group) + part) * Tile::kHeads + head_slot) * 2 * Tile::kKeySums;
#pragma unroll
    for (int i = 0; i < Tile::kOwn; ++i) {
      float* target = sums_at + (member * Tile::kOwn + i) / (D / 16) * Tile::kKeySums;
      const int channel = (member * Tile::kOwn + i) % (D / 16) * 16 + lane / 4;
#pragma unroll
      for (int j = 0; j < NB; ++j) {
        float* key = target + (8 * j + lane % 4 * 2) * D + channel;
        key[0] = sums[i][j][0];
        key[D] = sums[i][j][1];
        key[8] = sums[i][j][2];
        key[D + 8] = sums[i][j][3];
      }
    }
  }
}

// Gradients of keys and values from the parts: four channels of both per thread, over the frames that attend to the
// key and the blocks that had a share of their tokens, in this order.
template <class T>
__global__ void __launch_bounds__(256)
    add_parts_kernel(const __grid_constant__ AudioAttentionArgs args, const __grid_constant__ AudioPlan plan,
                     uint32_t items, int64_t keys_size) {
  const float* workspace = static_cast<const float*>(args.workspace);
  // 32 bits are enough (the launcher checks it).
  const uint32_t dim4 = uint32_t(args.dim) / 4, heads = uint32_t(args.heads), audio = uint32_t(args.audio);
  const uint32_t frames = uint32_t(args.frames), speakers = uint32_t(args.speakers);
  for (uint32_t item = blockIdx.x * blockDim.x + threadIdx.x; item < items; item += gridDim.x * blockDim.x) {
    const uint32_t of_head = item / dim4, of_key = of_head / heads, of_frame = of_key / audio;
    const uint32_t of_speaker = of_frame / frames, sample = of_speaker / speakers;
    const int64_t d = (item - of_head * dim4) * 4, h = of_head - of_key * heads, a = of_key - of_frame * audio;
    const int64_t frame = of_frame - of_speaker * frames, p = of_speaker - sample * speakers, b = sample;
    float grad_k[4] = {}, grad_v[4] = {};
    if (a < audio_len(args, b, p, frame)) {
      const FrameRange range = audio_frames(args, frame);
      for (int64_t f = range.first; f < range.end; ++f) {
        const int64_t local = f - plan.first_frame;
        if (local < 0 || local >= plan.frames) continue;
        // Where frame f has packed this key.
        int64_t key = p * 8 * plan.speaker_blocks + a;
        for (int64_t other = audio_frames(args, f).first; other < frame; ++other) key += audio_len(args, b, p, other);
        const uint32_t head_group = uint32_t(h) / uint32_t(plan.heads);
        const uint32_t group = (sample * plan.frames + uint32_t(local)) * plan.head_groups + head_group;
        const uint32_t last = plan.owner((group + 1) * plan.tiles - 1);
        for (uint32_t block = plan.owner(group * plan.tiles); block <= last; ++block) {
          const int64_t slot = (int64_t(group) + block) * plan.heads + (h - int64_t(head_group) * plan.heads);
          const float* part = workspace + slot * 2 * keys_size + key * args.dim + d;
          Vector<float, 4> of_k, of_v;
          of_k.load(part);
          of_v.load(part + keys_size);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            grad_k[i] += of_k.get(i);
            grad_v[i] += of_v.get(i);
          }
        }
      }
    }
    uint32_t* k_target = reinterpret_cast<uint32_t*>(static_cast<T*>(args.grad_k) + 4 * int64_t(item));
    uint32_t* v_target = reinterpret_cast<uint32_t*>(static_cast<T*>(args.grad_v) + 4 * int64_t(item));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      k_target[i] = pack_pair<T>(grad_k[2 * i] * plan.scale, grad_k[2 * i + 1] * plan.scale);
      v_target[i] = pack_pair<T>(grad_v[2 * i], grad_v[2 * i + 1]);
    }
  }
}

}  // namespace td::cuda
