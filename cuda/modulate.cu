// SPDX-License-Identifier: Apache-2.0
#include "modulate.cuh"

namespace td::cuda {
namespace {

constexpr int kVectors = 4;          // of kWidth elements, held by a thread
constexpr int kVectorThreads = 512;  // at most: a thread may have 128 registers
constexpr int kWarps = 16;
constexpr int64_t kForwardShare = 2;  // tokens of a block, at least
constexpr int kScratch = 2 * kWarps * int(sizeof(float));

// residual = x + gate y: nothing to wait for, so a block takes one token, and many blocks have their loads in flight.
template <class X, class L>
__global__ void __launch_bounds__(kVectorThreads) gate_kernel(const __grid_constant__ ModulateArgs args) {
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
  const float* gates = group_row<float>(args.gate, b, args.groups.group(args.token_offset + n)) + columns.first;
  X* residual = static_cast<X*>(args.residual.data) + at(args.residual, b, n) + columns.first;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!columns.inside[i]) continue;
    const Vector<float, kWidth> gate = group_vector(gates, columns.step(i));
    float row[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) row[j] = xs[i].get(j) + gate.get(j) * ys[i].get(j);
    store_vector(residual + columns.step(i), row);
  }
}

// A group's modulation of a thread's columns: kept in registers from token to token (Keep), or read for every token.
template <bool Keep>
struct Modulation {
  float values[Keep ? kVectors : 1][kWidth];
  const float* row;

  __device__ __forceinline__ void enter(const GroupRows& rows, int64_t b, int64_t g, const Columns<kVectors>& columns,
                                        float add) {
    row = group_row<float>(rows, b, g) + columns.first;
    if constexpr (Keep) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (!columns.inside[i]) continue;
        const Vector<float, kWidth> vector = group_vector(row, columns.step(i));
#pragma unroll
        for (int j = 0; j < kWidth; ++j) values[i][j] = vector.get(j) + add;
      }
    }
  }
  __device__ __forceinline__ void get(int i, float add, float (&result)[kWidth]) const {
    if constexpr (Keep) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) result[j] = values[i][j];
    } else {
      const Vector<float, kWidth> vector = group_vector(row, Columns<kVectors>::step(i));
#pragma unroll
      for (int j = 0; j < kWidth; ++j) result[j] = vector.get(j) + add;
    }
  }
};

// A block takes an equal share of the tokens, in order, and holds one in registers, while the next one is on its way to
// shared memory. X is the residual stream, L what layers take and give.
template <class X, class L, bool Gate>
__global__ void __launch_bounds__(kVectorThreads, 1)
    row_kernel(const __grid_constant__ ModulateArgs args, const __grid_constant__ Shares shares) {
  using StagedX = Staged<X, kVectors, 0>;
  using StagedY = Staged<L, kVectors, StagedX::kEnd>;
  float* scratch = reinterpret_cast<float*>(dynamic_shared());
  const int warp = int(threadIdx.x) >> 5, lane = int(threadIdx.x) & 31;
  char* own = dynamic_shared() + kScratch + warp * (Gate ? StagedY::kEnd : StagedX::kEnd) + lane * 16;
  const Columns<kVectors> columns(args.dim);
  Walk<int> at(args, shares);
  Track<const X> x_row;
  Track<const L> y_row;
  Track<X> residual;
  Track<L> out;
  Modulation<false> gate;
  Modulation<!Gate> scale, shift;
  const auto place_sources = [&] {
    x_row.place(args.x, at, columns.first);
    if constexpr (Gate) y_row.place(args.y, at, columns.first);
  };
  const auto place_targets = [&] {
    if constexpr (Gate) {
      residual.place(args.residual, at, columns.first);
      gate.enter(args.gate, at.b, at.g, columns, 0.0f);
    }
    out.place(args.out, at, columns.first);
    scale.enter(args.scale, at.b, at.g, columns, 1.0f);
    shift.enter(args.shift, at.b, at.g, columns, 0.0f);
  };
  place_sources();
  const StagedX xs(own);
  const StagedY ys(own);
  xs.clear_outside(columns);
  if constexpr (Gate) ys.clear_outside(columns);
  const auto request = [&](int i) {
    xs.request(i, x_row.row, columns);
    if constexpr (Gate) ys.request(i, y_row.row, columns);
  };
#pragma unroll
  for (int i = 0; i < kVectors; ++i) request(i);
  commit_copies();
  place_targets();

  while (at.left > 0) {
    const bool leaves = at.advance(args), more = at.left > 0;
    if (leaves) {
      place_sources();
    } else {
      x_row.step(args.x);
      if constexpr (Gate) y_row.step(args.y);
    }
    wait_copies<0>();
    float row[kVectors][kWidth], total[1] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      Vector<X, kWidth> x;
      Vector<L, kWidth> y;
      xs.read(i, x);
      if constexpr (Gate) ys.read(i, y);
      if (more) request(i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) row[i][j] = x.get(j);
      if constexpr (Gate) {
        if (columns.inside[i]) {
          float gates[kWidth];
          gate.get(i, 0.0f, gates);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) row[i][j] += gates[j] * y.get(j);
          store_vector(residual.row + columns.step(i), row[i]);
        }
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) total[0] += row[i][j];
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
      float scales[kWidth], shifts[kWidth];
      scale.get(i, 1.0f, scales);
      shift.get(i, 0.0f, shifts);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) row[i][j] = row[i][j] * factor * scales[j] + shifts[j];
      store_vector(out.row + columns.step(i), row[i]);
    }
    if (!leaves) {
      if constexpr (Gate) residual.step(args.residual);
      out.step(args.out);
    } else if (more) {
      place_targets();
    }
  }
}

