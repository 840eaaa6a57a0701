// SPDX-License-Identifier: Apache-2.0
// The instantiations of product.cuh, one file each, for who calls them without CUTLASS's headers.
#pragma once

#include "core/sm90_product.h"

namespace td::cuda::sm90 {

void frame_bf16(const Sm90ProductArgs& args, Stream stream);        // result of bfloat16
void frame_bf16_float(const Sm90ProductArgs& args, Stream stream);  // result of float32
void linear_bf16(const Sm90ProductArgs& args, Stream stream);       // b transposed

}  // namespace td::cuda::sm90
