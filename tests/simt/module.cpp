// SPDX-License-Identifier: Apache-2.0
// The module that tests use in place of talkingdit._native: the same bindings, CUDA kernels compiled for the host.
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "bind.h"
#include "runtime.h"

namespace td {

std::vector<Registrar>& registrars() {
  static std::vector<Registrar> list;
  return list;
}

// Memory of which the pages around it cannot be touched. It ends where the last page does (as far as the alignment
// allows) and is filled with 0xff: not a number in every floating type, and no valid index.
class GuardedMemory {
 public:
  GuardedMemory(size_t bytes, size_t alignment) : bytes_(bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), inner = (bytes + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(memory);
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + inner, page, PROT_NONE);
    begin_ = base_ + page + (inner - bytes) / alignment * alignment;
    if (bytes < kPoisoned) std::memset(base_ + page, 0xff, inner);
  }
  ~GuardedMemory() { munmap(base_, mapped_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  pybind11::buffer_info buffer() {
    return pybind11::buffer_info(begin_, 1, pybind11::format_descriptor<uint8_t>::format(), pybind11::ssize_t(bytes_));
  }
  // The few bytes between the end and the page that guards it.
  bool intact() const {
    const char* end = begin_ + bytes_;
    for (const char* at = end; reinterpret_cast<uintptr_t>(at) % uintptr_t(sysconf(_SC_PAGESIZE)) != 0; ++at) {
      if (*at != char(0xff)) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kPoisoned = 64 << 20;  // larger memory stays untouched, and unbacked
  char *base_, *begin_;
  size_t bytes_, mapped_;
};

}  // namespace td

PYBIND11_MODULE(_simt, m) {
  namespace py = pybind11;
  py::class_<td::GuardedMemory>(m, "GuardedMemory", py::buffer_protocol())
      .def(py::init<size_t, size_t>())
      .def_buffer(&td::GuardedMemory::buffer)
      .def("intact", &td::GuardedMemory::intact);
  py::enum_<simt::Schedule>(m, "Schedule")
      .value("ascending", simt::Schedule::ascending)
      .value("descending", simt::Schedule::descending)
      .value("shuffled", simt::Schedule::shuffled);
  m.def("set_schedule", &simt::set_schedule);
  m.def("set_shared_limit", [](int bytes) { simt::shared_limit = bytes; });
  m.def("set_contexts",
        [](bool first, bool second, int current) { simt::contexts = simt::Contexts{{first, second}, current}; });
  // Contexts that there are, and the device that is current: while a guard of `device` lives, and afterwards.
  m.def("guard", [](int device) {
    const auto state = [] {
      return py::make_tuple(simt::contexts.made[0], simt::contexts.made[1], simt::contexts.current);
    };
    py::tuple inside;
    {
      const td::DeviceGuard guard(device);
      inside = state();
    }
    return py::make_tuple(inside, state());
  });
  m.def("advise_huge_pages", [](py::object) {});
  for (const td::Registrar bind : td::registrars()) bind(m);
}
