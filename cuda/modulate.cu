// SPDX-License-Identifier: Apache-2.0
#include "modulate.cuh"

#include "code_rows.cuh"

namespace td::cuda {
namespace {

constexpr int kVectors = 4;          // of kWidth elements, held by a thread
constexpr int kVectorThreads = 512;  // at most: a thread may have 128 registers
constexpr int kWarps = 16;
constexpr int64_t kForwardShare = 2;  // tokens of a block, at least
constexpr int kScratch = 3 * kWarps * int(sizeof(float));

// residual = x + gate y, and what the norm makes of it (Norm), in eight bits if Q says so. A block takes one token: of
// three or four rows per token many blocks have their loads in flight, more than fit into shared memory ahead of time.
template <class X, class L, bool Norm, EightBit Q>
__global__ void __launch_bounds__(kVectorThreads) gate_kernel(const __grid_constant__ ModulateArgs args) {
  __shared__ float scratch[3 * kWarps];
  const Columns<kVectors> columns(args.dim);
  int64_t b, n;
  locate(blockIdx.x, args.tokens, b, n);
  const X* x = static_cast<const X*>(args.x.data) + at(args.x, b, n) + columns.first;
  const L* y = static_cast<const L*>(args.y.data) + at(args.y, b, n) + columns.first;
  Vector<X, kWidth> xs[kVectors];
  Vector<L, kWidth> ys[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!columns.inside[i]) continue;
    xs[i].load(x + columns.step(i));
    ys[i].load(y + columns.step(i));
  }
  const int64_t g = args.groups.group(args.token_offset + n);
  const float* gates = group_row<float>(args.gate, b, g) + columns.first;
  X* residual = static_cast<X*>(args.residual.data) + at(args.residual, b, n) + columns.first;
  float row[kVectors][kWidth], total[1] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!columns.inside[i]) continue;
    const Vector<float, kWidth> gate = group_vector(gates, columns.step(i));
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      row[i][j] = xs[i].get(j) + gate.get(j) * ys[i].get(j);
      total[0] += row[i][j];
    }
    store_vector(residual + columns.step(i), row[i]);
  }
  if constexpr (Norm) {
    block_sums_apart<kWarps>(total, scratch);
    const float mean = total[0] / float(args.dim);
    total[0] = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!columns.inside[i]) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        row[i][j] -= mean;
        total[0] += row[i][j] * row[i][j];
      }
    }
    block_sums_apart<kWarps>(total, scratch + kWarps);
    const float factor = rsqrtf(total[0] / float(args.dim) + float(args.eps));
    const float* scales = group_row<float>(args.scale, b, g) + columns.first;
    const float* shifts = group_row<float>(args.shift, b, g) + columns.first;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!columns.inside[i]) continue;
      const Vector<float, kWidth> scale = group_vector(scales, columns.step(i));
      const Vector<float, kWidth> shift = group_vector(shifts, columns.step(i));
#pragma unroll
      for (int j = 0; j < kWidth; ++j) row[i][j] = row[i][j] * factor * (1.0f + scale.get(j)) + shift.get(j);
    }
    if constexpr (Q == EightBit::none) {
      L* out = static_cast<L*>(args.out.data) + at(args.out, b, n) + columns.first;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (columns.inside[i]) store_vector(out + columns.step(i), row[i]);
      }
    } else {
      store_codes<Q, kWarps, L>(args.codes, b, n, row, columns, reinterpret_cast<uint32_t*>(scratch + 2 * kWarps));
    }
  }
}

// A group's modulation of a thread's columns, in registers from token to token.
struct Modulation {
  float values[kVectors][kWidth];

  __device__ __forceinline__ void enter(const GroupRows& rows, int64_t b, int64_t g, const Columns<kVectors>& columns,
                                        float add) {
    const float* row = group_row<float>(rows, b, g) + columns.first;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!columns.inside[i]) continue;
      const Vector<float, kWidth> vector = group_vector(row, columns.step(i));
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values[i][j] = vector.get(j) + add;
    }
  }
};

