// SPDX-License-Identifier: Apache-2.0
// The kernel of csrc/core/sm90_product.h: a persistent, warp-specialised (pingpong) CUTLASS product whose operands,
// residual and result move by TMA, with an epilogue of our own. One instantiation takes a minute to compile, hence a
// file each.
//
// While one group of warps multiplies its tile the other one finishes another: the residual of a tile is on its way
// before the sums are there. TMA cuts tiles at the ends of every matrix, so that frames may have any number of tokens.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <stdexcept>
#include <string>

#include "product.h"

namespace td::cuda::sm90 {

namespace fusion = cutlass::epilogue::fusion;
using cute::_0;
using cute::_1;

using TileShape = cute::Shape<cute::_128, cute::_128, cute::_64>;
using ClusterShape = cute::Shape<_1, _1, _1>;
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

// The epilogue's arithmetic on what its leaves give: sums, bias, gate, mask and residual.
template <class T>
struct GatedResidual;

template <int N>
struct GatedResidual<cutlass::Array<float, N>> {
  using Values = cutlass::Array<float, N>;
  CUTLASS_HOST_DEVICE Values operator()(const Values& sum, const Values& bias, const Values& gate, const Values& mask,
                                        const Values& residual) const {
    Values result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) result[i] = residual[i] + mask[i] * ((sum[i] + bias[i]) * gate[i]);
    return result;
  }
};

// The residual, or zeros that nothing is loaded for.
template <class Element>
struct Residual {
  struct SharedStorage {};
  struct Arguments {
    bool given = false;
  };
  using Params = Arguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& args, void*) {
    return args;
  }
  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE Residual() {}
  CUTLASS_HOST_DEVICE Residual(const Params& params, const SharedStorage&) : given(params.given) {}
  bool given = false;

  CUTLASS_DEVICE bool is_producer_load_needed() const { return given; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return given; }
  CUTLASS_DEVICE bool is_zero() const { return !given; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const fusion::detail::ProducerLoadArgs<Args...>&) {
    return fusion::detail::EmptyProducerLoadCallbacks{};
  }

  template <class Loaded>
  struct Callbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(const Loaded& loaded, bool given) : loaded(loaded), given(given) {}
    const Loaded& loaded;
    bool given;

    template <class Sum, int N>
    CUTLASS_DEVICE auto visit(const cutlass::Array<Sum, N>&, int epi_v, int, int) {
      using Values = cutlass::Array<typename Loaded::value_type, N>;
      Values none;
      none.clear();
      return given ? Values(cute::recast<Values>(loaded)(epi_v)) : none;
    }
  };

  template <bool, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    return Callbacks<std::remove_cv_t<std::remove_reference_t<decltype(args.tCrC)>>>(args.tCrC, given);
  }
};

using Row = cute::Stride<_0, _1, _0>;
using Column = cute::Stride<_1, _0, int64_t>;

// residual + mask * gate * (sums + bias), in the residual's type.
template <class T, class R>
struct FrameEpilogue {
  using Source = R;
  using Bias = fusion::Sm90RowBroadcast<0, TileShape, float, float, Row>;
  using Gate = fusion::Sm90RowBroadcast<0, TileShape, float, float, Row>;
  using Mask = fusion::Sm90ColBroadcast<0, TileShape, float, float, Column>;
  using Tree = fusion::Sm90EVT<fusion::Sm90Compute<GatedResidual, R, float, kRound>, fusion::Sm90AccFetch, Bias, Gate,
                               Mask, Residual<R>>;
  static typename Tree::Arguments arguments(const Sm90ProductArgs& args) {
    return {{},
            {static_cast<const float*>(args.bias), 0.0f, {}},
            {args.gate, 1.0f, {}},
            {args.mask, 1.0f, {_1{}, _0{}, args.mask_stride}},
            {args.residual != nullptr},
            {}};
  }
};

// sums + bias, as a linear layer.
template <class T, class R>
struct LinearEpilogue {
  using Source = void;
  using Bias = fusion::Sm90RowBroadcast<0, TileShape, T, float, Row>;
  using Tree = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::plus, R, float, kRound>, fusion::Sm90AccFetch, Bias>;
  static typename Tree::Arguments arguments(const Sm90ProductArgs& args) {
    return {{}, {static_cast<const T*>(args.bias), T(0), {}}, {}};
  }
};

// A collective epilogue with so many pieces of the residual on their way. CUTLASS would take four.
template <class Collective, int kStages>
struct WithStages {
  using type = Collective;
};
template <int kC, int kD, int kFragment, bool kReuse, bool kDelay, class Tile, class EpilogueTile, class C,
          class... Rest, int kStages>
struct WithStages<
    cutlass::epilogue::collective::CollectiveEpilogue<
        cutlass::epilogue::Sm90TmaWarpSpecialized<kC, kD, kFragment, kReuse, kDelay>, Tile, EpilogueTile, C, Rest...>,
    kStages> {
  static constexpr int kStagesC = std::is_void_v<C> ? kC : kStages;
  using type = cutlass::epilogue::collective::CollectiveEpilogue<
      cutlass::epilogue::Sm90TmaWarpSpecialized<kStagesC, kD, kFragment, kReuse, kDelay>, Tile, EpilogueTile, C,
      Rest...>;
};

