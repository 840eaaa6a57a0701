// SPDX-License-Identifier: Apache-2.0
// What forward and backward of qk_norm_rope3d share.
#pragma once

#include "copy_async.cuh"
#include "core/qk_norm_rope3d.h"
#include "rope_row.cuh"

namespace td::cuda {

constexpr int kNormThreads = 256, kNormWarps = kNormThreads / 32;  // where warps share heads, or nothing is known
constexpr int kRowThreads = 384;                                   // at most, where a block holds a token
constexpr int kRowVectors = 4;                                     // of 16 bytes that a thread holds of it

__device__ __forceinline__ float inverse_root(float v) {
  return rsqrtf(v);
}
__device__ __forceinline__ double inverse_root(double v) {
  return rsqrt(v);
}

// Sum over the block of a value that is the same in all lanes of a warp.
template <class C>
__device__ __forceinline__ C sum_of_warps(C value, C* scratch) {
  return block_sum((threadIdx.x & 31) == 0 ? value : C(0), scratch);
}

// Units that a thread holds when a block holds a whole token.
constexpr int row_units(bool interleaved) {
  return interleaved ? kRowVectors : kRowVectors / 2;
}

// Threads that hold a token together; 0: it does not fit, or a unit would change its place in the head.
template <class T>
int row_threads(const RopeArgs& args) {
  const int slots = args.dim / kFullVector<T> / (args.interleaved ? 1 : 2), per_thread = row_units(args.interleaved);
  if (32 % slots != 0 && slots % 32 != 0) return 0;
  const int64_t multiple = slots < 32 ? 32 : slots, wanted = (args.heads * slots + per_thread - 1) / per_thread;
  const int64_t threads = (wanted + multiple - 1) / multiple * multiple;
  return threads <= kRowThreads ? int(threads) : 0;
}

// Heads are narrow enough for a warp, and their units a power of two.
template <class T>
bool heads_fit_warp(const RopeArgs& args) {
  return 32 % (args.dim / kFullVector<T> / (args.interleaved ? 1 : 2)) == 0;
}

// Everything is aligned to 16 bytes: the tensors of the call, and the weight.
template <class T>
bool whole_vectors(const QkNormRopeArgs& all) {
  return whole_vectors<T>(all.rope) && aligned_rows(all.weight, nullptr, 0, 0);
}

// The weight of a unit, channel by channel as Unit::get counts.
template <class T, bool Interleaved>
__device__ __forceinline__ void load_weight(const QkNormRopeArgs& all, int64_t head, int slot,
                                            compute_t<T> (&values)[Unit<T, kFullVector<T>, Interleaved>::kChannels]) {
  using C = compute_t<T>;
  Unit<C, kFullVector<T>, Interleaved> unit;
  unit.load(static_cast<const C*>(all.weight) + head * all.rope.dim, slot, all.rope.dim);
#pragma unroll
  for (int j = 0; j < unit.kChannels; ++j) values[j] = unit.get(j);
}

// ---- a persistent block that holds one token at a time, all heads
// ----------------------------------------------------

constexpr int kRowWarps = 16;                                  // a power of two for kRowThreads
constexpr int kRowLimit = 512;                                 // told to the compiler: a thread gets 128 registers
constexpr int kScratch = 2 * kRowWarps * int(sizeof(double));  // for sums

// The tokens of a block: an equal share of those of all samples, in order.
struct TokenWalk {
  int b, n, left;

  __device__ __forceinline__ TokenWalk(const RopeArgs& args, int64_t share) {
    const int64_t first = blockIdx.x * share, items = args.batch * args.tokens;
    left = int(first + share < items ? share : items - first);
    b = int(first / args.tokens);  // samples are fewer than 65536
    n = int(first - b * args.tokens);
  }
  // Goes to the next token; true: it is another sample's first.
  __device__ __forceinline__ bool advance(const RopeArgs& args) {
    --left;
    if (++n < args.tokens) return false;
    n = 0;
    ++b;
    return true;
  }
};

// Which units a thread has: the same one in heads that are `step` apart.
template <class T, bool Interleaved>
struct RowPlace {
  static constexpr int kUnits = row_units(Interleaved);
  int slot, head, step;
  bool inside[kUnits];

  __device__ __forceinline__ explicit RowPlace(const RopeArgs& args) {
    const int slots = args.dim / Unit<T, kFullVector<T>, Interleaved>::kChannels;
    head = int(threadIdx.x) / slots;
    slot = int(threadIdx.x) - head * slots;
    step = int(blockDim.x) / slots;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) inside[i] = head + i * step < args.heads;
  }
};

