// SPDX-License-Identifier: Apache-2.0
#include "core/window_fusion.h"
#include "launch.cuh"

namespace td::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
// Vectors of a thread: as many loads are in flight at a time.
constexpr int unroll(int vector) {
  return vector == 4 ? 4 : 2;
}
constexpr int kMaxTerms = 512;  // in shared memory at a time

template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack {
  T value[V];
};

// A frame as its blocks see it: the vectors of all channels one after the other, in tiles of U * kThreads.
struct Frame {
  uint32_t vectors, tiles;
  FastDiv plane, row;      // vectors of a channel; of a row
  uint32_t rounds, slots;  // how often a window can come round to a frame; slots to look at, that many per window
  int terms;               // that fit into shared memory
};

// Elements from the begin of a tensor's frame to vector `at` of it.
template <int V>
__device__ __forceinline__ int64_t offset_of(const WindowArgs& args, const Frame& frame, uint32_t at,
                                             int64_t channel_stride, int64_t row_stride) {
  const uint32_t channel = frame.plane.div(at), rest = at - channel * frame.plane.divisor;
  if (args.rows == 1) return channel * channel_stride + rest * V;
  const uint32_t row = frame.row.div(rest);
  return channel * channel_stride + row * row_stride + (rest - row * frame.row.divisor) * V;
}
template <int U>
__device__ __forceinline__ uint32_t vector_of(uint32_t tile, int u) {
  return (tile * U + uint32_t(u)) * kThreads + threadIdx.x;
}

// As window_slot: starts are mostly within the result, and nearly always small, so a division of 64 bits is rare.
__device__ __forceinline__ int64_t slot_of(int64_t start, int64_t frame, int64_t length) {
  const int64_t slot = frame - start;
  if (slot >= 0 && slot < length) return slot;
  if (slot < 0 && slot + length >= 0) return slot + length;
  if (int64_t(int32_t(slot)) != slot) return window_slot(start, frame, length);
  const int32_t rest = int32_t(slot) % int32_t(length);
  return rest < 0 ? rest + length : rest;
}

// Slot number t of frame l: its window, its place there and its weight; `covers` if the window is long enough.
struct Slot {
  uint32_t window = 0;
  int64_t place = 0;
  double weight = 0.0;
  bool covers = false;

  __device__ __forceinline__ Slot(const WindowArgs& args, int64_t l, uint32_t t, uint32_t rounds) {
    window = rounds == 1 ? t : t / rounds;
    place = slot_of(args.starts[window], l, args.length) + (t - window * rounds) * args.length;
    covers = place < args.frames;
    if (covers) weight = args.weights[window * args.frames + place];
  }
  Slot() = default;
};

// What a block knows about its frame, in shared memory: where predictions have it, and their gains, in the order of the
// slots. Listed are those that lie in their window (All), or have a weight (not All).
struct Header {
  double sums[2 * kWarps], total, x_gain;
  int counts[kWarps];
};
template <bool All, class C>
struct Terms {
  const WindowArgs& args;
  const Frame& frame;
  uint32_t slots;  // to look at
  uint32_t next;   // the first that has not been looked at
  int count;       // terms in shared memory
  bool whole;      // these are all: no tile needs others

