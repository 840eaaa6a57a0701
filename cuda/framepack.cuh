// SPDX-License-Identifier: Apache-2.0
// Kernels of framepack: the three products of every bucket (csrc/core/framepack_gemm.h) with patches gathered from the
// latents straight into the tiles, and what adds up their partial sums, always in the same order.
#pragma once

#include "core/framepack_gemm.h"
#include "gemm.cuh"

namespace td::cuda {

// The patch that token m of a bucket (counted through all samples) is made of.
template <class T>
struct Patch {
  const T* sample;  // null: there is no such token
  int32_t t, y, x;  // its first corner; t counts places in the bucket's list of frames
};

template <class T>
__device__ __forceinline__ Patch<T> patch_of(const PackProductArgs& args, const PackShare& share, int64_t m) {
  if (m >= share.patches(args.batch)) return {nullptr, 0, 0, 0};
  const uint32_t line = share.grid[2].div(uint32_t(m)), x = uint32_t(m) - line * share.grid[2].divisor;
  const uint32_t plane = share.grid[1].div(line), y = line - plane * share.grid[1].divisor;
  const uint32_t b = share.grid[0].div(plane), t = plane - b * share.grid[0].divisor;
  return {static_cast<const T*>(args.latents) + b * args.latent_strides[0], int32_t(t * share.kernel[0].divisor),
          int32_t(y * share.kernel[1].divisor), int32_t(x * share.kernel[2].divisor)};
}

// Frame of the latents at a place of the bucket's (padded) list; -1: a zero frame.
__device__ __forceinline__ int32_t frame_at(const PackProductArgs& args, const PackShare& share, int32_t place) {
  const int64_t known = pack_source(args.padding, place, share.frames);
  return known < 0 ? -1 : args.frames[share.first_frame + known];
}

// Fills a tile whose lines are patches and whose elements are taps, from `tap` on. A thread copies a part of one line:
// neighbouring lanes copy neighbouring patches, that is, neighbours in the latents.
template <class T, Layout kLayout, int kThreads>
__device__ __forceinline__ void gather_taps(const PackProductArgs& args, const PackShare& share, const Patch<T>& patch,
                                            uint32_t tap, char* tile) {
  using Shape = TileShape<T, kLayout>;
  constexpr int kSpan = Shape::elements * Shape::lines / kThreads, kCount = 16 / int(sizeof(T));
  static_assert(kThreads % Shape::lines == 0 && kSpan % kCount == 0);
  const int line = int(threadIdx.x) % Shape::lines, first = int(threadIdx.x) / Shape::lines * kSpan;
  const int32_t kt = int32_t(share.kernel[0].divisor), kh = int32_t(share.kernel[1].divisor);
  const int32_t kw = int32_t(share.kernel[2].divisor), run = share.run;
  tap += uint32_t(first);
  const uint32_t row = share.kernel[2].div(tap), plane = share.kernel[1].div(row);
  int32_t c = int32_t(share.kernel[0].div(plane)), dt = int32_t(plane - uint32_t(c * kt));
  int32_t dy = int32_t(row - plane * uint32_t(kh)), dx = int32_t(tap - row * uint32_t(kw));
  // One channel of a frame, which the taps leave once in kh * kw; null: there is none, only zeros.
  int32_t frame = frame_at(args, share, patch.t + dt);
  const auto picture_of = [&]() -> const T* {
    if (patch.sample == nullptr || c >= args.channels || frame < 0) return nullptr;
    return patch.sample + c * args.latent_strides[1] + frame * args.latent_strides[2];
  };
  const T* picture = picture_of();
#pragma unroll 1
  for (int at = first; at < first + kSpan; at += run) {
    char* target = tile + Shape::offset(line, at / kCount) + at % kCount * int(sizeof(T));
    const T* source = static_cast<const T*>(args.latents);
    int32_t there = 0;  // elements before the padding
    if (picture != nullptr) {
      const int32_t y = int32_t(pack_source(args.padding, patch.y + dy, args.height)), x = patch.x + dx;
      if (y >= 0) {
        const T* start = picture + y * args.latent_strides[3];
        there = args.width - x < run ? args.width - x : run;
        if (there < run && args.padding == PackPadding::replicate) {
          for (int e = 0; e < run; ++e)
            reinterpret_cast<T*>(target)[e] = start[x + e < args.width ? x + e : args.width - 1];
          there = -1;
        } else if (there > 0) {
          source = start + x;
        } else {
          there = 0;
        }
      }
    }
    if (there >= 0) {
      const int bytes = run * int(sizeof(T)), valid = there * int(sizeof(T));
      if (bytes == 16) {
        copy_async<16>(target, source, valid);
      } else if (bytes == 8) {
        copy_async<8>(target, source, valid);
      } else if (bytes == 4) {
        copy_async<4>(target, source, valid);
      } else {
        *reinterpret_cast<T*>(target) = there > 0 ? *source : T(0);
      }
    }
    dx += run;
    if (dx == kw) {
      dx = 0;
      if (++dy == kh) {
        dy = 0;
        if (++dt == kt) {
          dt = 0;
          ++c;
        }
        if (kt > 1) frame = frame_at(args, share, patch.t + dt);
        picture = picture_of();
      }
    }
  }
}

// Packed token m of a bucket, counted through all samples.
template <class T>
__device__ __forceinline__ T* token_of(const PackProductArgs& args, const PackShare& share, int64_t m) {
  const uint32_t b = share.tokens.div(uint32_t(m)), token = uint32_t(m) - b * share.tokens.divisor;
  return static_cast<T*>(args.tokens) + b * args.token_strides[0] +
         (int64_t(share.first_token) + token) * args.token_strides[1];
}

// Tiles of the rows of tokens, or of the weight, [.., length] of which are lines first .. and elements from column on.
template <class T, Layout kLayout, int kThreads>
__device__ __forceinline__ void load_tokens(const PackProductArgs& args, const PackShare& share, int64_t first,
                                            int64_t column, char* tile) {
  const int64_t rows = share.patches(args.batch);
  if (args.batch == 1) {
    const Matrix<T> tokens{token_of<const T>(args, share, 0), args.token_strides[1], rows, args.out,
                           args.token_vectors != 0};
    return load_tile<T, kLayout, kThreads>(tile, tokens, first, column);
  }
  load_lines<T, kLayout, kThreads>(tile, args.token_vectors, [&](int line, int64_t& count) -> const T* {
    const bool there = first + line < rows && column < args.out;
    count = there ? args.out - column : 0;
    return there ? token_of<const T>(args, share, first + line) + column : static_cast<const T*>(args.tokens);
  });
}

template <class T, Layout kLayout, int kThreads>
__device__ __forceinline__ void load_weight(const PackProductArgs& args, const PackShare& share, int64_t first,
                                            int64_t column, char* tile) {
  const int64_t taps = args.channels * share.volume();
  const Matrix<T> weight{static_cast<const T*>(share.weight), taps, args.out, taps, share.weight_vectors != 0};
  load_tile<T, kLayout, kThreads>(tile, weight, first, column);
}

// Layouts of the operands per product: see PackProduct.
template <PackProduct kProduct>
struct PackLayouts {
  static constexpr Layout a = kProduct == PackProduct::grad_weights ? Layout::row : Layout::sum;
  static constexpr Layout b = kProduct == PackProduct::project ? Layout::sum : Layout::row;
};
template <class T, PackProduct kProduct>
using PackCore = core_t<T, PackLayouts<kProduct>::a, PackLayouts<kProduct>::b>;

// One block computes 128 x 128 results of one bucket, or one part of their sums.
template <class T, PackProduct kProduct>
__global__ void __launch_bounds__(PackCore<T, kProduct>::kThreads)
    product_kernel(const __grid_constant__ PackProductArgs args) {
  using Core = PackCore<T, kProduct>;
  using C = typename Core::C;
  constexpr Layout kA = PackLayouts<kProduct>::a, kB = PackLayouts<kProduct>::b;
  constexpr int kThreads = Core::kThreads;
  int which = 0;
  while (which + 1 < args.bucket_count && int(blockIdx.x) >= args.shares[which + 1].first_block) ++which;
  const PackShare& share = args.shares[which];
  const PackSizes sizes = pack_sizes(args, share);
  const int block = int(blockIdx.x) - share.first_block, tile = block / share.row_tiles;
  const int part = tile / share.column_tiles;
  const int64_t row = int64_t(block % share.row_tiles) * kTileRows;
  const int64_t column = int64_t(tile % share.column_tiles) * kTileRows;
  const int steps = int((sizes.length + kDepth<T> - 1) / kDepth<T>);
  const int begin = int(int64_t(steps) * part / share.splits), end = int(int64_t(steps) * (part + 1) / share.splits);
  char* shared = dynamic_shared();
  Core core;
  C bias_sum = C(0);

  if constexpr (kProduct == PackProduct::project) {
    const Patch<T> patch = patch_of<T>(args, share, row + int(threadIdx.x) % kTileRows);
    const auto load = [&](int step, char* a, char* b) {
      gather_taps<T, kA, kThreads>(args, share, patch, uint32_t(step) * kDepth<T>, a);
      load_weight<T, kB, kThreads>(args, share, column, int64_t(step) * kDepth<T>, b);
    };
    multiply(core, shared, begin, end, load, [](const char*) {});
  } else if constexpr (kProduct == PackProduct::grad_latents) {
    const auto load = [&](int step, char* a, char* b) {
      load_tokens<T, kA, kThreads>(args, share, row, int64_t(step) * kDepth<T>, a);
      load_weight<T, kB, kThreads>(args, share, int64_t(step) * kDepth<T>, column, b);
    };
    multiply(core, shared, begin, end, load, [](const char*) {});
  } else {
    const auto load = [&](int step, char* a, char* b) {
      const int64_t first = int64_t(step) * kDepth<T>;
      load_tokens<T, kA, kThreads>(args, share, first, row, a);
      gather_taps<T, kB, kThreads>(args, share, patch_of<T>(args, share, first + int(threadIdx.x) % kDepth<T>),
                                   uint32_t(column), b);
    };
    // Blocks of the first column tile see every gradient of their rows once: they sum up the bias's.
    const bool sums_bias = share.bias != nullptr && column == 0 && threadIdx.x < kTileRows;
    multiply(core, shared, begin, end, load, [&](const char* a) {
      if (!sums_bias) return;
      constexpr int kCount = 16 / int(sizeof(T));
      const int element = int(threadIdx.x);
      C sum = C(0);
      for (int line = 0; line < kDepth<T>; ++line) {
        sum += C(reinterpret_cast<const T*>(a + TileShape<T, kA>::offset(line, element / kCount))[element % kCount]);
      }
      bias_sum += sum;
    });
    if (sums_bias && row + threadIdx.x < args.out) {
      if (share.splits > 1) {
        C* sums = static_cast<C*>(args.workspace) + share.part + share.splits * sizes.rows * sizes.columns;
        sums[part * args.out + row + threadIdx.x] = bias_sum;
      } else {
        static_cast<T*>(share.bias)[row + threadIdx.x] = T(bias_sum);
      }
    }
  }

  const bool partial = kProduct == PackProduct::grad_latents || share.splits > 1;
  // A thread has the same four columns in every row.
  const int64_t first = column + result_column(), count = sizes.columns - first;
  const int left = int(sizes.rows - row < kTileRows ? sizes.rows - row : kTileRows);
  if (partial) {
    C* sums = static_cast<C*>(args.workspace) + share.part + (part * sizes.rows + row) * sizes.columns + first;
    const bool vectors = sizes.columns % 4 == 0;
    const auto store = [&](int r, const Quad<C>& found, Nothing) {
      if (r < left && count > 0) store_quad(sums + r * sizes.columns, found, count, vectors);
    };
    return store_results(core, shared, [](int) { return Nothing{}; }, store);
  }
  const T* bias = static_cast<const T*>(share.bias);
  const bool shifted = kProduct == PackProduct::project && bias != nullptr;
  const Quad<C> shift = column_values(shifted ? bias + first : nullptr, count, C(0));
  const auto store = [&](int r, const Quad<C>& found, Nothing) {
    if (r >= left || count <= 0) return;
    if constexpr (kProduct == PackProduct::project) {
      Quad<C> values;
#pragma unroll
      for (int i = 0; i < 4; ++i) values.v[i] = found.v[i] + shift.v[i];
      store_quad(token_of<T>(args, share, row + r) + first, values, count, args.token_vectors);
    } else {
      store_quad(static_cast<T*>(share.weight) + (row + r) * sizes.columns + first, found, count, share.weight_vectors);
    }
  };
  store_results(core, shared, [](int) { return Nothing{}; }, store);
}

constexpr int kPackThreads = 256;

// Adds up the parts of cut sums: tokens, with the bias, or gradients of weights and biases. A warp takes one row.
template <class T, PackProduct kProduct>
__global__ void __launch_bounds__(kPackThreads) reduce_kernel(const __grid_constant__ PackProductArgs args) {
  using C = compute_t<T>;
  const int lane = int(threadIdx.x) & 31;
  const int64_t warps = int64_t(gridDim.x) * (kPackThreads / 32);
  for (int which = 0; which < args.bucket_count; ++which) {
    const PackShare& share = args.shares[which];
    if (share.splits == 1 || share.weight == nullptr) continue;
    const PackSizes sizes = pack_sizes(args, share);
    const C* sums = static_cast<const C*>(args.workspace) + share.part;
    const int64_t size = sizes.rows * sizes.columns;
    const bool vectors = sizes.columns % 4 == 0;
    for (int64_t row = int64_t(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32; row < sizes.rows; row += warps) {
      T* target = kProduct == PackProduct::project ? token_of<T>(args, share, row)
                                                   : static_cast<T*>(share.weight) + row * sizes.columns;
      for (int64_t column = lane * 4; column < sizes.columns; column += 128) {
        const C* first = sums + row * sizes.columns + column;
        const int64_t count = sizes.columns - column;
        Quad<C> total{};
        for (int part = 0; part < share.splits; ++part, first += size) {
          if (vectors) {
            const Quad<C> found = *reinterpret_cast<const Quad<C>*>(first);
#pragma unroll
            for (int i = 0; i < 4; ++i) total.v[i] += found.v[i];
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) total.v[i] += i < count ? first[i] : C(0);
          }
        }
        if (kProduct == PackProduct::project && share.bias != nullptr) {
#pragma unroll
          for (int i = 0; i < 4; ++i) total.v[i] += i < count ? C(static_cast<const T*>(share.bias)[column + i]) : C(0);
        }
        store_quad(target + column, total, count,
                   kProduct == PackProduct::project ? args.token_vectors : share.weight_vectors);
      }
      if (kProduct == PackProduct::grad_weights && share.bias != nullptr && lane == 0) {
        C total = C(0);
        for (int part = 0; part < share.splits; ++part) total += sums[share.splits * size + part * args.out + row];
        static_cast<T*>(share.bias)[row] = T(total);
      }
    }
  }
}

// Tokens of buckets that are averaged: a thread per token and channel, neighbours along the channels.
template <class T>
__global__ void __launch_bounds__(kPackThreads) pool_kernel(const __grid_constant__ PackProductArgs args) {
  using C = compute_t<T>;
  for (int which = 0; which < args.bucket_count; ++which) {
    const PackShare& share = args.shares[which];
    if (share.weight != nullptr) continue;
    const int64_t items = share.patches(args.batch) * args.channels;
    for (int64_t item = int64_t(blockIdx.x) * kPackThreads + threadIdx.x; item < items;
         item += int64_t(gridDim.x) * kPackThreads) {
      const int64_t m = item / args.channels, c = item - m * args.channels;
      const Patch<T> patch = patch_of<T>(args, share, m);
      C sum = C(0);
      for (int32_t dt = 0; dt < int32_t(share.kernel[0].divisor); ++dt) {
        const int32_t frame = frame_at(args, share, patch.t + dt);
        for (int32_t dy = 0; dy < int32_t(share.kernel[1].divisor); ++dy) {
          const int64_t y = pack_source(args.padding, patch.y + dy, args.height);
          if (frame < 0 || y < 0) continue;
          const T* line =
              patch.sample + c * args.latent_strides[1] + frame * args.latent_strides[2] + y * args.latent_strides[3];
          for (int32_t dx = 0; dx < int32_t(share.kernel[2].divisor); ++dx) {
            const int64_t x = pack_source(args.padding, patch.x + dx, args.width);
            if (x >= 0) sum += C(line[x]);
          }
        }
      }
      token_of<T>(args, share, m)[c] = T(sum / C(share.volume()));
    }
  }
}

// Which of 32 places of the bucket's (padded) list, from `first` on, show frame t: a bit for each. All lanes of the
// warp take part.
__device__ __forceinline__ uint32_t places_of(const PackProductArgs& args, const PackShare& share, uint32_t first,
                                              int32_t t) {
  const uint32_t place = first + (threadIdx.x & 31), count = share.grid[0].divisor * share.kernel[0].divisor;
  return __ballot_sync(0xffffffffu, place < count && frame_at(args, share, int32_t(place)) == t);
}

// What a bucket adds to the gradient of one element of the latents, padding included. All lanes of the warp take part,
// each for a `w` of its own in one row; what those beyond the width get is of no use.
template <class T>
__device__ __forceinline__ compute_t<T> collect(const PackProductArgs& args, const PackShare& share, uint32_t b,
                                                uint32_t c, int32_t t, uint32_t h, uint32_t w) {
  using C = compute_t<T>;
  const uint32_t kt = share.kernel[0].divisor, kh = share.kernel[1].divisor, kw = share.kernel[2].divisor;
  const PackSpan down = pack_span(args.padding, h, args.height, int64_t(share.grid[1].divisor) * kh);
  const PackSpan across = pack_span(args.padding, w, args.width, int64_t(share.grid[2].divisor) * kw);
  const uint32_t last = w < uint32_t(args.width) ? uint32_t(across.end) : 0;
  const int64_t taps = args.channels * share.volume(), size = share.patches(args.batch) * taps;
  C sum = C(0);
#pragma unroll 1
  for (uint32_t first = 0; first < share.grid[0].divisor * kt; first += 32) {
#pragma unroll 1
    for (uint32_t places = places_of(args, share, first, t); places != 0; places &= places - 1) {
      const uint32_t place = first + uint32_t(__ffs(int(places)) - 1);
      const uint32_t ft = share.kernel[0].div(place), dt = place - ft * kt;
#pragma unroll 1
      for (uint32_t y = uint32_t(down.first); y < uint32_t(down.end); ++y) {
        const uint32_t fy = share.kernel[1].div(y), dy = y - fy * kh;
        // Patches of a bucket, and taps of a patch, are fewer than 2^31: the binding makes sure.
        const uint32_t line = ((b * share.grid[0].divisor + ft) * share.grid[1].divisor + fy) * share.grid[2].divisor;
        const uint32_t tap = ((c * kt + dt) * kh + dy) * kw;
#pragma unroll 1
        for (uint32_t x = uint32_t(across.first); x < last; ++x) {
          const uint32_t fx = share.kernel[2].div(x), dx = x - fx * kw;
          if (share.weight == nullptr) {
            sum += C(token_of<const T>(args, share, line + fx)[c]) / C(share.volume());
          } else {
            const C* part = static_cast<const C*>(args.workspace) + share.part + int64_t(line + fx) * taps + (tap + dx);
            for (int i = 0; i < share.splits; ++i) sum += part[i * size];
          }
        }
      }
    }
  }
  return sum;
}

// The gradient of the latents: every element adds up, bucket after bucket, all that was made of it. A warp takes a row.
template <class T>
__global__ void __launch_bounds__(kPackThreads, 1) collect_kernel(const __grid_constant__ PackProductArgs args) {
  const int64_t rows = int64_t(args.batch) * args.channels * args.time * args.height;
  for (int64_t row = int64_t(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32; row < rows;
       row += int64_t(gridDim.x) * (kPackThreads / 32)) {
    // The binding makes sure that rows fit 32 bits.
    const uint32_t line = uint32_t(row) / uint32_t(args.height), h = uint32_t(row) - line * uint32_t(args.height);
    const uint32_t plane = line / uint32_t(args.time), t = line - plane * uint32_t(args.time);
    const uint32_t b = plane / uint32_t(args.channels), c = plane - b * uint32_t(args.channels);
    T* target = static_cast<T*>(args.latents) + b * args.latent_strides[0] + c * args.latent_strides[1] +
                t * args.latent_strides[2] + h * args.latent_strides[3];
    for (uint32_t first = 0; first < uint32_t(args.width); first += 32) {
      const uint32_t w = first + (threadIdx.x & 31);
      compute_t<T> sum(0);
      for (int which = 0; which < args.bucket_count; ++which)
        sum += collect<T>(args, args.shares[which], b, c, int32_t(t), h, w);
      if (w < uint32_t(args.width)) target[w] = T(sum);
    }
  }
}

}  // namespace td::cuda
