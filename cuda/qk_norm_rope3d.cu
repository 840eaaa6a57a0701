// SPDX-License-Identifier: Apache-2.0
#include "qk_norm_rope3d.cuh"

namespace td::cuda {
namespace {

constexpr int64_t kMaxBlocks = 1 << 20;

// Norm over all heads: a block holds a token in registers, so that memory is read once, and the weight of its threads'
// channels for all of its tokens. The next token is on its way to shared memory.
template <class T, bool Interleaved>
__global__ void __launch_bounds__(kRowLimit, 1)
    token_kernel(const __grid_constant__ QkNormRopeArgs all, int64_t share) {
  using U = Unit<T, kFullVector<T>, Interleaved>;
  using C = compute_t<T>;
  using Units = StagedUnits<T, Interleaved, 0>;
  constexpr int kUnits = row_units(Interleaved);
  const RopeArgs& args = all.rope;
  C* scratch = reinterpret_cast<C*>(dynamic_shared());
  const RotationRows<C> rotations(dynamic_shared() + kScratch);
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  const Units staged(dynamic_shared() + kScratch + 2 * args.dim * int(sizeof(C)) + warp * Units::kEnd + lane * 16);
  const RowPlace<T, Interleaved> place(args);
  TokenWalk at(args, share);
  RowTrack<const T> x(args.x_strides, place);
  RowTrack<T> out(args.out_strides, place);
  x.enter(args.x, args.x_strides, at, place);
  out.enter(args.out, args.out_strides, at, place);
  staged.clear_outside(place);
  staged.request(x, place, args.dim);
  rotations.request(args, at.n, 0);
  commit_copies();
  C weight[kUnits][U::kChannels];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    if (place.inside[i]) load_weight<T, Interleaved>(all, place.head + i * place.step, place.slot, weight[i]);
  }

  for (int turn = 0; at.left > 0; turn ^= 1) {
    const bool leaves = at.advance(args), more = at.left > 0;
    if (leaves) {
      x.enter(args.x, args.x_strides, at, place);
    } else {
      x.row += args.x_strides[1];
    }
    wait_copies<0>();
    U units[kUnits];
    C squares[1] = {};
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      staged.read(i, units[i]);
#pragma unroll
      for (int j = 0; j < U::kChannels; ++j) squares[0] += units[i].get(j) * units[i].get(j);
    }
    if (more) staged.request(x, place, args.dim);
    block_sums_apart<kRowWarps>(squares, scratch + turn * kRowWarps);
    if (more) rotations.request(args, at.n, turn ^ 1);
    commit_copies();
    Rotation<C, U::kPairs> rotation;
    rotations.read(args, place.slot, turn, rotation);
    const C r = inverse_root(squares[0] / C(args.heads * args.dim) + C(all.eps));
#pragma unroll
    for (int p = 0; p < U::kPairs; ++p) {
      rotation.c[p] *= r;
      rotation.s[p] *= r;
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (!place.inside[i]) continue;
      C values[U::kChannels];
#pragma unroll
      for (int j = 0; j < U::kChannels; ++j) values[j] = units[i].get(j) * weight[i][j];
      rotation.apply(values);
      units[i].set(values);
      units[i].store(out.row + i * out.hop, place.slot, args.dim);
    }
    if (leaves) {
      out.enter(args.out, args.out_strides, at, place);
    } else {
      out.row += args.out_strides[1];
    }
  }
}

// Norm of each head: warps of a block share the heads of a token, lanes the channels of a head.
template <class T, bool Interleaved>
__global__ void __launch_bounds__(kNormThreads) head_kernel(const __grid_constant__ QkNormRopeArgs all, RowWarps row) {
  using U = Unit<T, kFullVector<T>, Interleaved>;
  using C = compute_t<T>;
  constexpr int kUnits = row_units(Interleaved);
  const RopeArgs& args = all.rope;
  const int warp = int(threadIdx.x) >> 5, token = warp / row.warps, part = warp - token * row.warps;
  const int64_t n = int64_t(blockIdx.x) * row.tokens + token, b = blockIdx.y;
  if (n >= args.tokens) return;
  const Lane lane(args.dim / U::kChannels);
  const int step = lane.heads * kUnits, heads = int(args.heads);
  const T* x = rope_head<const T>(args.x, args.x_strides, b, n, 0);
  T* out = rope_head<T>(args.out, args.out_strides, b, n, 0);
  Rotation<C, U::kPairs> rotation;
  C weight[U::kChannels];
  for (int first = part * step; first < heads; first += row.warps * step) {
    U units[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int h = first + i * lane.heads + lane.head;
      if (h < heads) {
        units[i].load(x + h * args.x_strides[2], lane.slot, args.dim);
      } else {
        units[i].clear();
      }
    }
    if (first == part * step) {
      rotation.load(args, RopeCursor(args.segments, args.segment_count, args.token_offset + n), lane.slot);
      load_weight<T, Interleaved>(all, 0, lane.slot, weight);
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      C values[U::kChannels], squares = C(0);
#pragma unroll
      for (int j = 0; j < U::kChannels; ++j) {
        values[j] = units[i].get(j);
        squares += values[j] * values[j];
      }
      const C r = inverse_root(head_sum(squares, lane.slots) / C(args.dim) + C(all.eps));
#pragma unroll
      for (int j = 0; j < U::kChannels; ++j) values[j] *= r * weight[j];
      rotation.apply(values);
      const int h = first + i * lane.heads + lane.head;
      if (h >= heads) continue;
      units[i].set(values);
      units[i].store(out + h * args.out_strides[2], lane.slot, args.dim);
    }
  }
}

