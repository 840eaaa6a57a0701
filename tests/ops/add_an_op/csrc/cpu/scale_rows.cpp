// SPDX-License-Identifier: Apache-2.0
#include "core/scale_rows.h"

#include "core/parallel.h"
#include "cpu/vec.h"

namespace td::TD_ISA {

void scale_rows(const ScaleRowsArgs& args) {
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    parallel_for(args.rows, 1 + (1 << 14) / (args.dim + 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
        T* out = static_cast<T*>(args.out) + row * args.out_stride;
        for_vectors<C>(int(args.dim),
                       [&](int i, auto part) { put(out + i, load(x + i, part) * splat(C(args.factor)), part); });
      }
    });
  });
}

}  // namespace td::TD_ISA
