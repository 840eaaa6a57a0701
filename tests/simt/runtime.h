// SPDX-License-Identifier: Apache-2.0
// What the tests set.
#pragma once

namespace simt {

// Order of threads and blocks between waits. A program without races gives the same result under all of them.
enum class Schedule { ascending, descending, shuffled };
void set_schedule(Schedule schedule);

}  // namespace simt
