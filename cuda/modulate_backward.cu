// SPDX-License-Identifier: Apache-2.0
// A block takes an equal share of all tokens, in order. It reads each token once, and its threads keep the sums of
// their columns, which become one row of `partial` for every group it comes to; the rows of a group are added up in
// order.
#include "modulate.cuh"
#include "sum_rows.cuh"

namespace td::cuda {
namespace {

constexpr int kVectors = 2;          // of kWidth elements of each tensor, held by a thread with their sums
constexpr int kVectorThreads = 320;  // at most: two blocks on a multiprocessor, one works while the other waits
constexpr int kWarps = 16;           // a power of two for kVectorThreads
constexpr int kScratch = 4 * kWarps * int(sizeof(float));

// Number of the (sample, group) that a walk is in, and the block's sums for it.
template <class Index>
__device__ __forceinline__ Index sums_order(const ModulateGradArgs& args, const Walk<Index>& at) {
  return at.b * Index(args.chunks.last_group - args.chunks.first_group + 1) + at.g - Index(args.chunks.first_group);
}
template <class C>
__device__ __forceinline__ C* sums_row(const ModulateGradArgs& args, int64_t order) {
  return static_cast<C*>(args.partial) + (blockIdx.x + order) * 3 * args.dim;
}

// A sum of every column of the thread, in registers or (Memory: a Staged) in shared memory.
struct InRegisters {
  float sums[kVectors][kWidth];

  __device__ __forceinline__ explicit InRegisters(char*) : sums{} {}
  __device__ __forceinline__ void add(int i, const float (&values)[kWidth]) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums[i][j] += values[j];
  }
  __device__ __forceinline__ Vector<float, kWidth> take(int i) {
    Vector<float, kWidth> vector;
    vector.set(sums[i]);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums[i][j] = 0.0f;
    return vector;
  }
};
template <class Memory>
struct InMemory {
  Memory sums;

  __device__ __forceinline__ explicit InMemory(char* own) : sums(own) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) take(i);
  }
  __device__ __forceinline__ void add(int i, const float (&values)[kWidth]) {
    Vector<float, kWidth> vector;
    sums.read(i, vector);
    float total[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) total[j] = vector.get(j) + values[j];
    vector.set(total);
    sums.write(i, vector);
  }
  __device__ __forceinline__ Vector<float, kWidth> take(int i) {
    Vector<float, kWidth> vector, zero;
    sums.read(i, vector);
    zero.clear();
    sums.write(i, zero);
    return vector;
  }
};

// Writes a sum out and begins it anew.
template <class Sums>
__device__ __forceinline__ void write_sums(const Columns<kVectors>& columns, float* row, Sums& sums) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (columns.inside[i]) sums.take(i).store(row + columns.first + columns.step(i));
  }
}

// d(out)/d(residual) = factor (s - mean(s) - z mean(s z)) with z the normalised row and s = grad_out (1 + scale).
// While a token is worked on, the next one is on its way to shared memory: what the sums need (residual, grad_out) as
// soon as it is in registers, the rest (grad_residual, y) when it has been used.
// What a thread has in shared memory. Two blocks on a multiprocessor have no registers for three sums, and none for two
// beside float32 rows.
template <class X, class L, bool Gate, bool Norm, int Blocks>
struct Stage {
  using Residual = Staged<X, kVectors, 0>;
  using GradOut = Staged<L, kVectors, Norm ? Residual::kEnd : 0>;
  using GradResidual = Staged<X, kVectors, Norm ? GradOut::kEnd : 0>;
  using Y = Staged<L, kVectors, GradResidual::kEnd>;
  static constexpr bool kFull = Gate && Norm && Blocks == 2, kFuller = kFull && sizeof(X) == 4;
  using GateMemory = Staged<float, kVectors, Y::kEnd>;
  using ShiftMemory = Staged<float, kVectors, GateMemory::kEnd>;
  using GateSums = std::conditional_t<kFull, InMemory<GateMemory>, InRegisters>;
  using ShiftSums = std::conditional_t<kFuller, InMemory<ShiftMemory>, InRegisters>;
  static constexpr int kWarpBytes =
      !Gate ? GradOut::kEnd : (kFuller ? ShiftMemory::kEnd : (kFull ? GateMemory::kEnd : Y::kEnd));
};

