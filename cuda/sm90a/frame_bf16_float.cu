// SPDX-License-Identifier: Apache-2.0
#include "product.cuh"

namespace td::cuda::sm90 {

void frame_bf16_float(const Sm90ProductArgs& args, cudaStream_t stream) {
  Product<cutlass::bfloat16_t, float, false>::run(args, stream);
}

}  // namespace td::cuda::sm90