// The norm alone: a block takes an equal share of the tokens, in order, and holds one in registers, while the next one
// is on its way to shared memory. X is the residual stream, L what layers take.
template <class X, class L, EightBit Q>
__global__ void __launch_bounds__(kVectorThreads, 1)
    row_kernel(const __grid_constant__ ModulateArgs args, const __grid_constant__ Shares shares) {
  using StagedX = Staged<X, kVectors, 0>;
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  const Columns<kVectors> columns(args.dim);
  Walk<int> at(args, shares);
  Track<const X> x_row;
  Track<L> out;
  Modulation scale, shift;
  const auto place_targets = [&] {
    if constexpr (Q == EightBit::none) out.place(args.out, at, columns.first);
    scale.enter(args.scale, at.b, at.g, columns, 1.0f);
    shift.enter(args.shift, at.b, at.g, columns, 0.0f);
  };
  x_row.place(args.x, at, columns.first);
  const StagedX xs(dynamic_shared() + kScratch + warp * StagedX::kEnd + lane * 16);
  xs.clear_outside(columns);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) xs.request(i, x_row.row, columns);
  commit_copies();
  place_targets();

  while (at.left > 0) {
    const bool leaves = at.advance(args), more = at.left > 0;
    if (leaves) {
      x_row.place(args.x, at, columns.first);
    } else {
      x_row.step(args.x);
    }
    wait_copies<0>();
    float row[kVectors][kWidth], total[1] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      Vector<X, kWidth> x;
      xs.read(i, x);
      if (more) xs.request(i, x_row.row, columns);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        row[i][j] = x.get(j);
        total[0] += row[i][j];
      }
    }
    commit_copies();
    block_sums_apart<kWarps>(total, scratch);
    const float mean = total[0] * shares.inverse_dim;
    total[0] = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!columns.inside[i]) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        row[i][j] -= mean;
        total[0] += row[i][j] * row[i][j];
      }
    }
    block_sums_apart<kWarps>(total, scratch + kWarps);
    const float factor = rsqrtf(total[0] * shares.inverse_dim + shares.eps);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!columns.inside[i]) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) row[i][j] = row[i][j] * factor * scale.values[i][j] + shift.values[i][j];
      if constexpr (Q == EightBit::none) store_vector(out.row + columns.step(i), row[i]);
    }
    if constexpr (Q != EightBit::none) {
      // Samples follow each other without a gap. The token's number is made anew: registers are scarce.
      const int64_t items = args.batch * args.tokens, last = (blockIdx.x + 1) * shares.share;
      const int64_t item = (last < items ? last : items) - at.left - 1;
      store_codes<Q, kWarps, L>(args.codes, 0, item, row, columns, reinterpret_cast<uint32_t*>(scratch + 2 * kWarps));
    }
    if (!leaves) {
      if constexpr (Q == EightBit::none) out.step(args.out);
    } else if (more) {
      place_targets();
    }
  }
}

// result(i) of a row in eight bits; it is asked for twice.
template <class Result>
__device__ __forceinline__ void store_any_codes(const ModulateArgs& args, int64_t b, int64_t n, const Result& result,
                                                uint32_t* scratch) {
  const auto value = [&](int i) {
    const float found = result(i);
    if (!args.codes.exact || args.out.dtype == DType::float32) return found;
    return args.out.dtype == DType::bfloat16 ? float(bf16(found)) : float(fp16(found));
  };
  uint32_t largest = 0;
  for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) largest = larger(largest, magnitude_bits(value(i)));
  const RowScale scale(block_largest<kScalarThreads / 32>(largest, scratch), args.codes.kind);
  const CodeRows& codes = args.codes;
  if (threadIdx.x == 0) codes.scales[b * codes.scale_batch_stride + n * codes.scale_token_stride] = scale.scale;
  uint8_t* target = codes.data + b * codes.batch_stride + n * codes.token_stride;
  for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
    target[i] = uint8_t(code_of(value(i) * scale.factor, codes.kind));
  }
}

