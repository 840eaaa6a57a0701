// SPDX-License-Identifier: Apache-2.0
// TensorView: a borrowed tensor, as it arrives from Python. Kernels get plain numbers taken from it.
#pragma once

#include "core/dtype.h"

namespace td {

constexpr int kMaxDims = 8;

struct TensorView {
  void* data = nullptr;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements
  int ndim = 0;
  DType dtype = DType::unsupported;
  bool is_cuda = false;
  int device_index = 0;
  void* stream = nullptr;  // the framework's current stream of the device; null on the CPU

  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }
};

// Division by a constant that is known at launch: one multiplication and one shift, for 0 <= n < 2^31.
struct FastDiv {
  uint32_t divisor, multiplier, shift;
  FastDiv() = default;
  explicit FastDiv(uint32_t d) : divisor(d), multiplier(0), shift(0) {
    while (shift < 31 && (uint32_t(1) << shift) < d) ++shift;
    multiplier = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d)) / d + 1);
  }
  TD_HD uint32_t div(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    const uint32_t high = __umulhi(n, multiplier);
#else
    const uint32_t high = uint32_t((uint64_t(n) * multiplier) >> 32);
#endif
    return (high + n) >> shift;
  }
};

}  // namespace td
