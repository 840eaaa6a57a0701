// SPDX-License-Identifier: Apache-2.0
// Normalise, modulate, gate. One forward and one backward kernel serve norm_modulate, gate_residual and the two fused:
// what an op does not have is a null pointer. The contract is in talkingdit/ops/modulate.py.
#pragma once

#include "core/eight_bit.h"
#include "core/kernel.h"

namespace td {

constexpr int kMaxRanges = 128;
constexpr int kMaxModulatedDim = 16384;

// Which modulation a token of the unsharded sequence gets: tokens come in groups, all of one size or with given ends.
struct TokenGroups {
  int64_t per_group;  // 0: use ends
  int64_t count;
  int64_t ends[kMaxRanges];

  TD_HD int64_t group(int64_t token) const {
    if (per_group > 0) {
      // A division of 32 bits is several times cheaper on a GPU.
      return (token | per_group) < (int64_t(1) << 32) ? uint32_t(token) / uint32_t(per_group) : token / per_group;
    }
    int64_t g = 0;
    while (token >= ends[g]) ++g;
    return g;
  }
  TD_HD int64_t begin(int64_t g) const { return per_group > 0 ? g * per_group : (g > 0 ? ends[g - 1] : 0); }
  TD_HD int64_t end(int64_t g) const { return per_group > 0 ? (g + 1) * per_group : ends[g]; }
};

// The shard's tokens, cut into chunks that never cross a group. Sums over a group are made of one partial sum per
// chunk, so they do not depend on who works on what.
struct TokenChunks {
  int64_t token_offset, tokens;
  int64_t chunk_tokens;
  int64_t first_group, last_group;      // groups with tokens in the shard
  int64_t per_group;                    // chunks of a group, when groups have one size
  int64_t first_chunk[kMaxRanges + 1];  // otherwise
  int64_t count;

  TD_HD int64_t local_begin(const TokenGroups& groups, int64_t g) const {
    const int64_t begin = groups.begin(g) - token_offset;
    return begin > 0 ? begin : 0;
  }
  TD_HD int64_t local_end(const TokenGroups& groups, int64_t g) const {
    const int64_t end = groups.end(g) - token_offset;
    return end < tokens ? end : tokens;
  }
  // Token range [begin, end) of a chunk within the shard (it may be empty), and its group.
  TD_HD void locate(const TokenGroups& groups, int64_t chunk, int64_t& g, int64_t& begin, int64_t& end) const {
    int64_t j;
    if (groups.per_group > 0) {
      g = first_group + chunk / per_group;
      j = chunk % per_group;
    } else {
      g = first_group;
      while (chunk >= first_chunk[g + 1]) ++g;
      j = chunk - first_chunk[g];
    }
    const int64_t stop = local_end(groups, g);
    begin = local_begin(groups, g) + j * chunk_tokens;
    end = begin + chunk_tokens < stop ? begin + chunk_tokens : stop;
  }
  TD_HD int64_t chunk_begin(const TokenGroups& groups, int64_t g) const {
    return groups.per_group > 0 ? (g - first_group) * per_group : first_chunk[g];
  }
  TD_HD int64_t chunk_end(const TokenGroups& groups, int64_t g) const {
    return groups.per_group > 0 ? (g + 1 - first_group) * per_group : first_chunk[g + 1];
  }
};

// At most about `pieces` chunks (and one for the rest of every group): enough to share among threads.
constexpr int64_t kCpuPieces = 64;

inline TokenChunks make_chunks(const TokenGroups& groups, int64_t token_offset, int64_t tokens, int64_t pieces) {
  TokenChunks chunks{};
  chunks.token_offset = token_offset;
  chunks.tokens = tokens;
  const int64_t wanted = (tokens + pieces - 1) / pieces;
  chunks.chunk_tokens = wanted < 32 ? 32 : wanted;
  chunks.first_group = groups.group(token_offset);
  chunks.last_group = groups.group(token_offset + tokens - 1);
  const auto chunks_of = [&](int64_t length) { return (length + chunks.chunk_tokens - 1) / chunks.chunk_tokens; };
  if (groups.per_group > 0) {
    chunks.per_group = chunks_of(groups.per_group < tokens ? groups.per_group : tokens);
    chunks.count = (chunks.last_group - chunks.first_group + 1) * chunks.per_group;
    return chunks;
  }
  for (int64_t g = chunks.first_group; g <= chunks.last_group; ++g) {
    const int64_t length = chunks.local_end(groups, g) - chunks.local_begin(groups, g);
    chunks.first_chunk[g + 1] = chunks.first_chunk[g] + chunks_of(length);
  }
  chunks.count = chunks.first_chunk[chunks.last_group + 1];
  return chunks;
}

// On a GPU every block takes an equal share of the tokens of all samples, in order, and leaves one row of sums for
// every (sample, group) that it comes to. Their numbers go up with block and group: row block + sample and group in
// order.
struct TokenShares {
  int64_t share, blocks;  // tokens of a block; blocks that have any