template <class X, class L, bool Gate, bool Norm, int Blocks>
__global__ void __launch_bounds__(kVectorThreads, Blocks)
    row_kernel(const __grid_constant__ ModulateGradArgs args, const __grid_constant__ Shares shares) {
  using Memory = Stage<X, L, Gate, Norm, Blocks>;
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  char* own = dynamic_shared() + kScratch + warp * Memory::kWarpBytes + lane * 16;
  const Columns<kVectors> columns(args.dim);
  Walk<int> at(args, shares);
  // Elements from the begin of every tensor to the thread's place, and modulation, of the token that is worked on.
  int64_t here;
  const float *scale_row, *gate_row;
  const auto enter = [&] {
    here = cuda::at(Norm ? args.grad_x : args.grad_y, at.b, at.n) + columns.first;
    if constexpr (Norm) scale_row = group_row<float>(args.scale, at.b, at.g) + columns.first;
    if constexpr (Gate) gate_row = group_row<float>(args.gate, at.b, at.g) + columns.first;
  };
  enter();

  const typename Memory::Residual residual(own);
  const typename Memory::GradOut grad_out(own);
  const typename Memory::GradResidual grad_residual(own);
  const typename Memory::Y y(own);
  if constexpr (Norm) {
    residual.clear_outside(columns);
    grad_out.clear_outside(columns);
  }
  if constexpr (Gate) {
    grad_residual.clear_outside(columns);
    y.clear_outside(columns);
  }
  const auto request_early = [&](int64_t place) {
    if constexpr (Norm) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        residual.request(i, static_cast<const X*>(args.residual.data) + place, columns);
        grad_out.request(i, static_cast<const L*>(args.grad_out.data) + place, columns);
      }
      commit_copies();
    }
  };
  const auto request_late = [&](int i, int64_t place) {
    if constexpr (Gate) {
      grad_residual.request(i, static_cast<const X*>(args.grad_residual.data) + place, columns);
      y.request(i, static_cast<const L*>(args.y.data) + place, columns);
    }
  };
  request_early(here);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) request_late(i, here);
  if constexpr (Gate) commit_copies();

  InRegisters scale_sum(own);
  typename Memory::ShiftSums shift_sum(own);
  typename Memory::GateSums gate_sum(own);
  while (at.left > 0) {
    const int order = sums_order(args, at);
    const bool leaves = at.advance(args), more = at.left > 0;
    int64_t next = here + (Norm ? args.grad_x : args.grad_y).token_stride;
    if (leaves) next = cuda::at(Norm ? args.grad_x : args.grad_y, at.b, at.n) + columns.first;
    Vector<X, kWidth> rows[kVectors];
    Vector<L, kWidth> outs[kVectors];
    float mean = 0.0f, factor = 0.0f, c1 = 0.0f, c2 = 0.0f;
    if constexpr (Norm) {
      wait_copies<Gate ? 1 : 0>();
      float total[1] = {};
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        residual.read(i, rows[i]);
        grad_out.read(i, outs[i]);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) total[0] += rows[i].get(j);
      }
      if (more) request_early(next);
      block_sums_apart<kWarps>(total, scratch);
      mean = total[0] * shares.inverse_dim;
      float totals[3] = {};  // of (row - mean)^2, s, s (row - mean)
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (!columns.inside[i]) continue;
        const Vector<float, kWidth> scale = group_vector(scale_row, columns.step(i));
        float gs[kWidth];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float centred = rows[i].get(j) - mean, g = outs[i].get(j), s = g + g * scale.get(j);
          gs[j] = g;
          totals[0] += centred * centred;
          totals[1] += s;
          totals[2] += s * centred;
        }
        shift_sum.add(i, gs);
      }
      block_sums_apart<kWarps>(totals, scratch + kWarps);
      factor = rsqrtf(totals[0] * shares.inverse_dim + shares.eps);
      c1 = totals[1] * shares.inverse_dim * factor;
      c2 = totals[2] * shares.inverse_dim * factor * factor * factor;
    }
    if constexpr (Gate) {
      // With Norm, what was asked for last may be the next token's early part.
      if (Norm && more) {
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      Vector<X, kWidth> grads;
      Vector<L, kWidth> ys;
      if constexpr (Gate) {
        grad_residual.read(i, grads);
        y.read(i, ys);
        if (more) request_late(i, next);
      }
      if (!columns.inside[i]) continue;
      float total[kWidth];
      if constexpr (Norm) {
        const Vector<float, kWidth> scale = group_vector(scale_row, columns.step(i));
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float centred = rows[i].get(j) - mean, g = outs[i].get(j), s = g + g * scale.get(j);
          scale_sum.sums[i][j] += g * factor * centred;
          total[j] = s * factor + ((Gate ? grads.get(j) : 0.0f) - c1) - centred * c2;
        }
        store_vector(static_cast<X*>(args.grad_x.data) + here + columns.step(i), total);
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) total[j] = grads.get(j);
      }
      if constexpr (Gate) {
        const Vector<float, kWidth> gate = group_vector(gate_row, columns.step(i));
        float products[kWidth];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          products[j] = total[j] * ys.get(j);
          total[j] *= gate.get(j);
        }
        gate_sum.add(i, products);
        store_vector(static_cast<L*>(args.grad_y.data) + here + columns.step(i), total);
      }
    }
    if constexpr (Gate) commit_copies();
    here = next;
    if (!leaves && more) continue;
    float* const sums = sums_row<float>(args, order);
    if constexpr (Norm) {
      write_sums(columns, sums, scale_sum);
      write_sums(columns, sums + args.dim, shift_sum);
    }
    if constexpr (Gate) write_sums(columns, sums + 2 * args.dim, gate_sum);
    if (more) enter();
  }
}

