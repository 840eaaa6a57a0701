// SPDX-License-Identifier: Apache-2.0
#include "core/host_table.h"

#include <algorithm>

namespace td::TD_ISA {

void host_table(const TableArgs& args) {
  std::copy(args.words, args.words + args.count, args.out);
}

}  // namespace td::TD_ISA
