// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "bind.h"
#include "core/host_table.h"

namespace td {
namespace {

void host_table_run(const TensorView& out, const TensorView& values) {
  for (const TensorView* view : {&out, &values}) {
    check_view(*view, 1, "host_table", "a table");
    check(view->dtype == DType::int64, "host_table: tables must be int64");
  }
#if !defined(TD_EMULATE)  // there, every tensor passes for one of the device
  check(!values.is_cuda, "host_table: values must be on the host");
#endif
  check(out.shape[0] == values.shape[0], "host_table: tables must have one length");
  const int64_t* from = static_cast<const int64_t*>(values.data);
  for (int64_t begin = 0; begin < out.shape[0]; begin += kTableWords) {
    TableArgs args{};
    args.out = static_cast<int64_t*>(out.data) + begin;
    args.count = int(std::min<int64_t>(kTableWords, out.shape[0] - begin));
    std::copy(from + begin, from + begin + args.count, args.words);
    TD_CALL(host_table, out, args);
  }
}

}  // namespace

TD_BINDINGS(host_table) {
  m.def("host_table", &host_table_run);
}

}  // namespace td
