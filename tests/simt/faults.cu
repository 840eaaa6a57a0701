// SPDX-License-Identifier: Apache-2.0
// Kernels with one mistake each, and one without: what the emulation must notice (test_emulation.py).
#include <pybind11/pybind11.h>

#include "bind.h"
#include "launch.cuh"

namespace td {
namespace {

constexpr int kThreads = 64;

// Sums of 64 numbers through shared memory. `fault` says what is wrong.
__global__ void faulty_kernel(const float* x, float* out, int n, int fault) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int i = int(threadIdx.x);
  if (fault == 2 && i == 5) x += n;                                      // reads behind the end
  if (fault == 3 && i == 5) out += n;                                    // writes behind the end
  if (fault == 4 && i == 5) shared += n;                                 // leaves shared memory
  if (fault == 5) shared[0] = reinterpret_cast<const uint4*>(x + 1)->x;  // misaligned
  if (fault == 6 && i == 5) return;                                      // lanes wait for one that has ended
  if (fault == 7 && i > 40) __syncthreads();
  if (fault == 1) {  // what others write is read too early
    shared[i] = 0.0f;
    __syncthreads();
  }
  shared[i] = x[i];
  if (fault != 1) __syncthreads();  // 1: what others write is read too early
  float sum = shared[(i + 1) % n] + shared[(i + n - 1) % n];
  if (fault == 8 && i < 7) sum = __shfl_sync(0xffffffffu, sum, 0);
  if (fault == 9) sum += float(2147483647 + i - 60);  // an index that leaves 32 bits
  out[i] = warp_sum(sum);
}

void run_faulty(const TensorView& x, const TensorView& out, int fault) {
  const int threads = fault == 10 ? 1056 : kThreads;
  const size_t shared = fault == 11 ? (228 << 10) : kThreads * sizeof(float);
  const dim3 blocks(1, fault == 12 ? 65536 : 1);
  launch("faulty", faulty_kernel, blocks, threads, shared, nullptr, static_cast<const float*>(x.data),
         static_cast<float*>(out.data), kThreads, fault);
}

}  // namespace

TD_BINDINGS(faults) {
  m.def("run_faulty", &run_faulty);
}

}  // namespace td
