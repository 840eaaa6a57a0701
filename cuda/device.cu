// SPDX-License-Identifier: Apache-2.0
// The current device for the time of a launch. What was current before is a context, and it is a context that is put
// back: cudaSetDevice would make one on a device that this process has never used, some hundred megabytes of it.
#include "launch.cuh"

namespace td {
namespace {

using Context = struct CUctx_st*;

// Functions of the driver, found at run time: the module loads without one.
struct Driver {
  int (*current)(Context*);      // cuCtxGetCurrent
  int (*device)(int*);           // cuCtxGetDevice: that of the current context
  int (*make_current)(Context);  // cuCtxSetCurrent

  Driver() {
    find("cuCtxGetCurrent", current);
    find("cuCtxGetDevice", device);
    find("cuCtxSetCurrent", make_current);
  }

 private:
  template <class Function>
  static void find(const char* name, Function& function) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &result), name);
#else
    check_cuda(cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &result), name);
#endif
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error(std::string(name) + ": not in this driver");
    function = reinterpret_cast<Function>(entry);
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

void check_driver(int status, const char* what) {
  if (status != 0) throw std::runtime_error(std::string(what) + ": driver error " + std::to_string(status));
}

}  // namespace

DeviceGuard::DeviceGuard(int device) : previous_(nullptr), switched_(false) {
  Context context = nullptr;
  check_driver(driver().current(&context), "cuCtxGetCurrent");
  int current = -1;
  if (context != nullptr) check_driver(driver().device(&current), "cuCtxGetDevice");
  if (current == device) return;
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  previous_ = context;
  switched_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (switched_) driver().make_current(static_cast<Context>(previous_));
}

}  // namespace td
