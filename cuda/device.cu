// SPDX-License-Identifier: Apache-2.0
#include "launch.cuh"

namespace td {

DeviceGuard::DeviceGuard(int device) : previous_(-1) {
  int current = 0;
  check_cuda(cudaGetDevice(&current), "cudaGetDevice");
  if (current != device) {
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    previous_ = current;
  }
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

}  // namespace td
