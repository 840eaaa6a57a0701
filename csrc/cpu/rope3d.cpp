// SPDX-License-Identifier: Apache-2.0
#include "core/rope3d.h"

#include "core/parallel.h"
#include "cpu/rope_row.h"

namespace td::TD_ISA {
namespace {

template <class T, bool Stream>
void run(const RopeArgs& args) {
  const int64_t bytes_per_token = args.batch * args.heads * args.dim * int64_t(sizeof(T));
  parallel_for(args.tokens, 1 + kParallelBytes / (bytes_per_token + 1), [&](int64_t begin, int64_t end) {
    RopeRow<compute_t<T>> row(args, begin);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t next = n + 1 < end ? args.x_strides[1] : 0;  // rows are too short for the processor to see ahead
      for (int64_t b = 0; b < args.batch; ++b) {
        for (int64_t h = 0; h < args.heads; ++h) {
          const T* x = rope_head<const T>(args.x, args.x_strides, b, n, h);
          T* out = rope_head<T>(args.out, args.out_strides, b, n, h);
          row.template rotate_into<Stream>(out, [&](int d, auto part) {
            prefetch(x + next + d);
            return load(x + d, part);
          });
        }
      }
      if (n + 1 < end) row.advance();
    }
    if constexpr (Stream) stream_fence();
  });
}

}  // namespace

void rope3d(const RopeArgs& args) {
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    rope_can_stream<T>(args) ? run<T, true>(args) : run<T, false>(args);
  });
}

}  // namespace td::TD_ISA
