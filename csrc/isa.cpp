// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "core/kernel.h"

namespace td {
namespace {

Isa best_isa() {
#if defined(TD_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* text = std::getenv("TALKINGDIT_CPU_ISA");
  if (text == nullptr || *text == '\0') return best;
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
    if (std::string(text) != isa_name(isa)) continue;
    if (isa > best) {
      throw std::invalid_argument(std::string("TALKINGDIT_CPU_ISA: this CPU or build has no ") + text +
                                  ", the best is " + isa_name(best));
    }
    return isa;
  }
  throw std::invalid_argument(std::string("TALKINGDIT_CPU_ISA: expected baseline, avx2, avx512 or avx512_bf16, got '") +
                              text + "'");
}

}  // namespace

const char* isa_name(Isa isa) {
  static const char* const names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  return names[int(isa)];
}

Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

void fail_no_cuda(const char* op) {
  throw std::runtime_error(
      std::string(op) +
      ": got a CUDA tensor, but talkingdit was built without CUDA kernels. Reinstall it with nvcc on "
      "PATH and TALKINGDIT_CUDA=on.");
}

}  // namespace td
