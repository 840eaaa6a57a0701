// SPDX-License-Identifier: Apache-2.0
// V neighbouring elements as they are in memory, moved in accesses of up to 16 bytes and unpacked only when they are
// used: half the registers for 16-bit types.
#pragma once

#include "core/dtype.h"
#include "launch.cuh"

namespace td::cuda {

// The number of elements that make one access of 16 bytes.
template <class T>
constexpr int kFullVector = 16 / int(sizeof(T));

template <class T, int V>
struct Vector {
  using C = compute_t<T>;
  static constexpr int kBytes = V * int(sizeof(T)), kWords = (kBytes + 3) / 4;
  static_assert(kBytes % 16 == 0 || kBytes == 8 || kBytes == 4 || kBytes == 2, "whole accesses only");
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const T* source) {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 part = reinterpret_cast<const uint4*>(source)[i];
        words[4 * i] = part.x;
        words[4 * i + 1] = part.y;
        words[4 * i + 2] = part.z;
        words[4 * i + 3] = part.w;
      }
    } else if constexpr (kBytes == 8) {
      const uint2 part = *reinterpret_cast<const uint2*>(source);
      words[0] = part.x;
      words[1] = part.y;
    } else if constexpr (kBytes == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(source);
    } else {
      words[0] = *reinterpret_cast<const uint16_t*>(source);
    }
  }

  __device__ __forceinline__ void store(T* target) const {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        reinterpret_cast<uint4*>(target)[i] = uint4{words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
      }
    } else if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(target) = uint2{words[0], words[1]};
    } else if constexpr (kBytes == 4) {
      *reinterpret_cast<uint32_t*>(target) = words[0];
    } else {
      *reinterpret_cast<uint16_t*>(target) = uint16_t(words[0]);
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }

  // Element i, which must be known when the loop around it is unrolled.
  __device__ __forceinline__ C get(int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return bits_float(words[i]);
    } else if constexpr (std::is_same_v<T, double>) {
      return bits_double(uint64_t(words[2 * i + 1]) << 32 | words[2 * i]);
    } else if constexpr (std::is_same_v<T, bf16>) {
      return bits_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    } else {
      fp16 half;
      half.bits = uint16_t(i % 2 == 0 ? words[i / 2] : words[i / 2] >> 16);
      return float(half);
    }
  }

  __device__ __forceinline__ void set(const C (&values)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        words[i] = float_bits(values[i]);
      } else if constexpr (std::is_same_v<T, double>) {
        const uint64_t bits = double_bits(values[i]);
        words[2 * i] = uint32_t(bits);
        words[2 * i + 1] = uint32_t(bits >> 32);
      } else if (i % 2 == 0) {
        words[i / 2] = i + 1 < V ? pair(values[i], values[i + 1 < V ? i + 1 : i]) : uint32_t(T(values[i]).bits);
      }
    }
  }

 private:
  // Two 16-bit elements: rounded together in one instruction where there is one.
  static __device__ __forceinline__ uint32_t pair(C low, C high) {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, bf16>) {
      const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
      return reinterpret_cast<const uint32_t&>(both);
    } else {
      const __half2 both = __floats2half2_rn(low, high);
      return reinterpret_cast<const uint32_t&>(both);
    }
#else
    return uint32_t(T(low).bits) | uint32_t(T(high).bits) << 16;
#endif
  }
  static __device__ __forceinline__ uint64_t double_bits(double value) {
#if defined(__CUDA_ARCH__)
    return uint64_t(__double_as_longlong(value));
#else
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
  }
  static __device__ __forceinline__ double bits_double(uint64_t bits) {
#if defined(__CUDA_ARCH__)
    return __longlong_as_double(int64_t(bits));
#else
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
  }
};

// May tensors with these addresses and strides (in elements) be read in accesses of 16 bytes?
inline bool aligned_rows(const void* data, const int64_t* strides, int count, size_t item) {
  uint64_t bytes = reinterpret_cast<uint64_t>(data);
  for (int i = 0; i < count; ++i) bytes |= uint64_t(strides[i]) * item;
  return bytes % 16 == 0;
}

}  // namespace td::cuda