  __device__ __forceinline__ Terms(const WindowArgs& arguments, const Frame& f, bool wanted)
      : args(arguments), frame(f), slots(wanted ? f.slots : 0), next(0), count(0), whole(false) {
    double values[2] = {};
    for (uint32_t t = threadIdx.x; t < frame.slots; t += kThreads) {
      const Slot slot(args, blockIdx.y, t, frame.rounds);
      values[0] += slot.weight;
      if (args.x) values[1] += slot.weight * window_x_coefficient(args, slot.window);
    }
    block_sums_apart<kWarps>(values, header().sums);
    if (threadIdx.x == 0) {
      header().total = values[0];
      header().x_gain = args.x ? window_gain(values[1], values[0]) : 0.0;
    }
    __syncthreads();
  }
  static __device__ __forceinline__ Header& header() { return *reinterpret_cast<Header*>(dynamic_shared()); }
  __device__ __forceinline__ int64_t& offset(int place) const {
    return reinterpret_cast<int64_t*>(dynamic_shared() + sizeof(Header))[place];
  }
  __device__ __forceinline__ C& gain(int place) const {
    return reinterpret_cast<C*>(&offset(frame.terms * args.prediction_count))[place];
  }
  // Takes the terms that follow, as many as fit.
  __device__ __forceinline__ void fill() {
    __syncthreads();
    const bool first = next == 0;
    count = 0;
    while (next < slots) {
      const uint32_t t = next + threadIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
      const Slot slot = t < slots ? Slot(args, blockIdx.y, t, frame.rounds) : Slot();
      const bool listed = slot.covers && (All || slot.weight != 0.0);
      const uint32_t votes = __ballot_sync(0xffffffffu, listed);
      if (lane == 0) header().counts[warp] = __popc(votes);
      __syncthreads();
      int place = count + __popc(votes & ((1u << lane) - 1)), found = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < int(warp)) place += header().counts[w];
        found += header().counts[w];
      }
      const bool fits = count + found <= frame.terms;
      if (listed && fits) {
        const double share = window_gain(slot.weight, header().total);
#pragma unroll 1
        for (int k = 0; k < args.prediction_count; ++k) {
          const int64_t* strides = args.prediction_strides[k];
          offset(place * args.prediction_count + k) = slot.window * strides[0] + slot.place * strides[2];
          gain(place * args.prediction_count + k) = C(share * window_coefficient(args, slot.window, k));
        }
      }
      __syncthreads();
      if (!fits) return;
      count += found;
      next += kThreads;
    }
    whole = first;
  }
};

// A block computes tiles of one frame: gridDim.x blocks take turns. With U = 1 there may be more terms than fit: then
// every tile goes through all of them in several turns.
template <class X, class P, int V, int U>
__global__ void __launch_bounds__(kThreads, 3)
    fuse_kernel(const __grid_constant__ WindowArgs args, const __grid_constant__ Frame frame) {
  using C = compute_t<X>;
  Terms<false, C> terms(args, frame, true);
  const int64_t l = blockIdx.y;
  if constexpr (U > 1) terms.fill();
  for (uint32_t tile = blockIdx.x; tile < frame.tiles; tile += gridDim.x) {
    if (U == 1 && !terms.whole) terms.next = 0;
    C sum[U][V] = {};
    if (args.x) {
      const X* x = static_cast<const X*>(args.x) + l * args.x_strides[1];
      const C gain = C(terms.header().x_gain);
      Pack<X, V> packs[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const uint32_t at = vector_of<U>(tile, u);
        if (at >= frame.vectors) continue;
        packs[u] = *reinterpret_cast<const Pack<X, V>*>(
            x + offset_of<V>(args, frame, at, args.x_strides[0], args.x_strides[2]));
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (vector_of<U>(tile, u) >= frame.vectors) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) sum[u][v] = gain * C(packs[u].value[v]);
      }
    }
    do {
      if (U == 1 && !terms.whole) terms.fill();
#pragma unroll 1
      for (int k = 0; k < args.prediction_count; ++k) {
        const int64_t* strides = args.prediction_strides[k];
        const P* sources[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          sources[u] = static_cast<const P*>(args.predictions[k]) +
                       offset_of<V>(args, frame, vector_of<U>(tile, u), strides[1], strides[3]);
        }
#pragma unroll 1
        for (int n = k; n < terms.count * args.prediction_count; n += args.prediction_count) {
          const int64_t offset = terms.offset(n);
          const C gain = terms.gain(n);
          Pack<P, V> packs[U];
#pragma unroll
          for (int u = 0; u < U; ++u) {
            if (vector_of<U>(tile, u) >= frame.vectors) continue;
            packs[u] = *reinterpret_cast<const Pack<P, V>*>(sources[u] + offset);
          }
#pragma unroll
          for (int u = 0; u < U; ++u) {
            if (vector_of<U>(tile, u) >= frame.vectors) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) sum[u][v] += gain * C(packs[u].value[v]);
          }
        }
      }
    } while (U == 1 && terms.next < terms.slots);
    X* out = static_cast<X*>(args.out) + l * args.out_strides[1];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const uint32_t at = vector_of<U>(tile, u);
      if (at >= frame.vectors) continue;
      Pack<X, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) pack.value[v] = X(sum[u][v]);
      *reinterpret_cast<Pack<X, V>*>(out + offset_of<V>(args, frame, at, args.out_strides[0], args.out_strides[2])) =
          pack;
    }
  }
}

