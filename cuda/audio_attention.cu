// SPDX-License-Identifier: Apache-2.0
#include "audio_attention_forward.cuh"
#include "audio_attention_general.cuh"

namespace td::cuda {
namespace {

constexpr int64_t kMaxBlocks = 12;      // of 8 keys
constexpr int kMaxTiles = 16;           // that a warp takes with the same keys
constexpr int kMaxSharedBytes = 32768;  // of a block that works on several heads

// Tiles of a warp such that the last round of thread blocks is nearly as full as the others: those that keep the device
// busy for the shortest time, if a block costs a tile besides its own (its keys).
int64_t even_tiles(int64_t tiles, int64_t groups, int64_t resident) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t share = 1; share <= kMaxTiles; ++share) {
    const int64_t blocks = groups * ((tiles + share - 1) / share), rounds = (blocks + resident - 1) / resident;
    if (rounds * (share + 1) >= least) continue;
    least = rounds * (share + 1);
    best = share;
  }
  return best;
}

template <class T, int D, int NB>
void tensor_forward(const AudioAttentionArgs& args, cudaStream_t stream) {
  const char* op = "audio_attention";
  int heads = kForwardWarps;
  while (heads > 1 && heads * kForwardHeadBytes<D, NB> > kMaxSharedBytes) heads /= 2;
  AudioPlan plan(args, heads);
  const auto kernel = tensor_forward_kernel<T, D, NB>;
  const size_t bytes = size_t(heads * kForwardHeadBytes<D, NB> + KeyList<NB>::kBytes);
  if (!shared_bytes_exist(op, bytes)) return general_forward(args, stream);
  const int64_t rows = kForwardWarps / heads * kTileRows, tiles = (AudioPlan::longest(args) + rows - 1) / rows;
  const int64_t resident = resident_blocks(op, kernel, 32 * kForwardWarps, bytes, int64_t(1) << 20);
  const int64_t share = even_tiles(tiles, plan.groups, resident), chunks = (tiles + share - 1) / share;
  plan.tiles = uint32_t((tiles + chunks - 1) / chunks);
  plan.chunks = uint32_t((tiles + plan.tiles - 1) / plan.tiles);
  plan.finish();
  const unsigned items = AudioPlan::check_count(int64_t(plan.groups) * plan.chunks);
  launch(op, kernel, items, 32 * kForwardWarps, bytes, stream, args, plan);
}

template <class T, int D>
void tensor_forward(const AudioAttentionArgs& args, int64_t blocks, cudaStream_t stream) {
  if (blocks <= 1) return tensor_forward<T, D, 1>(args, stream);
  if (blocks <= 2) return tensor_forward<T, D, 2>(args, stream);
  if (blocks <= 4) return tensor_forward<T, D, 4>(args, stream);
  if (blocks <= 5) return tensor_forward<T, D, 5>(args, stream);
  if (blocks <= 8) return tensor_forward<T, D, 8>(args, stream);
  tensor_forward<T, D, 12>(args, stream);
}

template <class T>
void tensor_forward(const AudioAttentionArgs& args, int64_t blocks, cudaStream_t stream) {
  if (args.dim == 32) return tensor_forward<T, 32>(args, blocks, stream);
  if (args.dim == 64) return tensor_forward<T, 64>(args, blocks, stream);
  tensor_forward<T, 128>(args, blocks, stream);
}

}  // namespace

void audio_attention(const AudioAttentionArgs& args, cudaStream_t stream) {
  const int64_t blocks = tensor_blocks(args, kMaxBlocks);
  if (blocks == 0) return general_forward(args, stream);
  args.dtype == DType::bfloat16 ? tensor_forward<bf16>(args, blocks, stream)
                                : tensor_forward<fp16>(args, blocks, stream);
}

}  // namespace td::cuda