// Any dtypes, sizes and alignment: one block per token, its row in shared memory where there is room for it (Keep),
// else read again.
template <class C, bool Keep>
__global__ void __launch_bounds__(kScalarThreads) scalar_kernel(const __grid_constant__ ModulateArgs args) {
  C* scratch = reinterpret_cast<C*>(dynamic_shared());
  C* row = scratch + 32;
  for (int64_t item = blockIdx.x; item < args.batch * args.tokens; item += gridDim.x) {
    int64_t b, n;
    locate(item, args.tokens, b, n);
    const int64_t g = args.groups.group(args.token_offset + n);
    const auto read = [&](int i) {
      const C x = load_as<C>(args.x, at(args.x, b, n) + i);
      if (!args.y.data) return x;
      return x + group_row<C>(args.gate, b, g)[i] * load_as<C>(args.y, at(args.y, b, n) + i);
    };
    // Without room the sum is read where it was just written, and a thread comes back to its own elements only.
    const auto again = [&](int i) {
      if constexpr (Keep) return row[i];
      return args.residual.data ? load_as<C>(args.residual, at(args.residual, b, n) + i) : read(i);
    };
    C sum = C(0);
    for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
      const C value = read(i);
      if (args.residual.data) store_as(args.residual, at(args.residual, b, n) + i, value);
      if constexpr (Keep) row[i] = value;
      sum += value;
    }
    if (!args.norms()) continue;
    const C mean = block_sum(sum, scratch) / C(args.dim);
    C squares = C(0);
    for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
      const C centred = again(i) - mean;
      squares += centred * centred;
    }
    const C factor = inverse_root(block_sum(squares, scratch) / C(args.dim) + C(args.eps));
    const C *scale = group_row<C>(args.scale, b, g), *shift = group_row<C>(args.shift, b, g);
    const auto result = [&](int i) {
      const C normal = (again(i) - mean) * factor;
      return normal + (normal * scale[i] + shift[i]);
    };
    if (args.out.data) {
      for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
        store_as(args.out, at(args.out, b, n) + i, result(i));
      }
    } else if constexpr (sizeof(C) == 4) {
      store_any_codes(args, b, n, result, reinterpret_cast<uint32_t*>(scratch));
    }
  }
}

template <class X, class L, EightBit Q>
void launch_norm(const ModulateArgs& args, cudaStream_t stream) {
  const int threads = row_threads(args.dim, kVectors);
  const auto kernel = row_kernel<X, L, Q>;
  const size_t bytes = size_t(kScratch + threads * kVectors * kWidth * int(sizeof(X)));
  const int64_t most = resident_blocks("modulate_forward", kernel, threads, bytes, kMaxBlocks);
  const TokenShares shares(args.batch * args.tokens, most, kForwardShare);
  launch("modulate_forward", kernel, unsigned(shares.blocks), threads, bytes, stream, args, Shares(shares, args));
}

// Whole vectors, and types that have a kernel: launched, true.
bool launch_rows(const ModulateArgs& args, cudaStream_t stream) {
  const DType layers = args.norms() ? args.out.dtype : args.y.dtype;
  const bool fits = args.dim % kWidth == 0 && row_threads(args.dim, kVectors) <= kVectorThreads && whole(args.x) &&
                    whole(args.y) && whole(args.residual) && whole(args.out) && whole(args.codes) && whole(args.gate) &&
                    whole(args.scale) && whole(args.shift) && has(args.residual, args.x.dtype) && has(args.y, layers) &&
                    walks_in_int(args) && (args.y.data == nullptr) == (args.residual.data == nullptr) &&
                    without_gaps(args.codes, args.tokens);
  if (!fits) return false;
  const int threads = row_threads(args.dim, kVectors);
  const auto gate = [&](auto kernel) {
    launch("modulate_forward", kernel, unsigned(args.batch * args.tokens), threads, 0, stream, args);
  };
  return dispatch_stream(args.x.dtype, layers, [&](auto x_tag, auto layer_tag) {
    using X = typename decltype(x_tag)::type;
    using L = typename decltype(layer_tag)::type;
    if (args.codes.data) {
      dispatch_kind(args.codes.kind, [&](auto kind) {
        constexpr EightBit Q = decltype(kind)::value;
        args.y.data ? gate(gate_kernel<X, L, true, Q>) : launch_norm<X, L, Q>(args, stream);
      });
    } else if (args.y.data) {
      gate(args.out.data ? gate_kernel<X, L, true, EightBit::none> : gate_kernel<X, L, false, EightBit::none>);
    } else {
      launch_norm<X, L, EightBit::none>(args, stream);
    }
  });
}

template <class C>
void launch_scalar(const ModulateArgs& args, cudaStream_t stream) {
  const int64_t items = args.batch * args.tokens;
  const unsigned blocks = unsigned(items < kMaxBlocks ? items : kMaxBlocks);
  const size_t scratch = 32 * sizeof(C), row = size_t(args.dim) * sizeof(C);
  if (shared_bytes_exist("modulate_forward", scratch + row)) {
    launch("modulate_forward", scalar_kernel<C, true>, blocks, kScalarThreads, scratch + row, stream, args);
  } else {
    launch("modulate_forward", scalar_kernel<C, false>, blocks, kScalarThreads, scratch, stream, args);
  }
}

}  // namespace

void modulate_forward(const ModulateArgs& args, cudaStream_t stream) {
  if (launch_rows(args, stream)) return;
  args.x.dtype == DType::float64 ? launch_scalar<double>(args, stream) : launch_scalar<float>(args, stream);
}

}  // namespace td::cuda