// Stores gain * grad; zeros where there is no gain, whatever the gradient.
template <class X, class T, int V>
__device__ __forceinline__ void scale_store(const Pack<X, V>& grad, compute_t<X> gain, T* target) {
  using C = compute_t<X>;
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.value[v] = T(gain != C(0) ? gain * C(grad.value[v]) : C(0));
  *reinterpret_cast<Pack<T, V>*>(target) = pack;
}

// The same blocks with the roles exchanged: the gradient of a frame is read once and goes to every place it came from.
// Every slot of every window lies under exactly one frame, so all of the gradients are written.
template <class X, class P, int V, int U>
__global__ void __launch_bounds__(kThreads, 3)
    spread_kernel(const __grid_constant__ WindowArgs args, const __grid_constant__ Frame frame) {
  using C = compute_t<X>;
  Terms<true, C> terms(args, frame, args.predictions[0] != nullptr);
  const int64_t l = blockIdx.y;
  if constexpr (U > 1) terms.fill();
  for (uint32_t tile = blockIdx.x; tile < frame.tiles; tile += gridDim.x) {
    if (U == 1 && !terms.whole) terms.next = 0;
    Pack<X, V> grads[U];
    const X* source = static_cast<const X*>(args.out) + l * args.out_strides[1];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const uint32_t at = vector_of<U>(tile, u);
      if (at >= frame.vectors) continue;
      grads[u] = *reinterpret_cast<const Pack<X, V>*>(
          source + offset_of<V>(args, frame, at, args.out_strides[0], args.out_strides[2]));
    }
    if (args.x) {
      X* target = static_cast<X*>(args.x) + l * args.x_strides[1];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const uint32_t at = vector_of<U>(tile, u);
        if (at >= frame.vectors) continue;
        scale_store<X, X, V>(grads[u], C(terms.header().x_gain),
                             target + offset_of<V>(args, frame, at, args.x_strides[0], args.x_strides[2]));
      }
    }
    do {
      if (U == 1 && !terms.whole) terms.fill();
#pragma unroll 1
      for (int k = 0; k < args.prediction_count; ++k) {
        const int64_t* strides = args.prediction_strides[k];
        P* targets[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          targets[u] = static_cast<P*>(args.predictions[k]) +
                       offset_of<V>(args, frame, vector_of<U>(tile, u), strides[1], strides[3]);
        }
#pragma unroll 1
        for (int n = k; n < terms.count * args.prediction_count; n += args.prediction_count) {
#pragma unroll
          for (int u = 0; u < U; ++u) {
            if (vector_of<U>(tile, u) >= frame.vectors) continue;
            scale_store<X, P, V>(grads[u], terms.gain(n), targets[u] + terms.offset(n));
          }
        }
      }
    } while (U == 1 && terms.next < terms.slots);
  }
}

bool aligned(const void* data, const int64_t* strides, int count, int64_t item, int vector) {
  uint64_t bytes = reinterpret_cast<uint64_t>(data);
  for (int i = 0; i < count; ++i) bytes |= uint64_t(strides[i] * item);
  const uint64_t width = uint64_t(item) * uint64_t(vector);
  return bytes % (width < 16 ? width : 16) == 0;
}

