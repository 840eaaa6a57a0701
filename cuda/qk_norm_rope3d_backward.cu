// SPDX-License-Identifier: Apache-2.0
// dx = r (w g - x r^2 mean(w g x)), with g the gradient rotated back; the weight's gradient is the sum of g x r. Blocks
// are persistent: a thread has the same channels in every token that it comes to, and keeps their sums in registers.
// What a block has at its end is one row of `partial`.
#include "qk_norm_rope3d.cuh"
#include "sum_rows.cuh"

namespace td::cuda {
namespace {

// The tokens of a persistent block, `step` apart, over all samples.
struct Tokens {
  int64_t b, n;
  __device__ __forceinline__ Tokens(const RopeArgs& args, int64_t first)
      : b(first / args.tokens), n(first % args.tokens) {}
  __device__ __forceinline__ void advance(const RopeArgs& args, int64_t step) {
    for (n += step; n >= args.tokens && b < args.batch; ++b) n -= args.tokens;
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBackwardLimit = kRowThreads;  // 128 registers are too few there
#else
constexpr int kBackwardLimit = kRowLimit;
#endif

// Norm over all heads: a block works on a token, while the next one is on its way to shared memory.
template <class T, bool Interleaved>
__global__ void __launch_bounds__(kBackwardLimit, 1)
    token_kernel(const __grid_constant__ QkNormRopeGradArgs grads, int64_t share) {
  using U = Unit<T, kFullVector<T>, Interleaved>;
  using C = compute_t<T>;
  using Inputs = StagedUnits<T, Interleaved, 0>;
  using Slopes = StagedUnits<T, Interleaved, Inputs::kEnd>;
  constexpr int kUnits = row_units(Interleaved);
  const QkNormRopeArgs& all = grads.forward;
  const RopeArgs& args = all.rope;
  C* scratch = reinterpret_cast<C*>(dynamic_shared());
  const RotationRows<C> rotations(dynamic_shared() + kScratch);
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  char* own = dynamic_shared() + kScratch + 2 * args.dim * int(sizeof(C)) + warp * Slopes::kEnd + lane * 16;
  const Inputs inputs(own);
  const Slopes gradients(own);
  const RowPlace<T, Interleaved> place(args);
  TokenWalk at(args, share);
  RowTrack<const T> x(args.x_strides, place), grad(grads.grad_strides, place);
  RowTrack<T> out(args.out_strides, place);
  x.enter(args.x, args.x_strides, at, place);
  grad.enter(grads.grad, grads.grad_strides, at, place);
  out.enter(args.out, args.out_strides, at, place);
  inputs.clear_outside(place);
  gradients.clear_outside(place);
  inputs.request(x, place, args.dim);
  gradients.request(grad, place, args.dim);
  rotations.request(args, at.n, 0);
  commit_copies();
  C sums[kUnits][U::kChannels] = {};

  for (int turn = 0; at.left > 0; turn ^= 1) {
    const bool leaves = at.advance(args), more = at.left > 0;
    if (leaves) {
      x.enter(args.x, args.x_strides, at, place);
      grad.enter(grads.grad, grads.grad_strides, at, place);
    } else {
      x.row += args.x_strides[1];
      grad.row += grads.grad_strides[1];
    }
    wait_copies<0>();
    __syncthreads();  // the rotation is there, and nobody reads the last one any more
    U units[kUnits], slopes[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      inputs.read(i, units[i]);
      gradients.read(i, slopes[i]);
    }
    if (more) {
      inputs.request(x, place, args.dim);
      gradients.request(grad, place, args.dim);
      rotations.request(args, at.n, turn ^ 1);
    }
    commit_copies();
    Rotation<C, U::kPairs> rotation;
    rotations.read(args, place.slot, turn, rotation);
    C totals[2] = {};  // of x^2 and of w g x
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (!place.inside[i]) continue;
      C g[U::kChannels], weight[U::kChannels];
      load_weight<T, Interleaved>(all, place.head + i * place.step, place.slot, weight);
#pragma unroll
      for (int j = 0; j < U::kChannels; ++j) g[j] = slopes[i].get(j);
      rotation.apply(g);
#pragma unroll
      for (int j = 0; j < U::kChannels; ++j) {
        const C value = units[i].get(j);
        totals[0] += value * value;
        totals[1] += g[j] * weight[j] * value;
      }
    }
    block_sums_apart<kRowWarps>(totals, scratch);
    const C count = C(args.heads * args.dim), r = inverse_root(totals[0] / count + C(all.eps));
    const C pull = totals[1] / count * r * r * r;
#pragma unroll
    for (int p = 0; p < U::kPairs; ++p) {
      rotation.c[p] *= r;
      rotation.s[p] *= r;
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (!place.inside[i]) continue;
      C g[U::kChannels], weight[U::kChannels];
      load_weight<T, Interleaved>(all, place.head + i * place.step, place.slot, weight);
#pragma unroll
      for (int j = 0; j < U::kChannels; ++j) g[j] = slopes[i].get(j);
      rotation.apply(g);
#pragma unroll
      for (int j = 0; j < U::kChannels; ++j) {
        const C value = units[i].get(j);
        sums[i][j] += g[j] * value;
        g[j] = g[j] * weight[j] - value * pull;
      }
      units[i].set(g);
      units[i].store(out.row + i * out.hop, place.slot, args.dim);
    }
    if (leaves) {
      out.enter(args.out, args.out_strides, at, place);
    } else {
      out.row += args.out_strides[1];
    }
  }
  C* partial = static_cast<C*>(grads.partial) + blockIdx.x * args.heads * args.dim;
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    if (!place.inside[i]) continue;
    Unit<C, kFullVector<T>, Interleaved> unit;
    unit.set(sums[i]);
    unit.store(partial + (place.head + i * place.step) * args.dim, place.slot, args.dim);
  }
}

// Norm of each head: warps of a block share the heads of a token, lanes the channels of a head.
template <class T, bool Interleaved>
__global__ void __launch_bounds__(kNormThreads, 1)
    head_kernel(const __grid_constant__ QkNormRopeGradArgs grads, RowWarps row) {
  using U = Unit<T, kFullVector<T>, Interleaved>;
  using C = compute_t<T>;
  constexpr int kUnits = row_units(Interleaved) / 2;
  const QkNormRopeArgs& all = grads.forward;
  const RopeArgs& args = all.rope;
  const int warp = int(threadIdx.x) >> 5, token = warp / row.warps, part = warp - token * row.warps;
  const Lane lane(args.dim / U::kChannels);
  const int step = lane.heads * kUnits, heads = int(args.heads);
  C weight[U::kChannels], sums[U::kChannels] = {};
  load_weight<T, Interleaved>(all, 0, lane.slot, weight);
  for (Tokens at(args, int64_t(blockIdx.x) * row.tokens + token); at.b < args.batch;
       at.advance(args, int64_t(gridDim.x) * row.tokens)) {
    const T* x = rope_head<const T>(args.x, args.x_strides, at.b, at.n, 0);
    const T* grad = rope_head<const T>(grads.grad, grads.grad_strides, at.b, at.n, 0);
    T* out = rope_head<T>(args.out, args.out_strides, at.b, at.n, 0);
    Rotation<C, U::kPairs> rotation;
    for (int first = part * step; first < heads; first += row.warps * step) {
      U units[kUnits], slopes[kUnits];
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        const int h = first + i * lane.heads + lane.head;
        if (h < heads) {
          units[i].load(x + h * args.x_strides[2], lane.slot, args.dim);
          slopes[i].load(grad + h * grads.grad_strides[2], lane.slot, args.dim);
        } else {
          units[i].clear();
          slopes[i].clear();
        }
      }
      if (first == part * step) {
        rotation.load(args, RopeCursor(args.segments, args.segment_count, args.token_offset + at.n), lane.slot);
      }
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        C g[U::kChannels], squares = C(0), dot = C(0);
#pragma unroll
        for (int j = 0; j < U::kChannels; ++j) g[j] = slopes[i].get(j);
        rotation.apply(g);
#pragma unroll
        for (int j = 0; j < U::kChannels; ++j) {
          const C value = units[i].get(j);
          squares += value * value;
          dot += g[j] * weight[j] * value;
        }
        const C r = inverse_root(head_sum(squares, lane.slots) / C(args.dim) + C(all.eps));
        const C pull = head_sum(dot, lane.slots) / C(args.dim) * r * r;
#pragma unroll
        for (int j = 0; j < U::kChannels; ++j) {
          const C value = units[i].get(j);
          sums[j] += g[j] * value * r;
          g[j] = r * (g[j] * weight[j] - value * pull);
        }
        const int h = first + i * lane.heads + lane.head;
        if (h >= heads) continue;
        units[i].set(g);
        units[i].store(out + h * args.out_strides[2], lane.slot, args.dim);
      }
    }
  }
  C* rows = reinterpret_cast<C*>(dynamic_shared());
#pragma unroll
  for (int j = 0; j < U::kChannels; ++j) {
    for (int bits = lane.slots; bits < 32; bits *= 2) sums[j] += __shfl_xor_sync(0xffffffffu, sums[j], bits);
  }
  if (lane.head == 0) {
    Unit<C, kFullVector<T>, Interleaved> unit;
    unit.set(sums);
    unit.store(rows + warp * args.dim, lane.slot, args.dim);
  }
  __syncthreads();
  const int warps = int(blockDim.x) >> 5;
  for (int d = int(threadIdx.x); d < args.dim; d += int(blockDim.x)) {
    C sum = rows[d];
    for (int w = 1; w < warps; ++w) sum += rows[w * args.dim + d];
    static_cast<C*>(grads.partial)[blockIdx.x * int64_t(args.dim) + d] = sum;
  }
}

