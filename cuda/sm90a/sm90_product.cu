// SPDX-License-Identifier: Apache-2.0
#include "product.h"

#include <stdexcept>

namespace td::cuda {

void sm90_product(const Sm90ProductArgs& args, Stream stream) {
  if (args.dtype != DType::bfloat16) throw std::runtime_error("sm90_product: a must be bfloat16");
  if (args.b_transposed) return sm90::linear_bf16(args, stream);
  if (args.result_dtype == DType::float32) return sm90::frame_bf16_float(args, stream);
  sm90::frame_bf16(args, stream);
}

}  // namespace td::cuda
