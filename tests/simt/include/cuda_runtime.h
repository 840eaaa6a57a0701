// SPDX-License-Identifier: Apache-2.0
// Stands in for CUDA's header when cuda/*.cu are compiled for the host (tests/simt): the part of the language and of
// the runtime that the kernels use. What it does not declare does not compile, so a kernel cannot drift away unnoticed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
#define CUDART_VERSION 13000
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
enum { cudaEnableDefault = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace simt {

// Set before a thread runs.
extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

void sync_threads();
void sync_warp();

// Lanes of a warp show one another up to 64 bytes. Returns what all lanes gave, 64 bytes apart, valid until the lane's
// next exchange. `operation` must be the same in all lanes.
const char* exchange(const void* value, unsigned bytes, unsigned mask, const char* operation);

char* dynamic_shared();

using Body = void (*)(const void* arguments);
void run(const char* op, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, Body body,
         const void* context);

void allow_shared(const void* kernel, int bytes);
extern int shared_limit;  // bytes of shared memory that a block of this device may have

// Devices as the runtime and the driver see them: a context is made on one when it is set, and one is current, or none.
constexpr int kDevices = 2;
struct Contexts {
  bool made[kDevices];
  int current;  // -1: none
};
extern Contexts contexts;
void* driver_function(const char* name);

template <class T>
T shuffle(T value, unsigned mask, int source, const char* operation) {
  T result;
  std::memcpy(&result, exchange(&value, sizeof value, mask, operation) + 64 * (source & 31), sizeof result);
  return result;
}

inline int lane() {
  return int((thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z)) & 31);
}

}  // namespace simt

#define threadIdx ::simt::thread_index
#define blockIdx ::simt::block_index
#define blockDim ::simt::block_size
#define gridDim ::simt::grid_size

inline void __syncthreads() {
  simt::sync_threads();
}
inline void __syncwarp(unsigned = 0xffffffffu) {
  simt::sync_warp();
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return simt::shuffle(value, mask, source, "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return simt::shuffle(value, mask, simt::lane() ^ bits, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  const int source = simt::lane() + distance;
  return simt::shuffle(value, mask, source < 32 ? source : simt::lane(), "__shfl_down_sync");
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const char* votes = simt::exchange(&vote, sizeof vote, mask, "__ballot_sync");
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= unsigned(votes[64 * i] != 0) << i;
  return bits;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

template <class T>
T __ldg(const T* source) {
  return *source;
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
inline double rsqrt(double x) {
  return 1.0 / std::sqrt(x);
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "invalid value";
}
inline cudaError_t cudaGetDevice(int* device) {
  return *device = simt::contexts.current < 0 ? 0 : simt::contexts.current, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= simt::kDevices) return cudaErrorInvalidValue;
  simt::contexts.made[device] = true;
  return simt::contexts.current = device, cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  *entry = simt::driver_function(name);
  *result = *entry != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
// A small device: persistent kernels take several turns on small inputs.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : simt::shared_limit, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  simt::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  return bytes <= simt::shared_limit ? cudaSuccess : cudaErrorInvalidValue;
}