// Pieces are 64 x 32 results: eight of them are a whole tile's residual, 64 KB of float32 or 32 KB of bfloat16.
constexpr int kResidualStages = 8;

template <class T, class R, bool kTransposed>
struct Product {
  using LayoutB = std::conditional_t<kTransposed, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using Epilogue = std::conditional_t<kTransposed, LinearEpilogue<T, R>, FrameEpilogue<T, R>>;
  static constexpr int kAligned = 16 / int(sizeof(T)), kResultAligned = 16 / int(sizeof(R));

  using BuiltEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, typename Epilogue::Source,
      cutlass::layout::RowMajor, kResultAligned, R, cutlass::layout::RowMajor, kResultAligned, EpilogueSchedule,
      typename Epilogue::Tree>::CollectiveOp;
  using CollectiveEpilogue = typename WithStages<BuiltEpilogue, kResidualStages>::type;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, cutlass::layout::RowMajor, kAligned, T, LayoutB, kAligned,
      float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename CollectiveEpilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop,
                                                      CollectiveEpilogue, cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static_assert(std::is_void_v<typename Epilogue::Source> || !std::is_same_v<CollectiveEpilogue, BuiltEpilogue>);
  static_assert(Kernel::SharedStorageSize <= 227 * 1024, "what a block of compute capability 9.0 has");
  static_assert(CollectiveMainloop::DispatchPolicy::Stages >= 4, "too few tiles on their way");
  static_assert(Kernel::MaxThreadsPerBlock == 384, "two groups of warps that multiply, and one that loads");
  static_assert(sizeof(typename Gemm::Params) <= 4096, "kernel arguments must fit the constant bank");

  // A stride of an axis, in the form of type S: [rows, 1, batch] or [1, rows, batch].
  template <class S>
  static S strides(const int64_t (&given)[2], int64_t batch) {
    S result{};
    const int64_t line = given[1], sample = batch > 1 ? given[0] : 0;
    if constexpr (cute::is_static_v<decltype(cute::get<1>(result))>) {
      cute::get<0>(result) = line;
    } else {
      cute::get<1>(result) = line;
    }
    cute::get<2>(result) = sample;
    return result;
  }

  static typename Gemm::Arguments arguments(const Sm90ProductArgs& args, int columns, int inner) {
    // Without a residual nothing is read from its address, which must be valid for a descriptor all the same.
    const void* residual = args.residual != nullptr ? args.residual : args.result;
    const int64_t (&residual_strides)[2] = args.residual != nullptr ? args.residual_strides : args.result_strides;
    cutlass::KernelHardwareInfo hardware{};
    cudaError_t status = cudaGetDevice(&hardware.device_id);
    if (status == cudaSuccess) {
      status = cudaDeviceGetAttribute(&hardware.sm_count, cudaDevAttrMultiProcessorCount, hardware.device_id);
    }
    if (status != cudaSuccess) fail(cudaGetErrorString(status));
    return {cutlass::gemm::GemmUniversalMode::kGemm,
            {int(args.rows), columns, inner, int(args.batch)},
            {static_cast<const T*>(args.a), strides<typename Kernel::StrideA>(args.a_strides, args.batch),
             static_cast<const T*>(args.b), strides<typename Kernel::StrideB>(args.b_strides, args.batch)},
            {Epilogue::arguments(args), static_cast<const typename CollectiveEpilogue::ElementC*>(residual),
             strides<typename Kernel::StrideC>(residual_strides, args.batch), static_cast<R*>(args.result),
             strides<typename Kernel::StrideD>(args.result_strides, args.batch)},
            hardware};
  }

  [[noreturn]] static void fail(const std::string& why) { throw std::runtime_error("sm90_product: " + why); }

  static void run(const Sm90ProductArgs& args, cudaStream_t stream) {
    // CUTLASS asks that sizes be whole pieces of 16 bytes. TMA asks that of strides alone, which were checked; it cuts
    // off what lies beyond a size. So the question is put for sizes rounded up.
    const auto up = [](int64_t size) { return int((size + 7) / 8 * 8); };
    cutlass::Status status = Gemm::can_implement(arguments(args, up(args.columns), up(args.inner)));
    if (status != cutlass::Status::kSuccess) fail("CUTLASS cannot compute this product");
    const typename Gemm::Arguments given = arguments(args, int(args.columns), int(args.inner));
    if (Gemm::get_workspace_size(given) != 0) fail("CUTLASS wants a workspace, which this schedule should not need");
    Gemm gemm;
    status = gemm.initialize(given, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    if (status != cutlass::Status::kSuccess) {
      const cudaError_t error = cudaGetLastError();
      fail(std::string(cutlass::cutlassGetStatusString(status)) + " (" + cudaGetErrorString(error) + ")");
    }
  }
};

}  // namespace td::cuda::sm90
