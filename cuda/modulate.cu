// SPDX-License-Identifier: Apache-2.0
#include "core/modulate.h"
#include "launch.cuh"

namespace td::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;

template <class C>
__device__ __forceinline__ C load_as(const Rows& rows, int64_t at) {
  if constexpr (sizeof(C) == 8) {
    return static_cast<const double*>(rows.data)[at];
  } else {
    if (rows.dtype == DType::float32) return static_cast<const float*>(rows.data)[at];
    if (rows.dtype == DType::bfloat16) return float(static_cast<const bf16*>(rows.data)[at]);
    return float(static_cast<const fp16*>(rows.data)[at]);
  }
}

template <class C>
__device__ __forceinline__ void store_as(const Rows& rows, int64_t at, C value) {
  if constexpr (sizeof(C) == 8) {
    static_cast<double*>(rows.data)[at] = value;
  } else {
    if (rows.dtype == DType::float32) {
      static_cast<float*>(rows.data)[at] = value;
    } else if (rows.dtype == DType::bfloat16) {
      static_cast<bf16*>(rows.data)[at] = bf16(value);
    } else {
      static_cast<fp16*>(rows.data)[at] = fp16(value);
    }
  }
}

__device__ __forceinline__ int64_t at(const Rows& rows, int64_t b, int64_t n) {
  return b * rows.batch_stride + n * rows.token_stride;
}

template <class C>
__device__ __forceinline__ const C* group_row(const GroupRows& rows, int64_t b, int64_t g) {
  return static_cast<const C*>(rows.data) + b * rows.batch_stride + g * rows.group_stride;
}

__device__ __forceinline__ float inverse_root(float v) {
  return rsqrtf(v);
}
__device__ __forceinline__ double inverse_root(double v) {
  return rsqrt(v);
}

// Mean and 1 / deviation of the row in shared memory, whose sum is given. Every thread gets them.
template <class C>
__device__ __forceinline__ void row_stats(const C* row, int dim, C total, double eps, C* scratch, C& mean, C& factor) {
  mean = total / C(dim);
  C squares = C(0);
  for (int i = int(threadIdx.x); i < dim; i += kThreads) squares += (row[i] - mean) * (row[i] - mean);
  factor = inverse_root(block_sum(squares, scratch) / C(dim) + C(eps));
}

// One block per token; its row is kept in shared memory.
template <class C>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ ModulateArgs args) {
  char* shared = dynamic_shared();
  __shared__ C scratch[32];
  C* row = reinterpret_cast<C*>(shared);
  for (int64_t item = blockIdx.x; item < args.batch * args.tokens; item += gridDim.x) {
    const int64_t b = item / args.tokens, n = item - b * args.tokens;
    const int64_t g = args.groups.group(args.token_offset + n);
    C sum = C(0);
    for (int i = int(threadIdx.x); i < args.dim; i += kThreads) {
      C value = load_as<C>(args.x, at(args.x, b, n) + i);
      if (args.y.data) value += group_row<C>(args.gate, b, g)[i] * load_as<C>(args.y, at(args.y, b, n) + i);
      if (args.residual.data) store_as(args.residual, at(args.residual, b, n) + i, value);
      row[i] = value;
      sum += value;
    }
    if (args.out.data == nullptr) continue;
    C mean, factor;
    row_stats(row, args.dim, block_sum(sum, scratch), args.eps, scratch, mean, factor);
    const C *scale = group_row<C>(args.scale, b, g), *shift = group_row<C>(args.shift, b, g);
    for (int i = int(threadIdx.x); i < args.dim; i += kThreads) {
      const C normal = (row[i] - mean) * factor;
      store_as(args.out, at(args.out, b, n) + i, normal + (normal * scale[i] + shift[i]));
    }
  }
}

// d(out)/d(residual) of one element from the statistics of its row: c1 and c2 are the means of g (1 + scale) and of
// g (1 + scale) times the normalised row.
template <class C>
__device__ __forceinline__ C total_gradient(const ModulateGradArgs& args, int64_t b, int64_t n, int64_t g, int i,
                                            const C* stats, C& normal, C& grad) {
  C total = args.grad_residual.data ? load_as<C>(args.grad_residual, at(args.grad_residual, b, n) + i) : C(0);
  if (args.grad_out.data) {
    normal = (load_as<C>(args.residual, at(args.residual, b, n) + i) - stats[0]) * stats[1];
    grad = load_as<C>(args.grad_out, at(args.grad_out, b, n) + i);
    const C scaled = grad + grad * group_row<C>(args.scale, b, g)[i];
    total += (scaled - stats[2] - normal * stats[3]) * stats[1];
  }
  return total;
}

