// SPDX-License-Identifier: Apache-2.0
#include "audio_attention_forward.cuh"
#include "audio_attention_general.cuh"

namespace td::cuda {
namespace {

constexpr int64_t kMaxBlocks = 12;      // of 8 keys
constexpr int kMaxTiles = 8;            // that a warp takes with the same keys
constexpr int kMaxSharedBytes = 32768;  // of a block that works on several heads

template <class T, int D, int NB>
void tensor_forward(const AudioAttentionArgs& args, cudaStream_t stream) {
  const char* op = "audio_attention";
  int heads = kForwardWarps;
  while (heads > 1 && heads * kForwardHeadBytes<D, NB> > kMaxSharedBytes) heads /= 2;
  AudioPlan plan(args, heads);
  const auto kernel = tensor_forward_kernel<T, D, NB>;
  const size_t bytes = size_t(heads * kForwardHeadBytes<D, NB> + KeyList<NB>::kBytes);
  if (!shared_bytes_exist(op, bytes)) return general_forward(args, stream);
  // Chunks of equal length, and enough of them for several rounds of thread blocks.
  const int64_t rows = kForwardWarps / heads * kTileRows, tiles = (AudioPlan::longest(args) + rows - 1) / rows;
  const int64_t wanted = 4 * int64_t(resident_blocks(op, kernel, 32 * kForwardWarps, bytes, int64_t(1) << 20));
  int64_t chunks = (tiles + kMaxTiles - 1) / kMaxTiles;
  if (chunks * plan.groups < wanted) chunks = (wanted + plan.groups - 1) / plan.groups;
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