// Any dtypes, sizes and alignment: one block per token, its row in shared memory where there is room for it (Keep), else
// read again.
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
    if (args.out.data == nullptr) continue;
    const C mean = block_sum(sum, scratch) / C(args.dim);
    C squares = C(0);
    for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
      const C centred = again(i) - mean;
      squares += centred * centred;
    }
    const C factor = inverse_root(block_sum(squares, scratch) / C(args.dim) + C(args.eps));
    const C *scale = group_row<C>(args.scale, b, g), *shift = group_row<C>(args.shift, b, g);
    for (int i = int(threadIdx.x); i < args.dim; i += kScalarThreads) {
      const C normal = (again(i) - mean) * factor;
      store_as(args.out, at(args.out, b, n) + i, normal + (normal * scale[i] + shift[i]));
    }
  }
}

// Whole vectors, and types that have a kernel: launched, true.
bool launch_rows(const ModulateArgs& args, cudaStream_t stream) {
  const DType layers = args.out.data ? args.out.dtype : args.y.dtype;
  const bool fits = args.dim % kWidth == 0 && row_threads(args.dim, kVectors) <= kVectorThreads && whole(args.x) &&
                    whole(args.y) && whole(args.residual) && whole(args.out) && whole(args.gate) && whole(args.scale) &&
                    whole(args.shift) && has(args.residual, args.x.dtype) && has(args.y, layers) && walks_in_int(args) &&
                    (args.y.data == nullptr) == (args.residual.data == nullptr);
  if (!fits) return false;
  const int threads = row_threads(args.dim, kVectors);
  return dispatch_stream(args.x.dtype, layers, [&](auto x_tag, auto layer_tag) {
    using X = typename decltype(x_tag)::type;
    using L = typename decltype(layer_tag)::type;
    const auto run = [&](auto kernel) {
      const int elements = int(sizeof(X)) + (args.y.data ? int(sizeof(L)) : 0);
      const size_t bytes = size_t(kScratch + threads * kVectors * kWidth * elements);
      const int64_t most = resident_blocks("modulate_forward", kernel, threads, bytes, kMaxBlocks);
      const TokenShares shares(args.batch * args.tokens, most, kForwardShare);
      launch("modulate_forward", kernel, unsigned(shares.blocks), threads, bytes, stream, args, Shares(shares, args));
    };
    if (args.out.data) return args.y.data ? run(row_kernel<X, L, true>) : run(row_kernel<X, L, false>);
    launch("modulate_forward", gate_kernel<X, L>, unsigned(args.batch * args.tokens), threads, 0, stream, args);
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
