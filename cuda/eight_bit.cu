// SPDX-License-Identifier: Apache-2.0
#include "core/eight_bit.h"

#include "code_rows.cuh"
#include "modulate.cuh"

namespace td::cuda {
namespace {

constexpr int kVectors = 4;  // of kWidth elements, held by a thread
constexpr int kVectorThreads = 512;
constexpr int kWarps = 16, kScalarWarps = kScalarThreads / 32;

enum class Activation : int { none, gelu, close_gelu };

// To the bit what PyTorch's gelu(approximate="tanh") computes on a GPU, or the same function with one exponential.
template <Activation A>
__device__ __forceinline__ float activated(float x) {
  constexpr float kBeta = 0.7978845608028654f, kKappa = 0.044715f;  // sqrt(2 / pi)
  if constexpr (A == Activation::gelu) {
    const float cube = x * x * x, inner = kBeta * (x + kKappa * cube);
    return 0.5f * x * (1.0f + tanhf(inner));
  } else if constexpr (A == Activation::close_gelu) {
    const float below = 1.0f + __expf(-2.0f * kBeta * (x + kKappa * x * x * x));
#if defined(__CUDA_ARCH__)
    return __fdividef(x, below);
#else
    return x / below;
#endif
  } else {
    return x;
  }
}

// A block takes one row after the other and holds it in registers.
template <class T, EightBit Q, Activation A>
__global__ void __launch_bounds__(kVectorThreads) rows_kernel(const __grid_constant__ QuantiseRowsArgs args) {
  __shared__ uint32_t scratch[kWarps];
  const Columns<kVectors> columns(int(args.dim));
  for (int64_t n = blockIdx.x; n < args.rows; n += gridDim.x) {
    const T* x = static_cast<const T*>(args.x) + n * args.x_stride + columns.first;
    Vector<T, kWidth> xs[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (columns.inside[i]) xs[i].load(x + columns.step(i));
    }
    float row[kVectors][kWidth];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!columns.inside[i]) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) row[i][j] = activated<A>(xs[i].get(j));
    }
    store_codes<Q, kWarps, T>(args.codes, 0, n, row, columns, scratch);
    __syncthreads();  // before the next row's use of the scratch memory
  }
}

// Any size and alignment: a block per row, which it reads twice.
template <class T, Activation A>
__global__ void __launch_bounds__(kScalarThreads) any_rows_kernel(const __grid_constant__ QuantiseRowsArgs args) {
  __shared__ uint32_t scratch[kScalarWarps];
  for (int64_t n = blockIdx.x; n < args.rows; n += gridDim.x) {
    const T* x = static_cast<const T*>(args.x) + n * args.x_stride;
    const auto value = [&](int64_t i) {
      const float found = activated<A>(float(x[i]));
      return args.codes.exact ? float(T(found)) : found;
    };
    uint32_t largest = 0;
    for (int64_t i = threadIdx.x; i < args.dim; i += kScalarThreads) {
      largest = larger(largest, magnitude_bits(value(i)));
    }
    const RowScale scale(block_largest<kScalarWarps>(largest, scratch), args.codes.kind);
    if (threadIdx.x == 0) args.codes.scales[n * args.codes.scale_token_stride] = scale.scale;
    uint8_t* target = args.codes.data + n * args.codes.token_stride;
    for (int64_t i = threadIdx.x; i < args.dim; i += kScalarThreads) {
      target[i] = uint8_t(code_of(value(i) * scale.factor, args.codes.kind));
    }
  }
}

// A block per row of sums.
template <class T, bool Vectors>
__global__ void __launch_bounds__(kScalarThreads) rescale_kernel(const __grid_constant__ RescaleArgs args) {
  for (int64_t n = blockIdx.x; n < args.rows; n += gridDim.x) {
    const float row_scale = args.row_scale[n];
    const int32_t* sums = args.sums + n * args.columns;
    T* out = static_cast<T*>(args.out) + n * args.columns;
    const auto value = [&](int32_t sum, float column_scale, float bias) {
      return float(sum) * row_scale * column_scale + bias;
    };
    if constexpr (Vectors) {
      for (int64_t i = 4 * int64_t(threadIdx.x); i < args.columns; i += 4 * kScalarThreads) {
        const uint4 packed = *reinterpret_cast<const uint4*>(sums + i);
        const int32_t sum[4] = {int32_t(packed.x), int32_t(packed.y), int32_t(packed.z), int32_t(packed.w)};
        Vector<float, 4> scale, bias;
        scale.load(args.column_scale + i);
        args.bias ? bias.load(args.bias + i) : bias.clear();
        float values[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = value(sum[j], scale.get(j), bias.get(j));
        Vector<T, 4> result;
        result.set(values);
        result.store(out + i);
      }
    } else {
      for (int64_t i = threadIdx.x; i < args.columns; i += kScalarThreads) {
        out[i] = T(value(sums[i], args.column_scale[i], args.bias ? args.bias[i] : 0.0f));
      }
    }
  }
}

template <class T, Activation A>
void launch_rows(const QuantiseRowsArgs& args, cudaStream_t stream) {
  const unsigned blocks = unsigned(args.rows < kMaxBlocks ? args.rows : kMaxBlocks);
  const int threads = row_threads(int(args.dim), kVectors);
  const bool fits = args.dim % kWidth == 0 && threads <= kVectorThreads &&
                    aligned_rows(args.x, &args.x_stride, 1, sizeof(T)) && whole(args.codes);
  if (!fits) return launch("quantise_rows", any_rows_kernel<T, A>, blocks, kScalarThreads, 0, stream, args);
  dispatch_kind(args.codes.kind, [&](auto kind) {
    launch("quantise_rows", rows_kernel<T, decltype(kind)::value, A>, blocks, threads, 0, stream, args);
  });
}

}  // namespace

void quantise_rows(const QuantiseRowsArgs& args, cudaStream_t stream) {
  dispatch_narrow(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!args.gelu) return launch_rows<T, Activation::none>(args, stream);
    if (args.codes.exact) return launch_rows<T, Activation::gelu>(args, stream);
    launch_rows<T, Activation::close_gelu>(args, stream);
  });
}

void rescale(const RescaleArgs& args, cudaStream_t stream) {
  const unsigned blocks = unsigned(args.rows < kMaxBlocks ? args.rows : kMaxBlocks);
  const uint64_t addresses = reinterpret_cast<uint64_t>(args.sums) | reinterpret_cast<uint64_t>(args.column_scale) |
                             reinterpret_cast<uint64_t>(args.bias) | reinterpret_cast<uint64_t>(args.out);
  const bool vectors = args.columns % 4 == 0 && addresses % 16 == 0;
  dispatch_narrow(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel = vectors ? rescale_kernel<T, true> : rescale_kernel<T, false>;
    launch("rescale", kernel, blocks, kScalarThreads, 0, stream, args);
  });
}

}  // namespace td::cuda