// Sum over one warp's head of x^2; every lane gets it.
template <class T>
__device__ __forceinline__ compute_t<T> head_squares(const T* x, int dim) {
  using C = compute_t<T>;
  C squares = C(0);
  for (int d = int(threadIdx.x) & 31; d < dim; d += 32) squares += C(x[d]) * C(x[d]);
  return warp_sum(squares);
}

// Any sizes and any alignment: one block per token, one warp per head.
template <class T>
__global__ void __launch_bounds__(kNormThreads, 1) scalar_kernel(const __grid_constant__ QkNormRopeArgs all) {
  using C = compute_t<T>;
  const RopeArgs& args = all.rope;
  const int half = args.dim / 2, lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  C* scratch = reinterpret_cast<C*>(dynamic_shared());
  C *cos_row = scratch + 32, *sin_row = cos_row + half;
  const int64_t b = blockIdx.y;
  for (int64_t n = blockIdx.x; n < args.tokens; n += gridDim.x) {
    load_rotation(args, n, cos_row, sin_row);
    C r = C(0);
    if (!all.per_head) {
      C squares = C(0);
      for (int64_t h = warp; h < args.heads; h += kNormWarps) {
        squares += head_squares(rope_head<const T>(args.x, args.x_strides, b, n, h), args.dim);
      }
      r = inverse_root(sum_of_warps(squares, scratch) / C(args.heads * args.dim) + C(all.eps));
    }
    for (int64_t h = warp; h < args.heads; h += kNormWarps) {
      const T* x = rope_head<const T>(args.x, args.x_strides, b, n, h);
      T* out = rope_head<T>(args.out, args.out_strides, b, n, h);
      const C* weight = static_cast<const C*>(all.weight) + (all.per_head ? 0 : h * args.dim);
      if (all.per_head) r = inverse_root(head_squares(x, args.dim) / C(args.dim) + C(all.eps));
      for (int p = lane; p < half; p += 32) {
        const int i = pair_first(args, p), j = pair_second(args, p);
        const C u = C(x[i]) * r * weight[i], v = C(x[j]) * r * weight[j], c = cos_row[p], s = sin_row[p];
        out[i] = T(u * c - v * s);
        out[j] = T(v * c + u * s);
      }
    }
    __syncthreads();
  }
}

template <class T, bool Interleaved>
void run(const QkNormRopeArgs& all, cudaStream_t stream) {
  using C = compute_t<T>;
  const char* op = "qk_norm_rope3d";
  const RopeArgs& args = all.rope;
  const bool whole = whole_vectors<T>(all);
  const int threads = whole && !all.per_head ? row_threads<T>(args) : 0;
  if (threads > 0) {
    const size_t bytes =
        kScratch + RotationRows<C>::bytes(args.dim) + size_t(threads / 32 * StagedUnits<T, Interleaved, 0>::kEnd);
    const RowShares shares(op, token_kernel<T, Interleaved>, args, threads, bytes, INT32_MAX);
    launch(op, token_kernel<T, Interleaved>, shares.blocks, threads, bytes, stream, all, shares.share);
  } else if (whole && all.per_head && heads_fit_warp<T>(args)) {
    const int slots = args.dim / Unit<T, kFullVector<T>, Interleaved>::kChannels;
    const RowWarps row(args.heads, 32 / slots * row_units(Interleaved));
    const dim3 blocks(unsigned((args.tokens + row.tokens - 1) / row.tokens), unsigned(args.batch));
    launch(op, head_kernel<T, Interleaved>, blocks, row.threads(), 0, stream, all, row);
  } else {
    const dim3 blocks(unsigned(args.tokens < kMaxBlocks ? args.tokens : kMaxBlocks), unsigned(args.batch));
    launch(op, scalar_kernel<T>, blocks, kNormThreads, size_t(args.dim + 32) * sizeof(C), stream, all);
  }
}

}  // namespace

void qk_norm_rope3d(const QkNormRopeArgs& args, cudaStream_t stream) {
  dispatch_float(args.rope.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.rope.interleaved ? run<T, true>(args, stream) : run<T, false>(args, stream);
  });
}

}  // namespace td::cuda