// A thread's units of a token in one tensor, moved from token to token by an addition.
template <class T>
struct RowTrack {
  T* row;
  int64_t hop;  // elements between two units

  template <class Place>
  __device__ __forceinline__ RowTrack(const int64_t* strides, const Place& place)
      : row(nullptr), hop(place.step * strides[2]) {}
  template <class Pointer, class Place>
  __device__ __forceinline__ void enter(Pointer* data, const int64_t* strides, const TokenWalk& at,
                                        const Place& place) {
    row = rope_head<T>(data, strides, at.b, at.n, place.head);
  }
};

// Those units on their way through shared memory, kOffset bytes into the warp's part: the thread that copies is the one
// that reads. Units that are not inside read as zero.
template <class T, bool Interleaved, int kOffset>
struct StagedUnits {
  using U = Unit<T, kFullVector<T>, Interleaved>;
  static constexpr int kUnits = row_units(Interleaved), kEnd = kOffset + 512 * kUnits * U::kVectors;
  char* own;

  __device__ __forceinline__ explicit StagedUnits(char* thread_memory) : own(thread_memory + kOffset) {}
  __device__ __forceinline__ char* at(int i, int vector) const { return own + 512 * (i * U::kVectors + vector); }
  template <class Place>
  __device__ __forceinline__ void clear_outside(const Place& place) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
#pragma unroll
      for (int v = 0; v < U::kVectors; ++v) {
        if (!place.inside[i]) *reinterpret_cast<uint4*>(at(i, v)) = uint4{};
      }
    }
  }
  template <class Place>
  __device__ __forceinline__ void request(const RowTrack<const T>& track, const Place& place, int dim) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (!place.inside[i]) continue;
#pragma unroll
      for (int v = 0; v < U::kVectors; ++v) {
        copy_async<16>(at(i, v), track.row + i * track.hop + U::offset(place.slot, v, dim));
      }
    }
  }
  __device__ __forceinline__ void read(int i, U& unit) const {
#pragma unroll
    for (int v = 0; v < U::kVectors; ++v) unit.vectors[v].load(reinterpret_cast<const T*>(at(i, v)));
  }
};

// The cosines and sines of two tokens in shared memory: of this one, and of the next one on its way. Threads read what
// others have copied: there must be a barrier between wait_copies and read, and one between read and the next request.
template <class C>
struct RotationRows {
  C* rows;  // [2, 2 (cos, sin), dim / 2]

  __device__ __forceinline__ explicit RotationRows(char* memory) : rows(reinterpret_cast<C*>(memory)) {}
  static size_t bytes(int dim) { return 2 * size_t(dim) * sizeof(C); }
  __device__ __forceinline__ void request(const RopeArgs& args, int64_t n, int turn) const {
    const int half = args.dim / 2, first_h = args.pairs[0], first_w = first_h + args.pairs[1];
    if (int(threadIdx.x) >= half) return;
    const RopeCursor cursor(args.segments, args.segment_count, args.token_offset + n);
    C* target = rows + turn * args.dim;
    for (int p = int(threadIdx.x); p < half; p += int(blockDim.x)) {
      const int axis = p < first_h ? 0 : (p < first_w ? 1 : 2);
      const int64_t at = cursor.row(axis, args.pairs) + p - (axis == 0 ? 0 : (axis == 1 ? first_h : first_w));
      copy_async<int(sizeof(C))>(target + p, static_cast<const C*>(args.cos) + at, int(sizeof(C)));
      copy_async<int(sizeof(C))>(target + half + p, static_cast<const C*>(args.sin) + at, int(sizeof(C)));
    }
  }
  template <int Pairs>
  __device__ __forceinline__ void read(const RopeArgs& args, int slot, int turn, Rotation<C, Pairs>& rotation) const {
    const C* source = rows + turn * args.dim + slot * Pairs;
    Vector<C, Pairs> cosines, sines;
    cosines.load(source);
    sines.load(source + args.dim / 2);
#pragma unroll
    for (int p = 0; p < Pairs; ++p) {
      rotation.c[p] = cosines.get(p);
      rotation.s[p] = args.inverse ? -sines.get(p) : sines.get(p);
    }
  }
};

// Tokens of a block, and blocks, if as many of them as run at a time share all tokens.
struct RowShares {
  int64_t share;
  unsigned blocks;

  template <class Kernel>
  RowShares(const char* op, Kernel kernel, const RopeArgs& args, int threads, size_t bytes, int64_t most) {
    const int64_t items = args.batch * args.tokens, resident = resident_blocks(op, kernel, threads, bytes, most);
    share = (items + resident - 1) / resident;
    blocks = unsigned((items + share - 1) / share);
  }
};

}  // namespace td::cuda
