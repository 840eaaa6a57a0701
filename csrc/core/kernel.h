// SPDX-License-Identifier: Apache-2.0
// How an op's kernels are declared and called: one namespace per instruction set, one for CUDA.
#pragma once

#include "core/tensor.h"

struct CUstream_st;

namespace td {

using Stream = CUstream_st*;  // the same type as cudaStream_t, without CUDA's headers

enum class Isa : int { baseline, avx2, avx512, avx512_bf16 };

// Instruction set in use: the best that was built and the CPU has, or TALKINGDIT_CPU_ISA. Decided once.
Isa cpu_isa();
const char* isa_name(Isa isa);

[[noreturn]] void fail_no_cuda(const char* op);
// Makes `device` current for the lifetime of the object (CUDA builds only), and makes no context on any other.
struct DeviceGuard {
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* previous_;  // context
  bool switched_;
};

}  // namespace td

// TD_DECLARE_KERNEL(rope3d, const RopeArgs&) in an op's core header declares td::<isa>::rope3d(args) for every
// instruction set and td::cuda::rope3d(args, stream). Write inside namespace td.
#define TD_DECLARE_KERNEL(name, ...) \
  namespace baseline {               \
  void name(__VA_ARGS__);            \
  }                                  \
  namespace avx2 {                   \
  void name(__VA_ARGS__);            \
  }                                  \
  namespace avx512 {                 \
  void name(__VA_ARGS__);            \
  }                                  \
  namespace avx512_bf16 {            \
  void name(__VA_ARGS__);            \
  }                                  \
  namespace cuda {                   \
  void name(__VA_ARGS__, Stream);    \
  }

// TD_CALL(rope3d, view, args): runs the kernel where `view` lives. Write inside namespace td.
#define TD_CALL(name, view, args)     \
  do {                                \
    if ((view).is_cuda) {             \
      TD_CALL_CUDA(name, view, args); \
    } else {                          \
      TD_CALL_CPU(name, args);        \
    }                                 \
  } while (0)

#if defined(TD_CUDA)
#define TD_CALL_CUDA(name, view, args)                                \
  do {                                                                \
    ::td::DeviceGuard guard((view).device_index);                     \
    ::td::cuda::name(args, static_cast<::td::Stream>((view).stream)); \
  } while (0)
#else
#define TD_CALL_CUDA(name, view, args) ::td::fail_no_cuda(#name)
#endif

#if defined(TD_EMULATE)
// A build for tests without a GPU: CUDA kernels, compiled for the host, run on the tensors of the host.
#define TD_CALL_CPU(name, args) ::td::cuda::name(args, nullptr)
#elif defined(TD_X86)
#define TD_CALL_CPU(name, args)      \
  switch (::td::cpu_isa()) {         \
    case ::td::Isa::avx512_bf16:     \
      ::td::avx512_bf16::name(args); \
      break;                         \
    case ::td::Isa::avx512:          \
      ::td::avx512::name(args);      \
      break;                         \
    case ::td::Isa::avx2:            \
      ::td::avx2::name(args);        \
      break;                         \
    default:                         \
      ::td::baseline::name(args);    \
  }
#else
#define TD_CALL_CPU(name, args) ::td::baseline::name(args)
#endif