  TokenShares() = default;
  TokenShares(int64_t items, int64_t most_blocks, int64_t least_share) {
    share = (items + most_blocks - 1) / most_blocks;
    if (share < least_share) share = least_share;
    blocks = (items + share - 1) / share;
  }
  // Rows [begin, end) of a group whose tokens are [first, stop) of all samples' tokens; `order` is its number.
  TD_HD void rows(int64_t first, int64_t stop, int64_t order, int64_t& begin, int64_t& end) const {
    begin = end = 0;
    if (first >= stop) return;
    begin = first / share + order;
    end = (stop - 1) / share + order + 1;
  }
};
constexpr int64_t kModulateBlocks = 1024, kModulateShare = 8;  // at most; at least

// Rows of sums that blocks of a GPU leave, whatever GPU it is.
inline int64_t modulate_share_rows(const TokenChunks& chunks, int64_t batch) {
  return TokenShares(batch * chunks.tokens, kModulateBlocks, kModulateShare).blocks +
         batch * (chunks.last_group - chunks.first_group + 1);
}

// Rows [B, N, dim] of any floating dtype; strides of batch and token axes.
struct Rows {
  void* data;
  int64_t batch_stride, token_stride;
  DType dtype;
};
// Modulation [B, G, dim] in the compute dtype (float, or double when the rows are double).
struct GroupRows {
  const void* data;
  int64_t batch_stride, group_stride;
};

// residual = x + gate * y (when y is given); out = layer_norm(residual) * (1 + scale) + shift (when out is given). With
// codes in the place of out, whose data is null then, the result goes there in eight bits; out.dtype is the type that
// layers have.
struct ModulateArgs {
  int64_t batch, tokens, token_offset;
  int dim;
  double eps;
  TokenGroups groups;
  Rows x, y, residual, out;
  CodeRows codes;
  GroupRows gate, scale, shift;

  TD_HD bool norms() const { return out.data != nullptr || codes.data != nullptr; }
};

// Backward. `residual` is the forward result (x itself in norm_modulate). total = grad_residual + d(out)/d(residual);
// grad_x = total, grad_y = gate * total. Sums over groups go to [B, G, dim] through `partial` [rows, 3, dim] (scale,
// shift, gate): B * chunks rows on the CPU, at most modulate_share_rows on a GPU.
struct ModulateGradArgs {
  int64_t batch, tokens, token_offset;
  int dim;
  double eps;
  TokenGroups groups;
  TokenChunks chunks;
  Rows residual, y, grad_residual, grad_out, grad_x, grad_y;
  GroupRows gate, scale;
  void *grad_gate, *grad_scale, *grad_shift;
  void* partial;
};

TD_DECLARE_KERNEL(modulate_forward, const ModulateArgs&)
TD_DECLARE_KERNEL(modulate_backward, const ModulateGradArgs&)

}  // namespace td
