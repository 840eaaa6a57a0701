// SPDX-License-Identifier: Apache-2.0
#include "modulate.cuh"

namespace td::cuda {
namespace {

constexpr int kVectors = 4;          // of kWidth elements, held by a thread
constexpr int kVectorThreads = 384;  // at most

// A block holds a row in registers: memory is read once. X is the residual stream, L what layers take and give.
template <class X, class L, bool Gate, bool Norm>
__global__ void __launch_bounds__(kVectorThreads) row_kernel(const __grid_constant__ ModulateArgs args) {
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  const int count = args.dim / kWidth;
  for (int64_t item = blockIdx.x; item < args.batch * args.tokens; item += gridDim.x) {
    int64_t b, n;
    locate(item, args.tokens, b, n);
    Vector<X, kWidth> xs[kVectors];
    Vector<L, kWidth> ys[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = int(threadIdx.x) + i * int(blockDim.x);
      if (v < count) {
        load_vector(xs[i], args.x, b, n, v);
        if constexpr (Gate) load_vector(ys[i], args.y, b, n, v);
      } else {
        xs[i].clear();
      }
    }
    const int64_t g = args.groups.group(args.token_offset + n);
    float row[kVectors][kWidth], total[1] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = int(threadIdx.x) + i * int(blockDim.x);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) row[i][j] = xs[i].get(j);
      if constexpr (Gate) {
        if (v < count) {
          const Vector<float, kWidth> gate = group_vector(group_row<float>(args.gate, b, g), v);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) row[i][j] += gate.get(j) * ys[i].get(j);
          store_vector<X>(args.residual, b, n, v, row[i]);
        }
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) total[0] += row[i][j];
    }
    if constexpr (Norm) {
      block_sums(total, scratch);
      const float mean = total[0] / float(args.dim);
      total[0] = 0.0f;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (int(threadIdx.x) + i * int(blockDim.x) >= count) continue;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) total[0] += (row[i][j] - mean) * (row[i][j] - mean);
      }
      block_sums(total, scratch);
      const float factor = rsqrtf(total[0] / float(args.dim) + float(args.eps));
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int v = int(threadIdx.x) + i * int(blockDim.x);
        if (v >= count) continue;
        const Vector<float, kWidth> scale = group_vector(group_row<float>(args.scale, b, g), v);
        const Vector<float, kWidth> shift = group_vector(group_row<float>(args.shift, b, g), v);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float normal = (row[i][j] - mean) * factor;
          row[i][j] = normal + (normal * scale.get(j) + shift.get(j));
        }
        store_vector<L>(args.out, b, n, v, row[i]);
      }
    }
  }
}

// Any dtypes, sizes and alignment: one block per token, its row in shared memory.
template <class C>
__global__ void __launch_bounds__(kScalarThreads) scalar_kernel(const __grid_constant__ ModulateArgs args) {
  C* scratch = reinterpret_cast<C*>(dynamic_shared());
  C* row = scratch + 32;
  for (int64_t item = blockIdx.x; item < args.batch * args.tokens; item += gridDim.x) {
    int64_t b, n;
    locate(item, args.tokens, b, n);
    const int64_t g = args.groups.group(args.token_offset + n);
    C sum = C(0);
    for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
      C value = load_as<C>(args.x, at(args.x, b, n) + i);
      if (args.y.data) value += group_row<C>(args.gate, b, g)[i] * load_as<C>(args.y, at(args.y, b, n) + i);
      if (args.residual.data) store_as(args.residual, at(args.residual, b, n) + i, value);
      row[i] = value;
      sum += value;
    }
    if (args.out.data == nullptr) continue;
    const C mean = block_sum(sum, scratch) / C(args.dim);
    C squares = C(0);
    for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) squares += (row[i] - mean) * (row[i] - mean);
    const C factor = inverse_root(block_sum(squares, scratch) / C(args.dim) + C(args.eps));
    const C *scale = group_row<C>(args.scale, b, g), *shift = group_row<C>(args.shift, b, g);
    for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
      const C normal = (row[i] - mean) * factor;
      store_as(args.out, at(args.out, b, n) + i, normal + (normal * scale[i] + shift[i]));
    }
  }
}

// Whole vectors, and types that have a kernel: launched, true.
bool launch_rows(const ModulateArgs& args, cudaStream_t stream) {
  const DType layers = args.out.data ? args.out.dtype : args.y.dtype;
  const bool fits = args.dim % kWidth == 0 && row_threads(args.dim, kVectors) <= kVectorThreads && whole(args.x) &&
                    whole(args.y) && whole(args.residual) && whole(args.out) && whole(args.gate) && whole(args.scale) &&
                    whole(args.shift) && has(args.residual, args.x.dtype) && has(args.y, layers);
  if (!fits) return false;
  const int64_t items = args.batch * args.tokens;
  const unsigned blocks = unsigned(items < INT32_MAX ? items : INT32_MAX);
  const int threads = row_threads(args.dim, kVectors);
  return dispatch_stream(args.x.dtype, layers, [&](auto x_tag, auto layer_tag) {
    using X = typename decltype(x_tag)::type;
    using L = typename decltype(layer_tag)::type;
    const auto run = [&](auto kernel) {
      launch("modulate_forward", kernel, blocks, threads, 32 * sizeof(float), stream, args);
    };
    if (args.y.data == nullptr) return run(row_kernel<X, L, false, true>);
    return args.out.data ? run(row_kernel<X, L, true, true>) : run(row_kernel<X, L, true, false>);
  });
}

template <class C>
void launch_scalar(const ModulateArgs& args, cudaStream_t stream) {
  const int64_t items = args.batch * args.tokens;
  launch("modulate_forward", scalar_kernel<C>, unsigned(items < kMaxBlocks ? items : kMaxBlocks), kScalarThreads,
         size_t(args.dim + 32) * sizeof(C), stream, args);
}

}  // namespace

void modulate_forward(const ModulateArgs& args, cudaStream_t stream) {
  if (launch_rows(args, stream)) return;
  args.x.dtype == DType::float64 ? launch_scalar<double>(args, stream) : launch_scalar<float>(args, stream);
}

}  // namespace td::cuda
