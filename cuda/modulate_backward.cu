// SPDX-License-Identifier: Apache-2.0
// A block takes a chunk of tokens of one group. It reads each token once, and its threads keep the sums of their
// columns over the chunk, which become one row of `partial`; the rows of a group's chunks are added up in order.
#include "modulate.cuh"
#include "sum_rows.cuh"

namespace td::cuda {
namespace {

constexpr int kVectors = 1;          // of kWidth elements of each tensor, held by a thread: the sums need the registers
constexpr int kVectorThreads = 640;  // at most: more would leave too few registers

// What a block works on: a chunk of one sample.
struct Chunk {
  int64_t b, index, g, begin, end;
  __device__ __forceinline__ Chunk(const ModulateGradArgs& args) {
    locate(blockIdx.x, args.chunks.count, b, index);
    args.chunks.locate(args.groups, index, g, begin, end);
  }
  template <class C>
  __device__ __forceinline__ C* sums(const ModulateGradArgs& args) const {
    return static_cast<C*>(args.partial) + (b * args.chunks.count + index) * 3 * args.dim;
  }
};

// d(out)/d(residual) = factor (s - mean(s) - z mean(s z)) with z the normalised row and s = grad_out (1 + scale).
template <class X, class L, bool Gate, bool Norm>
__global__ void __launch_bounds__(kVectorThreads) row_kernel(const __grid_constant__ ModulateGradArgs args) {
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  const int count = args.dim / kWidth;
  const Chunk chunk(args);
  const int64_t b = chunk.b;
  const float *gate_row = group_row<float>(args.gate, b, chunk.g),
              *scale_row = group_row<float>(args.scale, b, chunk.g);
  float scale_sum[kVectors][kWidth] = {}, shift_sum[kVectors][kWidth] = {}, gate_sum[kVectors][kWidth] = {};
  for (int64_t n = chunk.begin; n < chunk.end; ++n) {
    Vector<X, kWidth> rows[kVectors], grads[kVectors];  // residual and its gradient
    Vector<L, kWidth> outs[kVectors], ys[kVectors];     // gradient of the result; y
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = int(threadIdx.x) + i * int(blockDim.x);
      rows[i].clear();
      grads[i].clear();
      outs[i].clear();
      ys[i].clear();
      if (v >= count) continue;
      if constexpr (Norm) {
        load_vector(rows[i], args.residual, b, n, v);
        load_vector(outs[i], args.grad_out, b, n, v);
      }
      if (args.grad_residual.data) load_vector(grads[i], args.grad_residual, b, n, v);
      if constexpr (Gate) load_vector(ys[i], args.y, b, n, v);
    }
    float mean = 0.0f, factor = 0.0f, c1 = 0.0f, c2 = 0.0f;
    if constexpr (Norm) {
      const float share = 1.0f / float(args.dim);
      float total[1] = {};
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) total[0] += rows[i].get(j);
      }
      block_sums(total, scratch);
      mean = total[0] * share;
      float totals[3] = {};  // of (row - mean)^2, s, s (row - mean)
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int v = int(threadIdx.x) + i * int(blockDim.x);
        if (v >= count) continue;
        const Vector<float, kWidth> scale = group_vector(scale_row, v);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float centred = rows[i].get(j) - mean, g = outs[i].get(j), s = g + g * scale.get(j);
          totals[0] += centred * centred;
          totals[1] += s;
          totals[2] += s * centred;
        }
      }
      block_sums(totals, scratch);
      factor = rsqrtf(totals[0] * share + float(args.eps));
      c1 = totals[1] * share;
      c2 = totals[2] * share * factor;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = int(threadIdx.x) + i * int(blockDim.x);
      if (v >= count) continue;
      float total[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) total[j] = grads[i].get(j);
      if constexpr (Norm) {
        const Vector<float, kWidth> scale = group_vector(scale_row, v);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float normal = (rows[i].get(j) - mean) * factor, g = outs[i].get(j);
          total[j] += (g + g * scale.get(j) - c1 - normal * c2) * factor;
          scale_sum[i][j] += g * normal;
          shift_sum[i][j] += g;
        }
      }
      if (args.grad_x.data) store_vector<X>(args.grad_x, b, n, v, total);
      if constexpr (Gate) {
        const Vector<float, kWidth> gate = group_vector(gate_row, v);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          gate_sum[i][j] += total[j] * ys[i].get(j);
          total[j] *= gate.get(j);
        }
        store_vector<L>(args.grad_y, b, n, v, total);
      }
    }
  }
  float* sums = chunk.sums<float>(args);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = int(threadIdx.x) + i * int(blockDim.x);
    if (v >= count) continue;
    Vector<float, kWidth> vector;
    if constexpr (Norm) {
      vector.set(scale_sum[i]);
      vector.store(sums + v * kWidth);
      vector.set(shift_sum[i]);
      vector.store(sums + args.dim + v * kWidth);
    }
    if constexpr (Gate) {
      vector.set(gate_sum[i]);
      vector.store(sums + 2 * args.dim + v * kWidth);
    }
  }
}