// Any dtypes, sizes and alignment. The sums grow in their row of `partial`, each element by one thread. The row of a
// token is kept in shared memory where there is room for it (Keep).
template <class C, bool Keep>
__global__ void __launch_bounds__(kScalarThreads, 1)
    scalar_kernel(const __grid_constant__ ModulateGradArgs args, TokenShares shares) {
  C* scratch = reinterpret_cast<C*>(dynamic_shared());
  C* row = scratch + 64;
  bool fresh = true;
  for (Walk<int64_t> next(args, shares); next.left > 0;) {
    const Walk<int64_t> at = next;
    C* sums = sums_row<C>(args, sums_order(args, at));
    if (fresh) {
      for (int i = int(threadIdx.x); i < 3 * args.dim; i += kScalarThreads) sums[i] = C(0);
    }
    __syncthreads();
    fresh = next.advance(args);
    const auto value = [&](int i) {
      return Keep ? row[i] : load_as<C>(args.residual, cuda::at(args.residual, at.b, at.n) + i);
    };
    C mean = C(0), factor = C(0), means[2] = {};
    if (args.grad_out.data) {
      C sum = C(0), squares = C(0);
      for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
        if constexpr (Keep) row[i] = load_as<C>(args.residual, cuda::at(args.residual, at.b, at.n) + i);
        sum += value(i);
      }
      mean = block_sum(sum, scratch) / C(args.dim);
      for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
        squares += (value(i) - mean) * (value(i) - mean);
      }
      factor = inverse_root(block_sum(squares, scratch) / C(args.dim) + C(args.eps));
      const C* scale = group_row<C>(args.scale, at.b, at.g);
      for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
        const C grad = load_as<C>(args.grad_out, cuda::at(args.grad_out, at.b, at.n) + i);
        const C scaled = grad + grad * scale[i];
        means[0] += scaled;
        means[1] += scaled * ((value(i) - mean) * factor);
      }
      block_sums(means, scratch);
    }
    for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
      C total =
          args.grad_residual.data ? load_as<C>(args.grad_residual, cuda::at(args.grad_residual, at.b, at.n) + i) : C(0);
      if (args.grad_out.data) {
        const C normal = (value(i) - mean) * factor;
        const C grad = load_as<C>(args.grad_out, cuda::at(args.grad_out, at.b, at.n) + i);
        const C scaled = grad + grad * group_row<C>(args.scale, at.b, at.g)[i];
        total += (scaled - (means[0] + normal * means[1]) / C(args.dim)) * factor;
        sums[i] += grad * normal;
        sums[args.dim + i] += grad;
      }
      if (args.grad_x.data) store_as(args.grad_x, cuda::at(args.grad_x, at.b, at.n) + i, total);
      if (args.y.data) {
        sums[2 * args.dim + i] += total * load_as<C>(args.y, cuda::at(args.y, at.b, at.n) + i);
        store_as(args.grad_y, cuda::at(args.grad_y, at.b, at.n) + i, total * group_row<C>(args.gate, at.b, at.g)[i]);
      }
    }
  }
}

