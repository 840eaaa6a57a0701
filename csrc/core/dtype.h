// SPDX-License-Identifier: Apache-2.0
// Element types: storage types with conversions that work on the host and on the device, and dispatch on a run-time
// tag.
#pragma once

#include <cstring>
#include <type_traits>

#include "core/macros.h"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace td {

enum class DType : int { float32, float64, bfloat16, float16, int32, int64, uint8, boolean, unsupported };

inline int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64:
      return 8;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::bfloat16:
    case DType::float16:
      return 2;
    default:
      return 1;
  }
}

TD_HD uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

TD_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Brain float: the upper half of a float32, rounded to nearest even.
struct bf16 {
  uint16_t bits;
  bf16() = default;
  TD_HD explicit bf16(float value) {
#if defined(__CUDA_ARCH__)
    bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    const uint32_t word = float_bits(value);
    const bool is_nan = (word & 0x7fffffffu) > 0x7f800000u;
    bits = is_nan ? uint16_t((word >> 16) | 0x40u) : uint16_t((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
#endif
  }
  TD_HD operator float() const { return bits_float(uint32_t(bits) << 16); }
};

// IEEE half precision, rounded to nearest even.
struct fp16 {
  uint16_t bits;
  fp16() = default;
  TD_HD explicit fp16(float value) {
#if defined(__CUDA_ARCH__)
    bits = __half_as_ushort(__float2half_rn(value));
#elif defined(__F16C__)
    bits = uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
    const uint32_t word = float_bits(value), magnitude = word & 0x7fffffffu;
    const uint16_t sign = uint16_t((word >> 16) & 0x8000u);
    if (magnitude > 0x7f800000u) {  // NaN
      bits = uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
      bits = uint16_t(sign | 0x7c00u);
    } else if (magnitude < 0x38800000u) {  // subnormal half: let the float adder do the rounding
      bits = uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
    } else {
      bits = uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
    }
#endif
  }
  TD_HD operator float() const {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#elif defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    // 2^112 moves the exponent from the half's bias to the float's and normalises subnormals on the way.
    const float shifted = bits_float(magnitude << 13) * bits_float(0x77800000u);
    return bits_float(sign | float_bits(shifted));
#endif
  }
};

// Arithmetic type of a storage type: float for everything but double.
template <class T>
struct compute_of {
  using type = float;
};
template <>
struct compute_of<double> {
  using type = double;
};
template <class T>
using compute_t = typename compute_of<T>::type;

template <class T>
struct type_tag {
  using type = T;
};

// Calls fn(type_tag<T>{}) with the storage type of a dtype that computes in float; false when it is not one.
template <class F>
bool dispatch_narrow(DType dtype, F&& fn) {
  switch (dtype) {
    case DType::float32:
      fn(type_tag<float>{});
      return true;
    case DType::bfloat16:
      fn(type_tag<bf16>{});
      return true;
    case DType::float16:
      fn(type_tag<fp16>{});
      return true;
    default:
      return false;
  }
}

// The same with double among them.
template <class F>
bool dispatch_float(DType dtype, F&& fn) {
  if (dtype != DType::float64) return dispatch_narrow(dtype, fn);
  fn(type_tag<double>{});
  return true;
}

}  // namespace td