// The gradient of one pair, rotated back (args.inverse is set).
template <class T>
struct RotatedGradient {
  compute_t<T> first, second;
  __device__ __forceinline__ RotatedGradient(const RopeArgs& args, const T* grad, int p, const compute_t<T>* cos_row,
                                             const compute_t<T>* sin_row) {
    using C = compute_t<T>;
    const C u = C(grad[pair_first(args, p)]), v = C(grad[pair_second(args, p)]);
    first = u * cos_row[p] - v * sin_row[p];
    second = v * cos_row[p] + u * sin_row[p];
  }
};

// Any sizes and any alignment: one block per token, one warp per head. Sums grow in rows of `partial`: one per block,
// or, where heads share the weight, one per warp.
template <class T, bool PerHead>
__global__ void __launch_bounds__(kNormThreads, 1) scalar_kernel(const __grid_constant__ QkNormRopeGradArgs grads) {
  using C = compute_t<T>;
  const QkNormRopeArgs& all = grads.forward;
  const RopeArgs& args = all.rope;
  const int half = args.dim / 2, lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  const int heads = int(args.heads);
  C* scratch = reinterpret_cast<C*>(dynamic_shared());
  C *cos_row = scratch + 64, *sin_row = cos_row + half;
  C* sums = static_cast<C*>(grads.partial) +
            (PerHead ? (int64_t(blockIdx.x) * kNormWarps + warp) * args.dim : int64_t(blockIdx.x) * heads * args.dim);
  for (int h = PerHead ? 0 : warp; h < (PerHead ? 1 : heads); h += kNormWarps) {
    for (int p = lane; p < half; p += 32) {
      sums[h * args.dim + pair_first(args, p)] = C(0);
      sums[h * args.dim + pair_second(args, p)] = C(0);
    }
  }
  for (Tokens at(args, blockIdx.x); at.b < args.batch; at.advance(args, gridDim.x)) {
    load_rotation(args, at.n, cos_row, sin_row);
    const auto head_totals = [&](int h, C(&totals)[2]) {  // of x^2 and of w g x, added to what each lane has
      const T* x = rope_head<const T>(args.x, args.x_strides, at.b, at.n, h);
      const T* grad = rope_head<const T>(grads.grad, grads.grad_strides, at.b, at.n, h);
      const C* weight = static_cast<const C*>(all.weight) + (PerHead ? 0 : h * args.dim);
#pragma unroll 1
      for (int p = lane; p < half; p += 32) {
        const RotatedGradient<T> g(args, grad, p, cos_row, sin_row);
        const int i = pair_first(args, p), j = pair_second(args, p);
        totals[0] += C(x[i]) * C(x[i]) + C(x[j]) * C(x[j]);
        totals[1] += g.first * weight[i] * C(x[i]) + g.second * weight[j] * C(x[j]);
      }
    };
    C totals[2] = {};
    if constexpr (!PerHead) {
      for (int h = warp; h < heads; h += kNormWarps) head_totals(h, totals);
      block_sums(totals, scratch);
    }
    const C count = C(PerHead ? args.dim : heads * args.dim);
    for (int h = warp; h < heads; h += kNormWarps) {
      if constexpr (PerHead) {
        totals[0] = totals[1] = C(0);
        head_totals(h, totals);
        totals[0] = warp_sum(totals[0]);
        totals[1] = warp_sum(totals[1]);
      }
      const C r = inverse_root(totals[0] / count + C(all.eps)), pull = totals[1] / count * r * r;
      const T* x = rope_head<const T>(args.x, args.x_strides, at.b, at.n, h);
      const T* grad = rope_head<const T>(grads.grad, grads.grad_strides, at.b, at.n, h);
      T* grad_x = rope_head<T>(args.out, args.out_strides, at.b, at.n, h);
      const int at_weight = PerHead ? 0 : h * args.dim;
      const C* weight = static_cast<const C*>(all.weight) + at_weight;
#pragma unroll 1
      for (int p = lane; p < half; p += 32) {
        const RotatedGradient<T> g(args, grad, p, cos_row, sin_row);
        const int i = pair_first(args, p), j = pair_second(args, p);
        const C xi = C(x[i]), xj = C(x[j]);
        sums[at_weight + i] += g.first * xi * r;
        sums[at_weight + j] += g.second * xj * r;
        grad_x[i] = T(r * (g.first * weight[i] - xi * pull));
        grad_x[j] = T(r * (g.second * weight[j] - xj * pull));
      }
    }
    __syncthreads();
  }
}