// Any dtypes, sizes and alignment. The sums grow in their row of `partial`, each element by one thread.
template <class C>
__global__ void __launch_bounds__(kScalarThreads, 1) scalar_kernel(const __grid_constant__ ModulateGradArgs args) {
  C* scratch = reinterpret_cast<C*>(dynamic_shared());
  C* row = scratch + 64;
  const Chunk chunk(args);
  const int64_t b = chunk.b;
  C* sums = chunk.sums<C>(args);
  for (int i = int(threadIdx.x); i < 3 * args.dim; i += kScalarThreads) sums[i] = C(0);
  __syncthreads();
  for (int64_t n = chunk.begin; n < chunk.end; ++n) {
    C mean = C(0), factor = C(0), means[2] = {};
    if (args.grad_out.data) {
      C sum = C(0), squares = C(0);
      for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
        row[i] = load_as<C>(args.residual, at(args.residual, b, n) + i);
        sum += row[i];
      }
      mean = block_sum(sum, scratch) / C(args.dim);
      for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) squares += (row[i] - mean) * (row[i] - mean);
      factor = inverse_root(block_sum(squares, scratch) / C(args.dim) + C(args.eps));
      const C* scale = group_row<C>(args.scale, b, chunk.g);
      for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
        const C grad = load_as<C>(args.grad_out, at(args.grad_out, b, n) + i), scaled = grad + grad * scale[i];
        means[0] += scaled;
        means[1] += scaled * ((row[i] - mean) * factor);
      }
      block_sums(means, scratch);
    }
    for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
      C total = args.grad_residual.data ? load_as<C>(args.grad_residual, at(args.grad_residual, b, n) + i) : C(0);
      if (args.grad_out.data) {
        const C normal = (row[i] - mean) * factor, grad = load_as<C>(args.grad_out, at(args.grad_out, b, n) + i);
        const C scaled = grad + grad * group_row<C>(args.scale, b, chunk.g)[i];
        total += (scaled - (means[0] + normal * means[1]) / C(args.dim)) * factor;
        sums[i] += grad * normal;
        sums[args.dim + i] += grad;
      }
      if (args.grad_x.data) store_as(args.grad_x, at(args.grad_x, b, n) + i, total);
      if (args.y.data) {
        sums[2 * args.dim + i] += total * load_as<C>(args.y, at(args.y, b, n) + i);
        store_as(args.grad_y, at(args.grad_y, b, n) + i, total * group_row<C>(args.gate, b, chunk.g)[i]);
      }
    }
    __syncthreads();
  }
}

