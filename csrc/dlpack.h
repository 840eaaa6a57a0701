// SPDX-License-Identifier: Apache-2.0
// How tensors cross from Python: DLPack's C exchange API, as published at https://dmlc.github.io/dlpack (version 1.3).
// A tensor type offers a capsule `__dlpack_c_exchange_api__` with function pointers; one call fills a DLTensor that
// borrows the tensor's memory, shape and strides, another one names the framework's current stream. Nothing is owned or
// freed here, but for memory of our own that a tensor is made of (bind_results.cpp).
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "core/tensor.h"

namespace td::dlpack {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type;  // 1: CPU, 2: CUDA
  int32_t id;
};
struct DataType {
  uint8_t code;  // 0: int, 1: uint, 2: float, 4: bfloat, 6: bool
  uint8_t bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor* self);
};
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

inline const ExchangeApi* exchange_api(PyTypeObject* type) {
  // Types live as long as the process for all practical purposes, and the last one is nearly always the next one.
  static PyTypeObject* last_type = nullptr;
  static const ExchangeApi* last_api = nullptr;
  if (type == last_type) return last_api;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  while (api != nullptr && api->version.major > 1) api = api->previous;
  if (api == nullptr || api->tensor_from_object == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  last_type = type;
  last_api = api;
  return api;
}

inline DType dtype_of(const DataType& type) {
  if (type.lanes != 1) return DType::unsupported;
  switch (type.code * 256 + type.bits) {
    case 2 * 256 + 32:
      return DType::float32;
    case 2 * 256 + 64:
      return DType::float64;
    case 2 * 256 + 16:
      return DType::float16;
    case 4 * 256 + 16:
      return DType::bfloat16;
    case 0 * 256 + 32:
      return DType::int32;
    case 0 * 256 + 64:
      return DType::int64;
    case 1 * 256 + 8:
      return DType::uint8;
    case 6 * 256 + 8:
      return DType::boolean;
    default:
      return DType::unsupported;
  }
}

// False when `object` is no tensor. Throws when it is one that kernels cannot take.
inline bool view(PyObject* object, TensorView& out) {
  const ExchangeApi* api = exchange_api(Py_TYPE(object));
  if (api == nullptr) return false;
  Tensor tensor{};
  if (api->tensor_from_object(object, &tensor) != 0) throw pybind11::error_already_set();
  if (tensor.ndim > kMaxDims) {
    throw pybind11::value_error("tensor must have at most 8 dimensions, got " + std::to_string(tensor.ndim));
  }
  if (tensor.device.type != 1 && tensor.device.type != 2) {
    throw pybind11::value_error("tensor must be on the CPU or a CUDA device, got DLPack device type " +
                                std::to_string(tensor.device.type));
  }
  out.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  out.ndim = tensor.ndim;
  out.dtype = dtype_of(tensor.dtype);
  int64_t packed = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    out.shape[i] = tensor.shape[i];
    out.strides[i] = tensor.strides ? tensor.strides[i] : packed;
    packed *= tensor.shape[i];
  }
#if defined(TD_EMULATE)
  out.is_cuda = true;
#else
  out.is_cuda = tensor.device.type == 2;
#endif
  out.device_index = tensor.device.id;
  out.stream = nullptr;
  if (tensor.device.type == 2 && api->current_stream(tensor.device.type, tensor.device.id, &out.stream) != 0) {
    throw pybind11::error_already_set();
  }
  return true;
}

}  // namespace td::dlpack

namespace pybind11::detail {
template <>
struct type_caster<td::TensorView> {
  PYBIND11_TYPE_CASTER(td::TensorView, const_name("torch.Tensor"));
  bool load(handle source, bool) { return td::dlpack::view(source.ptr(), value); }
};
}  // namespace pybind11::detail
