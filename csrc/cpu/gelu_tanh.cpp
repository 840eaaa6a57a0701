// SPDX-License-Identifier: Apache-2.0
#include "core/gelu_tanh.h"

#include "core/parallel.h"
#include "cpu/vec_math.h"

namespace td::TD_ISA {
namespace {

constexpr int64_t kBlock = 2048;   // elements of a row that are one piece of work
constexpr int64_t kPerThread = 8;  // pieces worth a thread of their own

template <class T>
void run(const GeluTanhArgs& args) {
  const int64_t blocks = (args.dim + kBlock - 1) / kBlock;
  parallel_for(args.rows * blocks, args.dim < kBlock ? kPerThread * kBlock / args.dim : kPerThread,
               [&](int64_t begin, int64_t end) {
                 for (int64_t piece = begin; piece < end; ++piece) {
                   const int64_t row = piece / blocks, at = (piece - row * blocks) * kBlock;
                   const int count = int(args.dim - at < kBlock ? args.dim - at : kBlock);
                   const T* x = static_cast<const T*>(args.x) + row * args.x_stride + at;
                   T* out = static_cast<T*>(args.out) + row * args.out_stride + at;
                   if (args.grad == nullptr) {
                     for_vectors<float>(count, [&](int i, auto part) { put(out + i, gelu(load(x + i, part)), part); });
                   } else {
                     const T* grad = static_cast<const T*>(args.grad) + row * args.grad_stride + at;
                     for_vectors<float>(count, [&](int i, auto part) {
                       put(out + i, load(grad + i, part) * gelu_slope(load(x + i, part)), part);
                     });
                   }
                 }
               });
}

}  // namespace

void gelu_tanh(const GeluTanhArgs& args) {
  dispatch_narrow(args.dtype, [&](auto tag) { run<typename decltype(tag)::type>(args); });
}

}  // namespace td::TD_ISA