// 32 columns of one sum of one group per turn of a block.
template <class C>
__global__ void __launch_bounds__(256) group_kernel(const __grid_constant__ ModulateGradArgs args) {
  C* targets[3] = {static_cast<C*>(args.grad_scale), static_cast<C*>(args.grad_shift), static_cast<C*>(args.grad_gate)};
  const int64_t tiles = (args.dim + 31) / 32, rows = args.batch * args.groups.count;
  for (int64_t item = blockIdx.x; item < rows * tiles; item += gridDim.x) {
    const int64_t row = item / tiles, b = row / args.groups.count, g = row - b * args.groups.count;
    const int i = int(item - row * tiles) * 32 + (int(threadIdx.x) & 31);
    const bool inside = g >= args.chunks.first_group && g <= args.chunks.last_group;
    const int64_t begin = inside ? args.chunks.chunk_begin(args.groups, g) : 0;
    const int64_t end = inside ? args.chunks.chunk_end(args.groups, g) : 0;
#pragma unroll
    for (int which = 0; which < 3; ++which) {
      if (targets[which] == nullptr) continue;
      const C* sums = static_cast<const C*>(args.partial) + (b * args.chunks.count * 3 + which) * args.dim + i;
      const C sum =
          column_sum(sums, begin, end, int64_t(args.dim) * 3, i < args.dim, reinterpret_cast<C*>(dynamic_shared()));
      if (threadIdx.x < 32 && i < args.dim) targets[which][row * args.dim + i] = sum;
    }
  }
}

// Whole vectors, and types that have a kernel: launched, true.
bool launch_rows(const ModulateGradArgs& args, cudaStream_t stream) {
  const DType layers = args.grad_out.data ? args.grad_out.dtype : args.y.dtype;
  const DType stream_dtype = args.residual.data ? args.residual.dtype : args.grad_residual.dtype;
  const bool fits = args.dim % kWidth == 0 && row_threads(args.dim, kVectors) <= kVectorThreads &&
                    whole(args.residual) && whole(args.y) && whole(args.grad_residual) && whole(args.grad_out) &&
                    whole(args.grad_x) && whole(args.grad_y) && whole(args.gate) && whole(args.scale) &&
                    aligned_rows(args.partial, nullptr, 0, 0) && has(args.grad_residual, stream_dtype) &&
                    has(args.grad_x, stream_dtype) && has(args.y, layers) && has(args.grad_y, layers);
  if (!fits) return false;
  const unsigned blocks = unsigned(args.batch * args.chunks.count);
  const int threads = row_threads(args.dim, kVectors);
  return dispatch_stream(stream_dtype, layers, [&](auto x_tag, auto layer_tag) {
    using X = typename decltype(x_tag)::type;
    using L = typename decltype(layer_tag)::type;
    const auto run = [&](auto kernel) {
      launch("modulate_backward", kernel, blocks, threads, 96 * sizeof(float), stream, args);
    };
    if (args.y.data == nullptr) return run(row_kernel<X, L, false, true>);
    return args.grad_out.data ? run(row_kernel<X, L, true, true>) : run(row_kernel<X, L, true, false>);
  });
}

template <class C>
void launch_scalar(const ModulateGradArgs& args, cudaStream_t stream) {
  launch("modulate_backward", scalar_kernel<C>, unsigned(args.batch * args.chunks.count), kScalarThreads,
         size_t(args.dim + 64) * sizeof(C), stream, args);
}

template <class C>
void launch_groups(const ModulateGradArgs& args, cudaStream_t stream) {
  const int64_t items = args.batch * args.groups.count * ((args.dim + 31) / 32);
  launch("modulate_backward", group_kernel<C>, unsigned(items < kMaxBlocks ? items : kMaxBlocks), 256, 256 * sizeof(C),
         stream, args);
}

}  // namespace

void modulate_backward(const ModulateGradArgs& args, cudaStream_t stream) {
  const bool wide = (args.grad_residual.data ? args.grad_residual.dtype : args.grad_out.dtype) == DType::float64;
  if (!launch_rows(args, stream)) wide ? launch_scalar<double>(args, stream) : launch_scalar<float>(args, stream);
  wide ? launch_groups<double>(args, stream) : launch_groups<float>(args, stream);
}

}  // namespace td::cuda
