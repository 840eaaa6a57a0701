// SPDX-License-Identifier: Apache-2.0
#include "framepack.cuh"

#include <algorithm>

namespace td::cuda {
namespace {

unsigned blocks_for(int64_t items) {
  return unsigned(std::clamp<int64_t>(items, 1, 65536));
}

// Orders the buckets, those with the longest sums first so that they do not end last, and numbers their blocks.
template <class T>
int64_t number_blocks(PackProductArgs& args) {
  const auto steps = [&](const PackShare& share) {
    return share.weight == nullptr ? -1 : pack_sizes(args, share).length / share.splits;
  };
  std::stable_sort(args.shares, args.shares + args.bucket_count,
                   [&](const PackShare& a, const PackShare& b) { return steps(a) > steps(b); });
  int64_t blocks = 0, part = 0;
  for (int i = 0; i < args.bucket_count; ++i) {
    PackShare& share = args.shares[i];
    const PackSizes sizes = pack_sizes(args, share);
    share.first_block = int32_t(blocks);
    share.part = part;
    share.row_tiles = int32_t((sizes.rows + kTileRows - 1) / kTileRows);
    share.column_tiles = int32_t((sizes.columns + kTileRows - 1) / kTileRows);
    if (share.weight != nullptr) blocks += int64_t(share.row_tiles) * share.column_tiles * share.splits;
    part += pack_part_size(args, share);
    if (blocks > 0x7fffffff) throw std::runtime_error("framepack: the buckets need more blocks than a launch may have");
  }
  return blocks;
}

template <class T, PackProduct kProduct>
void run(PackProductArgs args, cudaStream_t stream) {
  constexpr const char* op = "framepack";
  const PackShare* shares = args.shares;
  const int64_t blocks = number_blocks<T>(args);
  if (blocks > 0) {
    launch(op, product_kernel<T, kProduct>, unsigned(blocks), PackCore<T, kProduct>::kThreads, kTilesBytes, stream,
           args);
  }
  int64_t rows = 0, pooled = 0;
  for (int i = 0; i < args.bucket_count; ++i) {
    if (shares[i].weight == nullptr) pooled += shares[i].patches(args.batch) * args.channels;
    if (shares[i].weight != nullptr && shares[i].splits > 1) rows = std::max(rows, pack_sizes(args, shares[i]).rows);
  }
  if (kProduct == PackProduct::grad_latents) {
    rows = int64_t(args.batch) * args.channels * args.time * args.height;
    launch(op, collect_kernel<T>, blocks_for((rows * 32 + kPackThreads - 1) / kPackThreads), kPackThreads, 0, stream,
           args);
    return;
  }
  if constexpr (kProduct != PackProduct::grad_latents) {
    if (rows > 0) {
      launch(op, reduce_kernel<T, kProduct>, blocks_for((rows * 32 + kPackThreads - 1) / kPackThreads), kPackThreads, 0,
             stream, args);
    }
  }
  if (kProduct == PackProduct::project && pooled > 0)
    launch(op, pool_kernel<T>, blocks_for((pooled + kPackThreads - 1) / kPackThreads), kPackThreads, 0, stream, args);
}

}  // namespace

void framepack_product(const PackProductArgs& args, cudaStream_t stream) {
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (args.product) {
      case PackProduct::project:
        return run<T, PackProduct::project>(args, stream);
      case PackProduct::grad_latents:
        return run<T, PackProduct::grad_latents>(args, stream);
      default:
        return run<T, PackProduct::grad_weights>(args, stream);
    }
  });
}

}  // namespace td::cuda
