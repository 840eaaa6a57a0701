// SPDX-License-Identifier: Apache-2.0
// Codes and scales as they come from Python.
#pragma once

#include "bind.h"
#include "core/eight_bit.h"

namespace td {

inline EightBit eight_bit(const char* op, const std::string& kind) {
  check(kind == "int8" || kind == "fp8", op, ": kind must be int8 or fp8, got ", kind);
  return kind == "int8" ? EightBit::int8 : EightBit::float8;
}

// codes uint8 [B, N, dim], scales float32 [B, N].
inline CodeRows code_rows(const char* op, const TensorView& first, const TensorView& codes, const TensorView& scales,
                          const std::string& kind, bool exact) {
  check_view(codes, 3, op, "codes");
  check_view(scales, 2, op, "scales");
  check_same_device(codes, first, op, "codes");
  check_same_device(scales, first, op, "scales");
  check(codes.dtype == DType::uint8 && scales.dtype == DType::float32, op, ": codes must be uint8, scales float32");
  check(scales.shape[0] == codes.shape[0] && scales.shape[1] == codes.shape[1], op, ": scales do not fit codes");
  return CodeRows{static_cast<uint8_t*>(codes.data),
                  static_cast<float*>(scales.data),
                  codes.strides[0],
                  codes.strides[1],
                  scales.strides[0],
                  scales.strides[1],
                  eight_bit(op, kind),
                  exact};
}

}  // namespace td
