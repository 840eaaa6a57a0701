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
      for (int64_t b = 0; b < args.batch; ++b) {
        const T* x = static_cast<const T*>(args.x) + b * args.x_strides[0] + n * args.x_strides[1];
        T* out = static_cast<T*>(args.out) + b * args.out_strides[0] + n * args.out_strides[1];
        for (int64_t h = 0; h < args.heads; ++h) {
          if (args.interleaved) {
            row.template rotate_interleaved<Stream>(x + h * args.x_strides[2], out + h * args.out_strides[2]);
          } else {
            row.template rotate_halves<Stream>(x + h * args.x_strides[2], out + h * args.out_strides[2]);
          }
        }
      }
      if (n + 1 < end) row.advance();
    }
    if constexpr (Stream) stream_fence();
  });
}

template <class T>
bool can_stream(const RopeArgs& args) {
  const int64_t bytes = args.batch * args.tokens * args.heads * args.dim * int64_t(sizeof(T));
  // Every vector must start aligned; half a head is the distance of two vectors in half-split pairing.
  uint64_t offsets = reinterpret_cast<uint64_t>(args.out) | uint64_t(args.dim / 2) * sizeof(T);
  for (const int64_t stride : args.out_strides) offsets |= uint64_t(stride) * sizeof(T);
  return bytes >= stream_threshold() && args.out != args.x && offsets % (kLanes<compute_t<T>> * sizeof(T)) == 0;
}

}  // namespace

void rope3d(const RopeArgs& args) {
  dispatch_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    can_stream<T>(args) ? run<T, true>(args) : run<T, false>(args);
  });
}

}  // namespace td::TD_ISA