// One block per token: statistics, gradients of x and y.
template <class C>
__global__ void __launch_bounds__(kThreads) backward_rows(const __grid_constant__ ModulateGradArgs args) {
  char* shared = dynamic_shared();
  __shared__ C scratch[32];
  C* row = reinterpret_cast<C*>(shared);
  for (int64_t item = blockIdx.x; item < args.batch * args.tokens; item += gridDim.x) {
    const int64_t b = item / args.tokens, n = item - b * args.tokens;
    const int64_t g = args.groups.group(args.token_offset + n);
    C stats[4] = {};
    if (args.grad_out.data) {
      C sum = C(0);
      for (int i = int(threadIdx.x); i < args.dim; i += kThreads) {
        row[i] = load_as<C>(args.residual, at(args.residual, b, n) + i);
        sum += row[i];
      }
      row_stats(row, args.dim, block_sum(sum, scratch), args.eps, scratch, stats[0], stats[1]);
      C c1 = C(0), c2 = C(0);
      const C* scale = group_row<C>(args.scale, b, g);
      for (int i = int(threadIdx.x); i < args.dim; i += kThreads) {
        const C grad = load_as<C>(args.grad_out, at(args.grad_out, b, n) + i);
        const C scaled = grad + grad * scale[i];
        c1 += scaled;
        c2 += scaled * ((row[i] - stats[0]) * stats[1]);
      }
      stats[2] = block_sum(c1, scratch) / C(args.dim);
      stats[3] = block_sum(c2, scratch) / C(args.dim);
      if (threadIdx.x == 0) {
        C* target = static_cast<C*>(args.stats) + item * 4;
        for (int k = 0; k < 4; ++k) target[k] = stats[k];
      }
    }
    for (int i = int(threadIdx.x); i < args.dim; i += kThreads) {
      C normal = C(0), grad = C(0);
      const C total = total_gradient(args, b, n, g, i, stats, normal, grad);
      if (args.grad_x.data) store_as(args.grad_x, at(args.grad_x, b, n) + i, total);
      if (args.y.data) store_as(args.grad_y, at(args.grad_y, b, n) + i, total * group_row<C>(args.gate, b, g)[i]);
    }
  }
}

// One thread per column of a chunk of tokens: partial sums of the gradients of scale, shift and gate.
template <class C>
__global__ void __launch_bounds__(kThreads) backward_partial(const __grid_constant__ ModulateGradArgs args) {
  const int64_t b = blockIdx.x / args.chunks.count, chunk = blockIdx.x % args.chunks.count;
  int64_t g, begin, end;
  args.chunks.locate(args.groups, chunk, g, begin, end);
  for (int i = int(blockIdx.y * kThreads + threadIdx.x); i < args.dim; i += int(gridDim.y) * kThreads) {
    C scale_sum = C(0), shift_sum = C(0), gate_sum = C(0);
    for (int64_t n = begin; n < end; ++n) {
      C normal = C(0), grad = C(0);
      const C* stats = static_cast<const C*>(args.stats) + (b * args.tokens + n) * 4;
      const C total = total_gradient(args, b, n, g, i, stats, normal, grad);
      scale_sum += grad * normal;
      shift_sum += grad;
      if (args.y.data) gate_sum += total * load_as<C>(args.y, at(args.y, b, n) + i);
    }
    C* sums = static_cast<C*>(args.partial) + (b * args.chunks.count + chunk) * 3 * args.dim + i;
    sums[0] = scale_sum;
    sums[args.dim] = shift_sum;
    sums[2 * args.dim] = gate_sum;
  }
}

// One thread per column of a group: the partial sums of its chunks, in order.
template <class C>
__global__ void __launch_bounds__(kThreads) backward_groups(const __grid_constant__ ModulateGradArgs args) {
  C* targets[3] = {static_cast<C*>(args.grad_scale), static_cast<C*>(args.grad_shift), static_cast<C*>(args.grad_gate)};
  const int64_t items = args.batch * args.groups.count * args.dim;
  for (int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x; item < items;
       item += int64_t(gridDim.x) * kThreads) {
    const int64_t row = item / args.dim, i = item - row * args.dim;
    const int64_t b = row / args.groups.count, g = row - b * args.groups.count;
    const bool inside = g >= args.chunks.first_group && g <= args.chunks.last_group;
    const int64_t begin = inside ? args.chunks.chunk_begin(args.groups, g) : 0;
    const int64_t end = inside ? args.chunks.chunk_end(args.groups, g) : 0;
#pragma unroll
    for (int which = 0; which < 3; ++which) {
      if (targets[which] == nullptr) continue;
      C sum = C(0);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        sum += static_cast<const C*>(args.partial)[((b * args.chunks.count + chunk) * 3 + which) * args.dim + i];
      }
      targets[which][item] = sum;
    }
  }
}

unsigned blocks_for(int64_t items) {
  return unsigned(items < kMaxBlocks ? items : kMaxBlocks);
}

template <class C>
void launch_forward(const ModulateArgs& args, cudaStream_t stream) {
  const size_t shared = size_t(args.dim) * sizeof(C);
  launch("modulate_forward", forward_kernel<C>, blocks_for(args.batch * args.tokens), kThreads, shared, stream, args);
}

template <class C>
void launch_backward(const ModulateGradArgs& args, cudaStream_t stream) {
  const size_t shared = size_t(args.dim) * sizeof(C);
  launch("modulate_backward", backward_rows<C>, blocks_for(args.batch * args.tokens), kThreads, shared, stream, args);
  const dim3 grid(unsigned(args.batch * args.chunks.count), unsigned((args.dim + kThreads - 1) / kThreads));
  launch("modulate_backward", backward_partial<C>, grid, kThreads, 0, stream, args);
  const int64_t columns = args.batch * args.groups.count * args.dim;
  launch("modulate_backward", backward_groups<C>, blocks_for((columns + kThreads - 1) / kThreads), kThreads, 0, stream,
         args);
}

}  // namespace

void modulate_forward(const ModulateArgs& args, cudaStream_t stream) {
  args.x.dtype == DType::float64 ? launch_forward<double>(args, stream) : launch_forward<float>(args, stream);
}

void modulate_backward(const ModulateGradArgs& args, cudaStream_t stream) {
  const DType dtype = args.grad_residual.data ? args.grad_residual.dtype : args.grad_out.dtype;
  dtype == DType::float64 ? launch_backward<double>(args, stream) : launch_backward<float>(args, stream);
}

}  // namespace td::cuda