bool can_vectorise(const WindowArgs& args, int vector) {
  const int64_t item = item_size(args.dtype);
  bool ok = args.cols % vector == 0 && aligned(args.out, args.out_strides, 3, item, vector);
  if (args.x) ok = ok && aligned(args.x, args.x_strides, 3, item, vector);
  for (int k = 0; k < args.prediction_count && args.predictions[k]; ++k) {
    ok = ok && aligned(args.predictions[k], args.prediction_strides[k], 4, item_size(args.prediction_dtype), vector);
  }
  return ok;
}

// A block has one tile of a frame, and more where blocks would come in many turns: its terms are worked out once.
template <class C, class Kernel>
void launch_frames(const char* op, Kernel kernel, const WindowArgs& args, int vector, int per_thread,
                   cudaStream_t stream) {
  const int64_t row = args.cols / vector, plane = args.rows * row, vectors = args.channels * plane;
  const int64_t tiles = (vectors + kThreads * per_thread - 1) / (kThreads * per_thread);
  if (tiles * kThreads * per_thread > INT32_MAX) {
    throw std::invalid_argument(std::string(op) + ": a frame is too large for one launch on CUDA");
  }
  const int64_t rounds = (args.frames + args.length - 1) / args.length, slots = args.windows * rounds;
  const int terms = int(slots < kMaxTerms ? slots : kMaxTerms);
  const size_t bytes = sizeof(Header) + size_t(terms * args.prediction_count) * (sizeof(int64_t) + sizeof(C));
  const int64_t turns = tiles * args.length / (4 * int64_t(resident_blocks(op, kernel, kThreads, bytes, INT32_MAX)));
  const int64_t each = turns < 1 ? 1 : (turns > 8 ? 8 : turns), share = (tiles + each - 1) / each;
  const Frame frame{uint32_t(vectors),
                    uint32_t(tiles),
                    FastDiv(uint32_t(plane)),
                    FastDiv(uint32_t(row)),
                    uint32_t(rounds),
                    uint32_t(slots),
                    terms};
  launch(op, kernel, dim3(unsigned(share), unsigned(args.length)), kThreads, bytes, stream, args, frame);
}

// Calls fn(type_tag of X, of P, V, U) with the vectors that the tensors allow.
template <class F>
void dispatch_vectors(const WindowArgs& args, F&& fn) {
  const bool fits = args.windows * ((args.frames + args.length - 1) / args.length) <= kMaxTerms;
  dispatch_window(args, [&](auto x_tag, auto prediction_tag) {
    constexpr int V = 16 / sizeof(typename decltype(prediction_tag)::type);
    const std::integral_constant<int, V> whole;
    const std::integral_constant<int, 1> one;
    if (!can_vectorise(args, V)) return fn(x_tag, prediction_tag, one, one);
    fits ? fn(x_tag, prediction_tag, whole, std::integral_constant<int, unroll(V)>())
         : fn(x_tag, prediction_tag, whole, one);
  });
}

}  // namespace

void window_fusion(const WindowArgs& args, cudaStream_t stream) {
  dispatch_vectors(args, [&](auto x_tag, auto prediction_tag, auto vector, auto per_thread) {
    using X = typename decltype(x_tag)::type;
    using P = typename decltype(prediction_tag)::type;
    launch_frames<compute_t<X>>("window_fusion", fuse_kernel<X, P, vector(), per_thread()>, args, vector(),
                                per_thread(), stream);
  });
}

void window_fusion_backward(const WindowArgs& args, cudaStream_t stream) {
  dispatch_vectors(args, [&](auto x_tag, auto prediction_tag, auto vector, auto per_thread) {
    using X = typename decltype(x_tag)::type;
    using P = typename decltype(prediction_tag)::type;
    launch_frames<compute_t<X>>("window_fusion_backward", spread_kernel<X, P, vector(), per_thread()>, args, vector(),
                                per_thread(), stream);
  });
}

}  // namespace td::cuda