// 32 columns of one sum of one group per turn of a block.
template <class C>
__global__ void __launch_bounds__(256) group_kernel(const __grid_constant__ ModulateGradArgs args, TokenShares shares) {
  const int which = int(blockIdx.y);
  C* target = static_cast<C*>(which == 0 ? args.grad_scale : (which == 1 ? args.grad_shift : args.grad_gate));
  if (target == nullptr) return;
  const TokenChunks& cut = args.chunks;
  const int64_t tiles = (args.dim + 31) / 32, groups = args.batch * args.groups.count;
  for (int64_t item = blockIdx.x; item < groups * tiles; item += gridDim.x) {
    int64_t group, tile, b, g, begin = 0, end = 0;
    locate(item, tiles, group, tile);
    locate(group, args.groups.count, b, g);
    const int i = int(tile) * 32 + (int(threadIdx.x) & 31);
    if (g >= cut.first_group && g <= cut.last_group) {
      const int64_t order = b * (cut.last_group - cut.first_group + 1) + g - cut.first_group, before = b * args.tokens;
      shares.rows(before + cut.local_begin(args.groups, g), before + cut.local_end(args.groups, g), order, begin, end);
    }
    const C* sums = static_cast<const C*>(args.partial) + which * args.dim + i;
    const C sum =
        column_sum(sums, begin, end, int64_t(args.dim) * 3, i < args.dim, reinterpret_cast<C*>(dynamic_shared()));
    if (threadIdx.x < 32 && i < args.dim) target[group * args.dim + i] = sum;
  }
}

// Shares for as many blocks as run at a time, or as there are rows for.
template <class Kernel>
TokenShares share_out(Kernel kernel, const ModulateGradArgs& args, int threads, size_t bytes) {
  const int64_t most = resident_blocks("modulate_backward", kernel, threads, bytes, kModulateBlocks);
  return TokenShares(args.batch * args.tokens, most, kModulateShare);
}

size_t row_bytes(int threads, int warp_bytes) {
  return size_t(kScratch + threads / 32 * warp_bytes);
}

// All tensors of a call lie as its result does: one place serves them all.
bool one_layout(const ModulateGradArgs& args, const Rows& result) {
  for (const Rows* rows : {&args.residual, &args.y, &args.grad_residual, &args.grad_out, &args.grad_x, &args.grad_y}) {
    if (rows->data == nullptr) continue;
    if (args.batch > 1 && rows->batch_stride != result.batch_stride) return false;
    if (args.tokens > 1 && rows->token_stride != result.token_stride) return false;
  }
  return true;
}

