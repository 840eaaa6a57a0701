// SPDX-License-Identifier: Apache-2.0
// Memory for large results on the CPU. The C library hands large blocks back to the system when they are freed, and
// the next result pays for the pages again: zeroing them costs as much as writing a result. Here freed blocks are kept,
// within bounds, and given out again. Tensors own their block through DLPack.
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <array>
#include <mutex>
#include <utility>

#include "bind.h"

namespace py = pybind11;

namespace td {
namespace {

#if defined(__linux__)

constexpr size_t kHugePage = size_t(2) << 20;

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};

void* map_block(size_t bytes) {
  // Aligned to huge pages, so that all of it can be made of them.
  void* got = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) return nullptr;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(got);
  const uintptr_t data = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (data > begin) munmap(got, data - begin);
  const uintptr_t end = begin + bytes + kHugePage;
  if (end > data + bytes) munmap(reinterpret_cast<void*>(data + bytes), end - data - bytes);
#if defined(MADV_HUGEPAGE)
  madvise(reinterpret_cast<void*>(data), bytes, MADV_HUGEPAGE);
#endif
  return reinterpret_cast<void*>(data);
}

// Blocks that were freed, the latest first. Never destroyed: tensors may outlive every static object.
class Stock {
 public:
  static constexpr int kBlocks = 32;

  Stock() : most_(size_t(sysconf(_SC_PHYS_PAGES)) / 32 * size_t(sysconf(_SC_PAGESIZE))) {}

  Block take(size_t wanted) {
    const size_t bytes = (wanted + kHugePage - 1) / kHugePage * kHugePage;
    {
      // Whoever does not get the lock at once, or was forked while it was held, does without the stock.
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      for (int i = 0; lock.owns_lock() && i < kBlocks; ++i) {
        if (blocks_[i].bytes >= bytes && blocks_[i].bytes <= bytes + bytes / 4) return remove(i);
      }
    }
    return Block{map_block(bytes), bytes};
  }

  void give(Block block) {
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock.owns_lock() && block.bytes <= most_) {
        for (int i = kBlocks - 1; i >= 0; --i) {
          if (blocks_[i].data != nullptr && (i == kBlocks - 1 || held_ + block.bytes > most_)) release(remove(i));
        }
        for (int i = kBlocks - 1; i > 0; --i) blocks_[i] = blocks_[i - 1];
        blocks_[0] = std::exchange(block, Block{});
        held_ += blocks_[0].bytes;
      }
    }
    release(block);
  }

 private:
  Block remove(int index) {
    const Block found = blocks_[index];
    for (int i = index; i + 1 < kBlocks; ++i) blocks_[i] = blocks_[i + 1];
    blocks_[kBlocks - 1] = Block{};
    held_ -= found.bytes;
    return found;
  }
  static void release(const Block& block) {
    if (block.data != nullptr) munmap(block.data, block.bytes);
  }

  std::mutex mutex_;
  std::array<Block, kBlocks> blocks_;
  const size_t most_;
  size_t held_ = 0;
};

Stock& stock() {
  static Stock* only = new Stock();
  return *only;
}

struct Managed {
  dlpack::ManagedTensor tensor;
  Block block;
  std::array<int64_t, kMaxDims> shape;
};

void free_managed(dlpack::ManagedTensor* tensor) {
  Managed* managed = static_cast<Managed*>(tensor->context);
  stock().give(managed->block);
  delete managed;
}

// A DLPack capsule of an uninitialised contiguous tensor.
py::object fresh_result(const std::vector<int64_t>& shape, int code, int bits) {
  check(shape.size() <= size_t(kMaxDims), "fresh_result: at most 8 dimensions");
  size_t bytes = size_t(bits) / 8;
  for (const int64_t size : shape) bytes *= size_t(size);
  check(bytes > 0, "fresh_result: the tensor is empty");
  const Block block = stock().take(bytes);
  if (block.data == nullptr) throw std::bad_alloc();
  auto* managed = new Managed{};
  managed->block = block;
  std::copy(shape.begin(), shape.end(), managed->shape.begin());
  dlpack::Tensor& tensor = managed->tensor.tensor;
  tensor.data = block.data;
  tensor.device = {1, 0};
  tensor.ndim = int32_t(shape.size());
  tensor.dtype = {uint8_t(code), uint8_t(bits), 1};
  tensor.shape = managed->shape.data();
  managed->tensor.context = managed;
  managed->tensor.deleter = free_managed;
  return py::reinterpret_steal<py::object>(PyCapsule_New(&managed->tensor, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // a tensor owns it now
    auto* owned = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    owned->deleter(owned);
  }));
}

#else

py::object fresh_result(const std::vector<int64_t>&, int, int) {
  return py::none();
}

#endif

}  // namespace

TD_BINDINGS(results) {
  m.def("fresh_result", &fresh_result);
}

}  // namespace td
