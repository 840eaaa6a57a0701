// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// TD_HD marks a function that runs on the host and on the device. It is always inlined: CPU kernels are compiled
// several times for different instruction sets, and an out-of-line copy could be shared between them by the linker.
#if defined(__CUDACC__)
#define TD_HD __host__ __device__ __forceinline__
#else
#define TD_HD inline __attribute__((always_inline))
#endif

#define TD_INLINE inline __attribute__((always_inline))
#define TD_RESTRICT __restrict__
