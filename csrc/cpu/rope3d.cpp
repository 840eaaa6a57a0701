// SPDX-License-Identifier: Apache-2.0
#include "core/rope3d.h"

#include "core/parallel.h"
#include "cpu/rope_row.h"

namespace td::TD_ISA {
namespace {

template <class T>
void run(const RopeArgs& args) {
  using C = compute_t<T>;
  const int64_t bytes_per_token = args.batch * args.heads * args.dim * int64_t(sizeof(T));
  parallel_for(args.tokens, 1 + kParallelBytes / (bytes_per_token + 1), [&](int64_t begin, int64_t end) {
    RopeRow<C> row(args, begin);
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t b = 0; b < args.batch; ++b) {
        const T* x = static_cast<const T*>(args.x) + b * args.x_strides[0] + n * args.x_strides[1];
        T* out = static_cast<T*>(args.out) + b * args.out_strides[0] + n * args.out_strides[1];
        for (int64_t h = 0; h < args.heads; ++h) {
          if (args.interleaved) {
            row.rotate_interleaved(x + h * args.x_strides[2], out + h * args.out_strides[2]);
          } else {
            row.rotate_halves(x + h * args.x_strides[2], out + h * args.out_strides[2]);
          }
        }
      }
      if (n + 1 < end) row.advance();
    }
  });
}

}  // namespace

void rope3d(const RopeArgs& args) {
  dispatch_float(args.dtype, [&](auto tag) { run<typename decltype(tag)::type>(args); });
}

}  // namespace td::TD_ISA
