// SPDX-License-Identifier: Apache-2.0
#include "core/eight_bit.h"

#include "core/parallel.h"
#include "cpu/code_rows.h"
#include "cpu/vec_math.h"

namespace td::TD_ISA {
namespace {

constexpr int64_t kParallelElements = 16 << 10;  // work worth a thread of its own

// Active: the type of what the activation gives.
template <class T, class Active>
void quantise(const QuantiseRowsArgs& args) {
  const int dim = int(args.dim);
  parallel_for(args.rows, 1 + kParallelElements / (dim + 1), [&](int64_t begin, int64_t end) {
    alignas(64) Active active[kMaxEightBitDim];
    for (int64_t n = begin; n < end; ++n) {
      const T* row = static_cast<const T*>(args.x) + n * args.x_stride;
      if (!args.gelu) {
        code_row(args.codes, 0, n, row, dim);
        continue;
      }
      for_vectors<float>(dim, [&](int i, auto part) { put(active + i, gelu(load(row + i, part)), part); });
      code_row(args.codes, 0, n, active, dim);
    }
  });
}

template <class T>
void rescale_rows(const RescaleArgs& args) {
  const int columns = int(args.columns);
  parallel_for(args.rows, 1 + kParallelElements / (columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int32_t* sums = args.sums + n * args.columns;
      T* out = static_cast<T*>(args.out) + n * args.columns;
      const FloatVec scale = splat(args.row_scale[n]);
      for_vectors<float>(columns, [&](int i, auto part) {
        // As floats the sums keep their bits until they are converted.
        const FloatVec sum =
            __builtin_convertvector((IntVec)load(reinterpret_cast<const float*>(sums) + i, part), FloatVec);
        const FloatVec value = sum * scale * load(args.column_scale + i, part);
        put(out + i, args.bias ? value + load(args.bias + i, part) : value, part);
      });
    }
  });
}

}  // namespace

void quantise_rows(const QuantiseRowsArgs& args) {
  dispatch_narrow(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.codes.exact ? quantise<T, T>(args) : quantise<T, float>(args);
  });
}

void rescale(const RescaleArgs& args) {
  dispatch_narrow(args.dtype, [&](auto tag) { rescale_rows<typename decltype(tag)::type>(args); });
}

}  // namespace td::TD_ISA