// Whole vectors in tensors of one layout, types that have a kernel, and the gradients that the ops ask for: launched,
// true.
bool launch_rows(const ModulateGradArgs& args, TokenShares& shares, cudaStream_t stream) {
  const bool norm = args.grad_out.data != nullptr, gate = args.y.data != nullptr;
  const DType layers = norm ? args.grad_out.dtype : args.y.dtype;
  const DType stream_dtype = norm ? args.residual.dtype : args.grad_residual.dtype;
  const bool fits = args.dim % kWidth == 0 && row_threads(args.dim, kVectors) <= kVectorThreads &&
                    whole(args.residual) && whole(args.y) && whole(args.grad_residual) && whole(args.grad_out) &&
                    whole(args.grad_x) && whole(args.grad_y) && whole(args.gate) && whole(args.scale) &&
                    aligned_rows(args.partial, nullptr, 0, 0) && has(args.grad_residual, stream_dtype) &&
                    has(args.grad_x, stream_dtype) && has(args.y, layers) && has(args.grad_y, layers) &&
                    gate == (args.grad_residual.data != nullptr) && norm == (args.grad_x.data != nullptr) &&
                    walks_in_int(args) && one_layout(args, norm ? args.grad_x : args.grad_y);
  if (!fits) return false;
  const int threads = row_threads(args.dim, kVectors);
  return dispatch_stream(stream_dtype, layers, [&](auto x_tag, auto layer_tag) {
    using X = typename decltype(x_tag)::type;
    using L = typename decltype(layer_tag)::type;
    const auto run = [&](auto kernel, int warp_bytes) {
      const size_t bytes = row_bytes(threads, warp_bytes);
      shares = share_out(kernel, args, threads, bytes);
      launch("modulate_backward", kernel, unsigned(shares.blocks), threads, bytes, stream, args, Shares(shares, args));
    };
    if (!gate) return run(row_kernel<X, L, false, true, 2>, Stage<X, L, false, true, 2>::kWarpBytes);
    if (!norm) return run(row_kernel<X, L, true, false, 2>, Stage<X, L, true, false, 2>::kWarpBytes);
    constexpr int kTwo = Stage<X, L, true, true, 2>::kWarpBytes, kOne = Stage<X, L, true, true, 1>::kWarpBytes;
    if constexpr (sizeof(X) == 4) {
      if (sizeof(L) == 4 || !shared_bytes_exist("modulate_backward", row_bytes(threads, kTwo))) {
        return run(row_kernel<X, L, true, true, 1>, kOne);
      }
    }
    if constexpr (sizeof(L) != 4) run(row_kernel<X, L, true, true, 2>, kTwo);
  });
}

template <class C>
TokenShares launch_scalar(const ModulateGradArgs& args, cudaStream_t stream) {
  const auto run = [&](auto kernel, size_t bytes) {
    const TokenShares shares = share_out(kernel, args, kScalarThreads, bytes);
    launch("modulate_backward", kernel, unsigned(shares.blocks), kScalarThreads, bytes, stream, args, shares);
    return shares;
  };
  const size_t scratch = 64 * sizeof(C), row = size_t(args.dim) * sizeof(C);
  if (shared_bytes_exist("modulate_backward", scratch + row)) return run(scalar_kernel<C, true>, scratch + row);
  return run(scalar_kernel<C, false>, scratch);
}

template <class C>
void launch_groups(const ModulateGradArgs& args, const TokenShares& shares, cudaStream_t stream) {
  const int64_t items = args.batch * args.groups.count * ((args.dim + 31) / 32);
  const dim3 blocks(unsigned(items < kMaxBlocks ? items : kMaxBlocks), 3);
  launch("modulate_backward", group_kernel<C>, blocks, 256, 256 * sizeof(C), stream, args, shares);
}

}  // namespace

void modulate_backward(const ModulateGradArgs& args, cudaStream_t stream) {
  const bool wide = (args.grad_residual.data ? args.grad_residual.dtype : args.grad_out.dtype) == DType::float64;
  TokenShares shares;
  if (!launch_rows(args, shares, stream)) {
    shares = wide ? launch_scalar<double>(args, stream) : launch_scalar<float>(args, stream);
  }
  wide ? launch_groups<double>(args, shares, stream) : launch_groups<float>(args, shares, stream);
}

}  // namespace td::cuda
