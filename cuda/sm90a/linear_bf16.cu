// SPDX-License-Identifier: Apache-2.0
#include "product.cuh"

namespace td::cuda::sm90 {

void linear_bf16(const Sm90ProductArgs& args, cudaStream_t stream) {
  Product<cutlass::bfloat16_t, cutlass::bfloat16_t, true>::run(args, stream);
}

}  // namespace td::cuda::sm90
