// SPDX-License-Identifier: Apache-2.0
// A small table of the host, put into device memory by a kernel's parameters: no copy engine, no synchronisation, and a
// CUDA graph that captures it holds the values itself.
#pragma once

#include "core/kernel.h"

namespace td {

constexpr int kTableWords = 480;  // a launch has 4 KB of parameters

struct TableArgs {
  int64_t* out;
  int count;
  int64_t words[kTableWords];
};

TD_DECLARE_KERNEL(host_table, const TableArgs&)

}  // namespace td
