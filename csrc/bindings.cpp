// SPDX-License-Identifier: Apache-2.0
// The module talkingdit._native. Ops register themselves from bind_<op>.cpp.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "core/parallel.h"

namespace py = pybind11;

namespace td {

std::vector<Registrar>& registrars() {
  static std::vector<Registrar> list;
  return list;
}

namespace {

py::dict build_info() {
  py::dict info;
  info["cpu_isa"] = isa_name(cpu_isa());
#if defined(TD_X86)
  info["cpu_isa_built"] = py::make_tuple("baseline", "avx2", "avx512", "avx512_bf16");
#else
  info["cpu_isa_built"] = py::make_tuple("baseline");
#endif
#if defined(TD_CUDA)
  info["cuda"] = true;
  info["cuda_archs"] = TD_CUDA_ARCHS;
  info["cuda_toolkit"] = TD_CUDA_TOOLKIT;
#else
  info["cuda"] = false;
  info["cuda_archs"] = py::none();
  info["cuda_toolkit"] = py::none();
#endif
#if defined(TD_CUTLASS)
  info["cutlass"] = true;  // kernels for compute capability 9.0
#else
  info["cutlass"] = false;
#endif
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["threads"] = max_threads();
  info["threading"] = threading_runtime();
  return info;
}

}  // namespace
}  // namespace td

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU and CUDA kernels of talkingdit. Use talkingdit.ops.";
  td::cpu_isa();  // a wrong TALKINGDIT_CPU_ISA is an error at import
  m.def("build_info", &td::build_info);
  m.def("stream_threshold", &td::stream_threshold);
  for (const td::Registrar bind : td::registrars()) bind(m);
}
