// SPDX-License-Identifier: Apache-2.0
#include "audio_attention_backward.cuh"
#include "audio_attention_general.cuh"

namespace td::cuda {
namespace {

template <class T, int D, int NB>
void tensor_backward(const AudioAttentionArgs& args, cudaStream_t stream) {
  const char* op = "audio_attention_backward";
  using Tile = BackwardTile<D, NB>;
  const size_t bytes = size_t(Tile::kBytes);
  if (!shared_bytes_exist(op, bytes)) return general_backward(args, stream);
  AudioPlan plan(args, Tile::kHeads);
  const int64_t rows = kTileRows * Tile::kShare;
  if (plan.groups > 0) plan.tiles = uint32_t((AudioPlan::longest(args) + rows - 1) / rows);
  plan.finish();
  if (plan.groups > 0) {
    const auto kernel = tensor_backward_kernel<T, D, NB>;
    const int threads = 32 * Tile::kWarps;
    const uint32_t total = AudioPlan::check_count(int64_t(plan.groups) * plan.tiles);
    const unsigned parts =
        resident_blocks(op, kernel, threads, bytes, total < AudioTile::kMaxParts ? total : AudioTile::kMaxParts);
    plan.share = total / parts;
    plan.extra = total - plan.share * parts;
    launch(op, kernel, parts, threads, bytes, stream, args, plan);
  }
  const int64_t keys = args.batch * args.speakers * args.frames * args.audio * args.heads;
  const uint32_t items = uint32_t(AudioPlan::check_count(keys * (D / 4)));
  launch(op, add_parts_kernel<T>, capped((items + 255) / 256), 256, 0, stream, args, plan, items,
         int64_t(Tile::kKeySums));
}

template <class T, int D>
void tensor_backward(const AudioAttentionArgs& args, int64_t blocks, cudaStream_t stream) {
  switch (AudioTile::fitting(blocks)) {
    case 1:
      return tensor_backward<T, D, 1>(args, stream);
    case 2:
      return tensor_backward<T, D, 2>(args, stream);
    case 4:
      return tensor_backward<T, D, 4>(args, stream);
    case 5:
      return tensor_backward<T, D, 5>(args, stream);
    default:
      return tensor_backward<T, D, 8>(args, stream);
  }
}

template <class T>
void tensor_backward(const AudioAttentionArgs& args, int64_t blocks, cudaStream_t stream) {
  if (args.dim == 32) return tensor_backward<T, 32>(args, blocks, stream);
  if (args.dim == 64) return tensor_backward<T, 64>(args, blocks, stream);
  tensor_backward<T, 128>(args, blocks, stream);
}

}  // namespace

void audio_attention_backward(const AudioAttentionArgs& args, cudaStream_t stream) {
  const bool aligned = aligned_rows(args.grad_out, args.grad_out_strides, 3, 2);
  const int64_t blocks = aligned ? tensor_blocks(args, AudioTile::kMaxBlocks) : 0;
  if (blocks == 0) return general_backward(args, stream);
  args.dtype == DType::bfloat16 ? tensor_backward<bf16>(args, blocks, stream)
                                : tensor_backward<fp16>(args, blocks, stream);
}

}  // namespace td::cuda
