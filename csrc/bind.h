// SPDX-License-Identifier: Apache-2.0
// What every csrc/bind_<op>.cpp needs: tensors from Python, checks, and a place to register functions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <vector>

#include "core/kernel.h"
#include "dlpack.h"

namespace td {

using Registrar = void (*)(pybind11::module_&);
std::vector<Registrar>& registrars();

// Python checks arguments with messages for people (talkingdit/ops/_checks.py). These guard memory when somebody calls
// the native function directly.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << parts);
  throw pybind11::value_error(text.str());
}

inline void check_view(const TensorView& view, int ndim, const char* op, const char* name) {
  check(view.ndim == ndim, op, ": ", name, " must have ", ndim, " dimensions, got ", view.ndim);
  check(view.dtype != DType::unsupported, op, ": ", name, " has an unsupported dtype");
  check(ndim == 0 || view.numel() == 0 || view.shape[ndim - 1] <= 1 || view.strides[ndim - 1] == 1, op, ": ", name,
        " must be contiguous on its last axis");
}

inline void check_same_device(const TensorView& a, const TensorView& b, const char* op, const char* name) {
  check(a.is_cuda == b.is_cuda && a.device_index == b.device_index, op, ": ", name, " is on another device");
}

// Will CUDA kernels run on it? Also in the emulation of tests, where they run on tensors of the host.
inline bool on_gpu(const TensorView& view) {
#if defined(TD_EMULATE)
  return true;
#else
  return view.is_cuda;
#endif
}

}  // namespace td

// TD_BINDINGS(rope3d) { m.def("rope3d", ...); } at namespace td scope, once per file.
#define TD_BINDINGS(name)                                                            \
  static void bind_##name(pybind11::module_& m);                                     \
  static const bool registered_##name = (registrars().push_back(bind_##name), true); \
  static void bind_##name(pybind11::module_& m)