// 32 weights per block: the sums of all rows.
template <class C>
__global__ void __launch_bounds__(256) weight_kernel(const C* partial, C* total, int64_t rows, int64_t width) {
  const int64_t i = int64_t(blockIdx.x) * 32 + (threadIdx.x & 31);
  const C sum = column_sum(partial + i, 0, rows, width, i < width, reinterpret_cast<C*>(dynamic_shared()));
  if (threadIdx.x < 32 && i < width) total[i] = sum;
}

// Launches the first stage and returns the number of rows that it leaves.
template <class T, bool Interleaved>
int64_t run(const QkNormRopeGradArgs& grads, cudaStream_t stream) {
  using C = compute_t<T>;
  const char* op = "qk_norm_rope3d_backward";
  const QkNormRopeArgs& all = grads.forward;
  const RopeArgs& args = all.rope;
  const bool whole = whole_vectors<T>(all) && aligned_rows(grads.grad, grads.grad_strides, 3, sizeof(T)) &&
                     aligned_rows(grads.partial, nullptr, 0, 0);
  const int64_t tokens = args.batch * args.tokens, most = tokens < grads.chunks ? tokens : grads.chunks;
  const int threads = whole && !all.per_head ? row_threads<T>(args) : 0;
  if (threads > 0) {
    const size_t bytes =
        kScratch + RotationRows<C>::bytes(args.dim) + size_t(threads / 32 * 2 * StagedUnits<T, Interleaved, 0>::kEnd);
    const RowShares shares(op, token_kernel<T, Interleaved>, args, threads, bytes, most);
    launch(op, token_kernel<T, Interleaved>, shares.blocks, threads, bytes, stream, grads, shares.share);
    return shares.blocks;
  }
  if (whole && all.per_head && heads_fit_warp<T>(args)) {
    const int slots = args.dim / Unit<T, kFullVector<T>, Interleaved>::kChannels;
    const RowWarps row(args.heads, 32 / slots * (row_units(Interleaved) / 2));
    const size_t shared = size_t(row.threads() / 32 * args.dim) * sizeof(C);
    const unsigned blocks =
        resident_blocks(op, head_kernel<T, Interleaved>, row.threads(), shared, (most + row.tokens - 1) / row.tokens);
    launch(op, head_kernel<T, Interleaved>, blocks, row.threads(), shared, stream, grads, row);
    return blocks;
  }
  const size_t shared = size_t(args.dim + 64) * sizeof(C);
  if (all.per_head) {
    const int64_t rows = grads.chunks / kNormWarps;
    const unsigned blocks = unsigned(tokens < rows ? tokens : rows);
    launch(op, scalar_kernel<T, true>, blocks, kNormThreads, shared, stream, grads);
    return int64_t(blocks) * kNormWarps;
  }
  launch(op, scalar_kernel<T, false>, unsigned(most), kNormThreads, shared, stream, grads);
  return most;
}

}  // namespace

void qk_norm_rope3d_backward(const QkNormRopeGradArgs& given, cudaStream_t stream) {
  QkNormRopeGradArgs args = given;
  RopeArgs& rope = args.forward.rope;
  rope.inverse = !rope.inverse;
  const int64_t width = args.forward.per_head ? rope.dim : rope.heads * rope.dim;
  dispatch_float(rope.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    const int64_t rows = rope.interleaved ? run<T, true>(args, stream) : run<T, false>(args, stream);
    launch("qk_norm_rope3d_backward", weight_kernel<C>, unsigned((width + 31) / 32), 256, 256 * sizeof(C), stream,
           static_cast<const C*>(args.partial), static_cast<C*>(args.grad_weight), rows, width);
  });
}

}  // namespace td::cuda
