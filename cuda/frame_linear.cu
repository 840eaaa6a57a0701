// SPDX-License-Identifier: Apache-2.0
#include "core/frame_linear.h"

#include "gemm.cuh"

namespace td::cuda {
namespace {

template <class T>
using FrameCore = core_t<T, Layout::sum, Layout::row>;

// A block takes up to 128 tokens of one frame and 128 channels. Tiles of rows come one after the other, so that blocks
// that run together share the frame's matrix.
template <class T, class R>
__global__ void __launch_bounds__(FrameCore<T>::kThreads)
    frame_linear_kernel(const __grid_constant__ FrameLinearArgs args, uint32_t row_tiles, uint32_t column_tiles) {
  using Core = FrameCore<T>;
  using C = typename Core::C;
  const uint32_t rest = blockIdx.x / row_tiles, place = rest / column_tiles, count = uint32_t(frame_count(args));
  const int64_t b = place / count, frame = first_frame(args) + place % count;
  const int64_t begin = frame * args.tokens_per_frame - args.token_offset, end = begin + args.tokens_per_frame;
  const int64_t row = (begin > 0 ? begin : 0) + int64_t(blockIdx.x % row_tiles) * kTileRows;
  const int64_t rows = end < args.tokens ? end : args.tokens, column = int64_t(rest % column_tiles) * kTileRows;
  if (row >= rows) return;
  const T* x = static_cast<const T*>(args.x) + b * args.x_strides[0];
  const T* weight = static_cast<const T*>(args.weight) + b * args.weight_strides[0] + frame * args.weight_strides[1];
  const R* residual =
      static_cast<const R*>(args.residual) + (args.residual != nullptr ? b * args.residual_strides[0] : 0);
  constexpr int kLines = kTileRows * int(sizeof(R)) / 128, kWidth = 128 / int(sizeof(R));
  for (int item = int(threadIdx.x); residual != nullptr && item < kTileRows * kLines; item += Core::kThreads) {
    const int64_t at = row + item / kLines, first = column + item % kLines * kWidth;
    if (at < rows && first < args.dim) prefetch(residual + at * args.residual_strides[1] + first);
  }
  char* shared = dynamic_shared();
  Core core;
  const Matrix<T> tokens{x, args.x_strides[1], rows, args.inner, args.x_vectors != 0};
  const Matrix<T> channels{weight, args.weight_strides[2], args.inner, args.dim, args.weight_vectors != 0};
  const auto load = [&](int step, char* tile_x, char* tile_weight) {
    const int64_t at = int64_t(step) * kDepth<T>;
    load_tile<T, Layout::sum, Core::kThreads>(tile_x, tokens, row, at);
    load_tile<T, Layout::row, Core::kThreads>(tile_weight, channels, at, column);
  };
  multiply(core, shared, 0, int((args.inner + kDepth<T> - 1) / kDepth<T>), load, [](const char*) {});

  // A thread has the same four channels in every row: what goes with them is read once.
  const int64_t first = column + result_column(), length = args.dim - first;
  const int left = int(rows - row < kTileRows ? rows - row : kTileRows);
  const auto channels_of = [&](const void* values) {
    return values != nullptr ? static_cast<const C*>(values) + first : nullptr;
  };
  const Quad<C> shift = column_values(channels_of(args.bias), length, C(0));
  const Quad<C> scale = column_values(channels_of(args.gate), length, C(1));
  const C* shares = static_cast<const C*>(args.mask);
  if (shares != nullptr) shares += b * args.mask_stride + row;
  const R* before = residual != nullptr ? residual + row * args.residual_strides[1] + first : nullptr;
  R* out = static_cast<R*>(args.out) + b * args.out_strides[0] + row * args.out_strides[1] + first;

  struct Fetched {
    Vector<R, 4> before;
    C share;
  };
  const auto finish = [&](auto whole) {
    // Several loads must be on their way at a time: none may stand in a branch, and none is unpacked before its use.
    const auto fetch = [&](int r) {
      const int at = r < left ? r : left - 1;
      Fetched fetched;
      fetched.share = shares != nullptr ? shares[at] : C(1);
      fetched.before.clear();
      if constexpr (decltype(whole)::value) {
        if (before != nullptr) fetched.before.load(before + at * args.residual_strides[1]);
      } else {
        const R* found = before != nullptr ? before + at * args.residual_strides[1] : nullptr;
        fetched.before.set(column_values(found, length, C(0)).v);
      }
      return fetched;
    };
    const auto store = [&](int r, const Quad<C>& found, const Fetched& fetched) {
      Quad<C> values;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values.v[i] = fetched.before.get(i) + fetched.share * ((found.v[i] + shift.v[i]) * scale.v[i]);
      }
      if (r >= left) return;
      if constexpr (decltype(whole)::value) {
        store_whole_quad(out + r * args.out_strides[1], values);
      } else {
        store_quad(out + r * args.out_strides[1], values, length, false);
      }
    };
    store_results(core, shared, fetch, store);
  };
  if (args.out_vectors && column + kTileRows <= args.dim) {
    finish(std::true_type{});
  } else {
    finish(std::false_type{});
  }
}

template <class T, class R>
void run(const FrameLinearArgs& args, cudaStream_t stream) {
  const int64_t longest = args.tokens < args.tokens_per_frame ? args.tokens : args.tokens_per_frame;
  const int64_t row_tiles = (longest + kTileRows - 1) / kTileRows;
  const int64_t column_tiles = (args.dim + kTileRows - 1) / kTileRows;
  const int64_t blocks = row_tiles * column_tiles * args.batch * frame_count(args);
  if (blocks > 0x7fffffff) throw std::runtime_error("frame_linear: x needs more blocks than a launch may have");
  launch("frame_linear", frame_linear_kernel<T, R>, unsigned(blocks), FrameCore<T>::kThreads, kTilesBytes, stream, args,
         uint32_t(row_tiles), uint32_t(column_tiles));
}

}  // namespace

void frame_linear(const FrameLinearArgs& args, cudaStream_t stream) {
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 2) {
      if (args.out_dtype == DType::float32) return run<T, float>(args, stream);
    }
    run<T, T>(args, stream);
  });
}

}  // namespace td::cuda
