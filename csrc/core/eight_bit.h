// SPDX-License-Identifier: Apache-2.0
// Rows in eight bits: value = scale * code, one scale per row. The contract is in talkingdit/ops/eight_bit.py.
#pragma once

#include <cmath>

#include "core/kernel.h"

namespace td {

enum class EightBit : int { none, int8, float8 };  // float8 is e4m3 without infinities

constexpr float kLargestInt8 = 127.0f, kLargestFloat8 = 448.0f;
constexpr float kLeastMagnitude = 1e-30f;  // a row of smaller numbers is scaled as if this were its largest

// Rows [B, N, dim] of codes and their scales [B, N], for kernels that make them of values that they have.
struct CodeRows {
  uint8_t* data;  // null: there are none
  float* scales;
  int64_t batch_stride, token_stride, scale_batch_stride, scale_token_stride;
  EightBit kind;
  bool exact;  // values are first rounded to the type that an unfused op would have stored
};

// The bits of |value|: ordered like magnitudes, with NaN on top, so that a NaN in a row is not lost.
TD_HD uint32_t magnitude_bits(float value) {
  return float_bits(value) & 0x7fffffffu;
}

// Of a row whose largest magnitude has these bits: code = rounded(value * factor), value = code * scale.
struct RowScale {
  float factor, scale;
  TD_HD RowScale(uint32_t largest_bits, EightBit kind) {
    const float found = bits_float(largest_bits), most = kind == EightBit::int8 ? kLargestInt8 : kLargestFloat8;
    const float largest = found < kLeastMagnitude ? kLeastMagnitude : found;  // NaN stays
    factor = most / largest;
    scale = largest / most;
  }
};

// e4m3 of a number, to nearest even, the largest instead of anything larger.
TD_HD uint32_t float8_code(float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
  uint32_t code;
  if (magnitude < 0x3c800000u) {  // below 2^-6 codes are multiples of 2^-9, as numbers are above 2^14
    code = float_bits(bits_float(magnitude) + 16384.0f) - 0x46800000u;
  } else {
    code = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
    if (code > 0x7eu) code = magnitude > 0x7f800000u ? 0x7fu : 0x7eu;
  }
  return sign | code;
}

TD_HD uint32_t int8_code(float value) {
#if defined(__CUDA_ARCH__)
  const int code = __float2int_rn(value);
#else
  const int code = value != value ? 0
                                  : int(std::nearbyint(value > 127.0f    ? 127.0f
                                                       : value < -127.0f ? -127.0f
                                                                         : value));
#endif
  return uint32_t(code > 127 ? 127 : code < -127 ? -127 : code) & 0xffu;
}

TD_HD uint32_t code_of(float value, EightBit kind) {
  return kind == EightBit::int8 ? int8_code(value) : float8_code(value);
}

// x [rows, dim] -> codes; first through the activation, if there is one, and, to be exact, rounded to the type of x.
struct QuantiseRowsArgs {
  const void* x;
  int64_t rows, dim, x_stride;
  CodeRows codes;  // one sample of `rows` tokens
  DType dtype;
  bool gelu;  // x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2
};

// out = sums * row scale * column scale + bias
struct RescaleArgs {
  const int32_t* sums;                           // [rows, columns], contiguous
  const float *row_scale, *column_scale, *bias;  // [rows], [columns], [columns] or null
  void* out;                                     // [rows, columns], contiguous
  int64_t rows, columns;
  DType dtype;
};

constexpr int64_t kMaxEightBitDim = 1 << 16;

TD_DECLARE_KERNEL(quantise_rows, const QuantiseRowsArgs&)
TD_DECLARE_KERNEL(rescale, const RescaleArgs&)

}  // namespace td
