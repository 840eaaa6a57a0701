// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "core/audio_attention.h"

namespace td {
namespace {

using OptionalView = std::optional<TensorView>;

// Everything but the results; checks what protects memory.
AudioAttentionArgs common_args(const char* op, const TensorView& q, const TensorView& k, const TensorView& v,
                               const OptionalView& weights, const OptionalView& lens, const OptionalView& clips,
                               const TensorView& workspace, int64_t tokens_per_frame, int64_t token_offset,
                               int64_t window, double scale, int64_t slots) {
  check_view(q, 4, op, "q");
  check_view(k, 6, op, "k");
  check_view(v, 6, op, "v");
  const DType compute = q.dtype == DType::float64 ? DType::float64 : DType::float32;
  check(k.dtype == q.dtype && v.dtype == q.dtype, op, ": k and v must have the dtype of q");
  for (int i = 0; i < 6; ++i) check(k.shape[i] == v.shape[i], op, ": v must have the shape of k");
  check(k.shape[0] == q.shape[0] && k.shape[4] == q.shape[2] && k.shape[5] == q.shape[3], op, ": k does not fit q");
  check(k.shape[1] >= 1 && k.shape[1] <= kMaxSpeakers, op, ": at most ", kMaxSpeakers, " speakers");
  check(tokens_per_frame > 0 && token_offset >= 0 && window >= 0 && slots > 0, op, ": a number is out of range");
  check(token_offset + q.shape[1] <= k.shape[2] * tokens_per_frame, op, ": tokens beyond the last frame");
  check(workspace.dtype == compute, op, ": workspace has a wrong dtype");
  AudioAttentionArgs args{};
  args.q = q.data;
  args.k = k.data;
  args.v = v.data;
  args.batch = q.shape[0];
  args.tokens = q.shape[1];
  args.heads = q.shape[2];
  args.dim = q.shape[3];
  args.speakers = k.shape[1];
  args.frames = k.shape[2];
  args.audio = k.shape[3];
  for (int i = 0; i < 3; ++i) args.q_strides[i] = q.strides[i];
  for (int i = 0; i < 5; ++i) {
    args.k_strides[i] = k.strides[i];
    args.v_strides[i] = v.strides[i];
  }
  if (weights) {
    check_view(*weights, 3, op, "weights");
    check(weights->dtype == compute && weights->shape[0] == args.batch && weights->shape[1] == args.speakers &&
              weights->shape[2] == args.tokens,
          op, ": weights must be [B, P, N] in compute precision");
    args.weights = weights->data;
    for (int i = 0; i < 2; ++i) args.weight_strides[i] = weights->strides[i];
  }
  if (lens) {
    check(lens->ndim == 3 && lens->dtype == DType::int64 && lens->shape[0] == args.batch &&
              lens->shape[1] == args.speakers && lens->shape[2] == args.frames,
          op, ": lens must be int64 [B, P, F]");
    args.lens = static_cast<const int64_t*>(lens->data);
    for (int i = 0; i < 3; ++i) args.len_strides[i] = lens->strides[i];
  }
  if (clips) {
    check_view(*clips, 2, op, "clips");
    check(clips->dtype == DType::int64 && clips->shape[0] == args.frames && clips->shape[1] == 2 &&
              clips->strides[0] == 2,
          op, ": clips must be int64 [F, 2]");
    args.clips = static_cast<const int64_t*>(clips->data);
  }
  for (const TensorView* other : {&k, &v, &workspace}) check_same_device(q, *other, op, "an argument");
  for (const OptionalView* other : {&weights, &lens, &clips})
    if (*other) check_same_device(q, **other, op, "an argument");
  args.workspace = workspace.data;
  args.tokens_per_frame = tokens_per_frame;
  args.token_offset = token_offset;
  args.window = window < args.frames ? window : args.frames;
  args.slots = slots;
  args.scale = scale;
  args.dtype = q.dtype;
  return args;
}

void check_result(const TensorView& q, const TensorView& out, const char* op, const char* name) {
  check_view(out, 4, op, name);
  check(out.dtype == q.dtype, op, ": ", name, " must have the dtype of q");
  for (int i = 0; i < 4; ++i) check(out.shape[i] == q.shape[i], op, ": ", name, " must have the shape of q");
  check_same_device(q, out, op, name);
}

// Elements of the workspace that the kernels ask for. q is [B, N, H, D], k [B, P, F, A, H, D].
int64_t workspace_size(const TensorView& q, const TensorView& k, int64_t window, int64_t slots, bool backward) {
  check(q.ndim == 4 && k.ndim == 6, "audio_attention_workspace: wrong shapes");
  const int64_t speakers = k.shape[1], frames = k.shape[2];
  const int64_t audio = k.shape[3], batch = q.shape[0], heads = q.shape[2], dim = q.shape[3];
  if (window > frames) window = frames;
  if (!q.is_cuda) return AudioWorkspace(speakers, frames, audio, heads, dim, window, batch, slots, backward).total;
  return backward ? audio_cuda_workspace(q.dtype, batch, q.shape[1], heads, dim, speakers, frames, audio, window) : 0;
}

void check_workspace(const TensorView& q, const TensorView& k, const AudioAttentionArgs& args,
                     const TensorView& workspace, bool backward, const char* op) {
  const int64_t wanted = workspace_size(q, k, args.window, args.slots, backward);
  check(workspace.numel() >= wanted, op, ": workspace must have ", wanted, " elements, got ", workspace.numel());
}

void forward(const TensorView& q, const TensorView& k, const TensorView& v, const OptionalView& weights,
             const OptionalView& lens, const OptionalView& clips, const TensorView& out, const TensorView& workspace,
             int64_t tokens_per_frame, int64_t token_offset, int64_t window, double scale, int64_t slots) {
  const char* op = "audio_attention";
  AudioAttentionArgs args =
      common_args(op, q, k, v, weights, lens, clips, workspace, tokens_per_frame, token_offset, window, scale, slots);
  check_result(q, out, op, "out");
  check_workspace(q, k, args, workspace, false, op);
  if (q.numel() == 0) return;
  args.out = out.data;
  for (int i = 0; i < 3; ++i) args.out_strides[i] = out.strides[i];
  TD_CALL(audio_attention, q, args);
}

void backward(const TensorView& grad, const TensorView& q, const TensorView& k, const TensorView& v,
              const OptionalView& weights, const OptionalView& lens, const OptionalView& clips,
              const TensorView& grad_q, const TensorView& grad_k, const TensorView& grad_v,
              const OptionalView& grad_weights, const TensorView& workspace, int64_t tokens_per_frame,
              int64_t token_offset, int64_t window, double scale, int64_t slots) {
  const char* op = "audio_attention_backward";
  AudioAttentionArgs args =
      common_args(op, q, k, v, weights, lens, clips, workspace, tokens_per_frame, token_offset, window, scale, slots);
  check_result(q, grad, op, "grad");
  check_result(q, grad_q, op, "grad_q");
  for (const TensorView* result : {&grad_k, &grad_v}) {
    check(result->dtype == q.dtype && result->ndim == 6 && result->numel() == k.numel(), op,
          ": grad_k and grad_v must be like k");
    int64_t packed = 1;
    for (int i = 5; i >= 0; --i) {
      check(result->shape[i] == k.shape[i] && (result->strides[i] == packed || result->shape[i] == 1), op,
            ": grad_k and grad_v must be contiguous");
      packed *= result->shape[i];
    }
    check_same_device(q, *result, op, "a gradient");
  }
  check(grad_weights.has_value() == weights.has_value(), op, ": grad_weights comes with weights");
  if (grad_weights) {
    check(grad_weights->dtype == workspace.dtype &&
              grad_weights->numel() == args.batch * args.speakers * args.heads * args.tokens,
          op, ": grad_weights must be [B, P, H, N]");
    check_same_device(q, *grad_weights, op, "grad_weights");
    args.grad_weights = grad_weights->data;
  }
  check_workspace(q, k, args, workspace, true, op);
  if (k.numel() == 0 && q.numel() == 0) return;
  args.grad_out = grad.data;
  args.out = grad_q.data;
  args.grad_k = grad_k.data;
  args.grad_v = grad_v.data;
  for (int i = 0; i < 3; ++i) {
    args.grad_out_strides[i] = grad.strides[i];
    args.out_strides[i] = grad_q.strides[i];
  }
  TD_CALL(audio_attention_backward, q, args);
}

}  // namespace

TD_BINDINGS(audio_attention) {
  m.def("audio_attention", &forward);
  m.def("audio_attention_backward", &backward);
  m.def("audio_attention_workspace", &workspace_size);
}

}  // namespace td
