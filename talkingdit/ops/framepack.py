# SPDX-License-Identifier: Apache-2.0
"""History pooling: latent frames projected to tokens at several scales, packed into one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit._native_loader import native
from talkingdit.ops import _framepack_gpu
from talkingdit.ops._checks import check_dims, check_float, check_out, check_same, check_shape, check_tensor, rows
from talkingdit.ops._library import register
from talkingdit.ops._matrix_kernels import check_kernel
from talkingdit.ops._memory import empty

__all__ = ["Bucket", "bucket_grid", "framepack", "framepack_reference", "init_bucket_weight"]

PADDINGS = ("none", "zero", "replicate")
_MAX_BUCKETS = 16
_MAX_FRAMES = 512


@dataclass
class Bucket:
    """Some frames of the history and the scale they are taken at.

    Attributes:
        frames: indices into the time axis of the latents, in order: a range, slice or list; negative ones count from
            the end.
        kernel: (kt, kh, kw), size and stride of the patches.
        weight: [out, C, kt, kh, kw] as of a Conv3d, or None: patches are averaged, and out is C.
        bias: [out] or None.
    """

    frames: range | slice | Sequence[int]
    kernel: tuple[int, int, int]
    weight: Tensor | None = None
    bias: Tensor | None = None

    def indices(self, time: int) -> list[int]:
        """The frames as indices 0 .. time - 1.

        Raises:
            TypeError: frames is a bare number.
            ValueError: no frame, or one outside.
        """
        if isinstance(self.frames, int):
            raise TypeError(f"framepack: frames of a bucket must be a range, slice or list, got {self.frames}")
        if isinstance(self.frames, slice):
            listed = list(range(*self.frames.indices(time)))
        else:
            listed = [int(frame) for frame in self.frames]
        if not listed:
            raise ValueError(f"framepack: frames of a bucket must name at least one frame, got {self.frames}")
        for frame in listed:
            if not -time <= frame < time:
                raise ValueError(f"framepack: frames must lie in {-time} .. {time - 1}, got {frame}")
        return [frame % time for frame in listed]


def bucket_grid(
    count: int, size: tuple[int, int], kernel: tuple[int, int, int], padding: str = "zero"
) -> tuple[int, int, int]:
    """Tokens per axis (t, h, w) of a bucket of ``count`` frames of latent size (H, W)."""
    up = 0 if padding == "none" else 1
    t, h, w = ((n + up * (k - 1)) // k for n, k in zip((count, *size), kernel, strict=True))
    return t, h, w


_ARGS = "Tensor latents, Tensor[] weights, Tensor[] biases, int[] frames, int[] counts, int[] kernels, int padding"


def _grids(latents: Tensor, counts: Sequence[int], kernels: Sequence[int], padding: int) -> list[tuple[int, int, int]]:
    size = (latents.shape[3], latents.shape[4])
    name = PADDINGS[padding]
    return [
        bucket_grid(count, size, (kernels[3 * i], kernels[3 * i + 1], kernels[3 * i + 2]), name)
        for i, count in enumerate(counts)
    ]


def _out_channels(latents: Tensor, weights: Sequence[Tensor]) -> int:
    return weights[0].shape[0] if weights[0].dim() == 5 else latents.shape[1]


def _matrices(
    latents: Tensor, weights: Sequence[Tensor], grids: Sequence[tuple[int, int, int]]
) -> tuple[Tensor, list[Tensor | None]]:
    """Memory for the patches, and a view [B * tokens, K] of it for every bucket with a weight."""
    batch = latents.shape[0]
    shapes = [
        (batch * t * h * w, weight[0].numel()) if weight.dim() == 5 else None
        for weight, (t, h, w) in zip(weights, grids, strict=True)
    ]
    columns = empty((sum(shape[0] * shape[1] for shape in shapes if shape),), latents)
    views: list[Tensor | None] = []
    at = 0
    for shape in shapes:
        if shape is None:
            views.append(None)
            continue
        views.append(columns[at : at + shape[0] * shape[1]].view(shape))
        at += shape[0] * shape[1]
    return columns, views


def _run(
    latents: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    frames: list[int],
    counts: list[int],
    kernels: list[int],
    padding: int,
    out: Tensor,
    kernel: str,
) -> None:
    grids = _grids(latents, counts, kernels, padding)
    if _framepack_gpu.used_for(latents):
        _framepack_gpu.project(latents, weights, biases, grids, (frames, counts, kernels, padding), out, kernel)
        return
    columns, views = _matrices(latents, weights, grids)
    flat = [n for grid in grids for n in grid]
    pooled = [view is None for view in views]
    native.framepack_gather(rows(latents), columns, out, frames, counts, kernels, flat, pooled, padding)
    first = 0
    for view, weight, bias, (t, h, w) in zip(views, weights, biases, grids, strict=True):
        count = t * h * w
        if view is not None and count:
            matrix = weight.reshape(weight.shape[0], -1).t()
            for patches, tokens in zip(view.view(-1, count, view.shape[1]), out[:, first : first + count], strict=True):
                if bias.numel():
                    torch.addmm(bias, patches, matrix, out=tokens)
                else:
                    torch.mm(patches, matrix, out=tokens)
        first += count


def _forward(  # type: ignore[no-untyped-def]
    latents: Tensor, weights: list[Tensor], biases, frames, counts, kernels, padding, kernel
) -> Tensor:
    out = empty(_shape(latents, weights, counts, kernels, padding), latents)
    _run(latents, weights, biases, frames, counts, kernels, padding, out, kernel)
    return out


def _shape(
    latents: Tensor, weights: Sequence[Tensor], counts: Sequence[int], kernels: Sequence[int], padding: int
) -> tuple[int, int, int]:
    tokens = sum(t * h * w for t, h, w in _grids(latents, counts, kernels, padding))
    return latents.shape[0], tokens, _out_channels(latents, weights)


def _fake(latents, weights, biases, frames, counts, kernels, padding, kernel):  # type: ignore[no-untyped-def]
    return latents.new_empty(_shape(latents, weights, counts, kernels, padding))


def _backward_run(
    grad: Tensor,
    latents: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    frames: list[int],
    counts: list[int],
    kernels: list[int],
    padding: int,
    for_latents: bool,
    for_weights: bool,
) -> list[Tensor]:
    """Gradients of latents, weights and biases, in this order; what is not wanted or not there is empty."""
    grids = _grids(latents, counts, kernels, padding)
    if _framepack_gpu.used_for(latents):
        buckets = (frames, counts, kernels, padding)
        return _framepack_gpu.backward(grad, latents, weights, biases, grids, buckets, for_latents, for_weights)
    columns, views = _matrices(latents, weights, grids)
    grad = rows(grad)
    options = (frames, counts, kernels, [n for grid in grids for n in grid], [view is None for view in views], padding)
    grad_weights = [weight.new_empty(0) for weight in weights]
    grad_biases = [bias.new_empty(0) for bias in biases]
    if for_weights:  # patches are made again: cheaper than keeping them
        averages = latents.new_empty(grad.shape) if None in views else grad  # written for buckets without weights only
        native.framepack_gather(rows(latents), columns, averages, *options)
    first = 0
    for i, (view, weight, (t, h, w)) in enumerate(zip(views, weights, grids, strict=True)):
        tokens = grad[:, first : first + t * h * w].reshape(-1, grad.shape[2])
        first += t * h * w
        if view is None:
            continue
        if for_weights:
            grad_weights[i] = empty(weight.shape, weight)
            torch.mm(tokens.t(), view, out=grad_weights[i].flatten(1))
            if biases[i].numel():
                grad_biases[i] = tokens.sum(0)
        if for_latents:
            torch.mm(tokens, weight.reshape(weight.shape[0], -1), out=view)
    grad_latents = latents.new_empty(0)
    if for_latents:
        grad_latents = empty(latents.shape, latents)
        native.framepack_scatter(grad_latents, columns, grad, *options)
    return [grad_latents, *grad_weights, *grad_biases]


def _backward_fake(  # type: ignore[no-untyped-def]
    grad, latents, weights, biases, frames, counts, kernels, padding, for_latents, for_weights
):
    wanted = [weight if for_weights and weight.dim() == 5 else weight.new_empty(0) for weight in weights]
    wanted += [bias if for_weights else bias.new_empty(0) for bias in biases]
    first = latents.new_empty(latents.shape if for_latents else 0)
    return [first, *(tensor.new_empty(tensor.shape) for tensor in wanted)]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    latents, weights, biases, *ctx.options, _ = inputs
    ctx.save_for_backward(latents, *weights, *biases)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    latents, *rest = ctx.saved_tensors
    count = len(rest) // 2
    weights, biases = rest[:count], rest[count:]
    for_latents = ctx.needs_input_grad[0]
    for_weights = any(tensor.requires_grad for tensor in rest)
    found = _op_backward(grad, latents, weights, biases, *ctx.options, for_latents, for_weights)
    grads = [tensor if tensor.numel() else None for tensor in found]
    return grads[0], grads[1 : 1 + count], grads[1 + count :], None, None, None, None, None


_op_backward = register(
    f"framepack_backward(Tensor grad, {_ARGS}, bool for_latents, bool for_weights) -> Tensor[]",
    _backward_run,
    _backward_fake,
)
_op = register(f"framepack({_ARGS}, str kernel) -> Tensor", _forward, _fake, _backward, _save)
_op_out = register(f"framepack_out({_ARGS}, Tensor(a!) out, str kernel) -> ()", _run, lambda *_: None)


def _prepare(
    name: str, latents: Tensor, buckets: Sequence[Bucket], padding: str
) -> tuple[list[Tensor], list[Tensor], list[int], list[int], list[int], int]:
    """Checks everything; weights, biases, frames, counts, kernels, padding as the op takes them."""
    check_dims(name, "latents", latents, "B, C, T, H, W")
    check_float(name, "latents", latents)
    if latents.numel() == 0:
        raise ValueError(f"{name}: latents must not be empty, got shape {tuple(latents.shape)}")
    if padding not in PADDINGS:
        raise ValueError(f"{name}: padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
    if not 0 < len(buckets) <= _MAX_BUCKETS:
        raise ValueError(f"{name}: buckets must be a list of 1 to {_MAX_BUCKETS}, got {len(buckets)}")
    weights, biases, frames, counts, kernels = [], [], [], [], []
    channels = latents.shape[1]
    outputs = set()
    for i, bucket in enumerate(buckets):
        if len(bucket.kernel) != 3 or min(bucket.kernel) < 1:
            raise ValueError(f"{name}: kernel of bucket {i} must be three positive sizes, got {tuple(bucket.kernel)}")
        if bucket.weight is None:
            if bucket.bias is not None:
                raise ValueError(f"{name}: bucket {i} has a bias but no weight")
        else:
            check_tensor(name, f"weight of bucket {i}", bucket.weight)
            shape = (bucket.weight.shape[0] if bucket.weight.dim() else 0, channels, *bucket.kernel)
            check_shape(name, f"weight of bucket {i}", bucket.weight, shape, "out, C, kt, kh, kw")
            check_same(name, f"weight of bucket {i}", bucket.weight, "latents", latents)
            if bucket.bias is not None:
                check_shape(name, f"bias of bucket {i}", bucket.bias, shape[:1], "out")
                check_same(name, f"bias of bucket {i}", bucket.bias, "latents", latents)
        outputs.add(channels if bucket.weight is None else bucket.weight.shape[0])
        none = latents.new_empty(0)
        weights.append(none if bucket.weight is None else bucket.weight)
        biases.append(none if bucket.bias is None else bucket.bias)
        listed = bucket.indices(latents.shape[2])
        frames += listed
        counts.append(len(listed))
        kernels += [int(k) for k in bucket.kernel]
    if len(outputs) > 1:
        raise ValueError(f"{name}: all buckets must have the same number of output channels, got {sorted(outputs)}")
    if len(frames) > _MAX_FRAMES:
        raise ValueError(f"{name}: buckets must list at most {_MAX_FRAMES} frames together, got {len(frames)}")
    return weights, biases, frames, counts, kernels, PADDINGS.index(padding)


def framepack(
    latents: Tensor,
    buckets: Sequence[Bucket],
    padding: str = "zero",
    out: Tensor | None = None,
    *,
    kernel: str = "auto",
) -> Tensor:
    """Projects every bucket's frames in non-overlapping patches and packs the tokens in the order of the list.

    Per bucket this is a Conv3d whose stride is its kernel (FramePack, arXiv:2504.12626, section 3), or an average over
    patches; tokens of a bucket are in t, h, w order. Wan-S2V takes a buffer of 19 frames as
    ``[Bucket([18], (1, 2, 2), ...), Bucket([16, 17], (2, 4, 4), ...), Bucket(range(16), (4, 8, 8), ...)]``
    with padding "none"; FramePack lists the coarsest bucket first and replicates.

    Args:
        latents: [B, C, T, H, W], float32, float64, bfloat16 or float16; any strides on the first four axes.
        buckets: 1 to 16, all with the same number of output channels.
        padding: what happens at the end of an axis (the frames of a bucket, H, W) that is no multiple of the kernel:
            "zero" and "replicate" fill the last patch (averages count the filling), "none" drops the rest.
        out: preallocated result; inference only.
        kernel: which one computes the tokens on a GPU, "auto", "general", "cutlass" or "library" (cuBLAS). The last two
            need a weight in every bucket, "cutlass" also bfloat16 and a GPU of compute capability 9.0. Gradients have
            one kernel.

    Returns:
        [B, S, out] in the dtype of latents.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices, frames or padding do not fit.
        RuntimeError: ``out`` was given while a gradient is needed.
    """
    weights, biases, frames, counts, kernels, rule = _prepare("framepack", latents, buckets, padding)
    check_kernel("framepack", kernel, latents.device)
    if out is None:
        return _op(latents, weights, biases, frames, counts, kernels, rule, kernel)
    shape = _shape(latents, weights, counts, kernels, rule)
    check_out("framepack", out, shape, latents.dtype, [latents, *weights, *biases])
    _op_out(latents, weights, biases, frames, counts, kernels, rule, out, kernel)
    return out


def framepack_reference(latents: Tensor, buckets: Sequence[Bucket], padding: str = "zero") -> Tensor:
    """:func:`framepack` in plain PyTorch: pad, then one strided Conv3d or average pooling per bucket."""
    _prepare("framepack_reference", latents, buckets, padding)
    parts = []
    for bucket in buckets:
        chosen = latents[:, :, bucket.indices(latents.shape[2])]
        if padding != "none":
            short = [-size % k for size, k in zip(chosen.shape[2:], bucket.kernel, strict=True)]
            mode = "replicate" if padding == "replicate" else "constant"
            chosen = F.pad(chosen, (0, short[2], 0, short[1], 0, short[0]), mode=mode)
        if min(size // k for size, k in zip(chosen.shape[2:], bucket.kernel, strict=True)) == 0:
            continue
        # In float32, rounded once: oneDNN's conv3d of bfloat16 (torch 2.13 on CPUs) gives garbage for some small sizes.
        wide = chosen if chosen.dtype == torch.float64 else chosen.float()
        if bucket.weight is None:
            tokens = F.avg_pool3d(wide, bucket.kernel, stride=bucket.kernel)
        else:
            bias = None if bucket.bias is None else bucket.bias.to(wide.dtype)
            tokens = F.conv3d(wide, bucket.weight.to(wide.dtype), bias, stride=bucket.kernel)
        tokens = tokens.to(latents.dtype)
        parts.append(tokens.flatten(2).transpose(1, 2))
    return torch.cat(parts, dim=1)


def init_bucket_weight(
    weight: Tensor, bias: Tensor | None, kernel: tuple[int, int, int]
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias for a larger kernel from those of the base patch embedding, as FramePack initialises them.

    Every tap is repeated along t, h and w and divided by the number of repeats, so that on constant patches the coarse
    token equals the fine one.

    Args:
        weight: [out, C, kt, kh, kw] of the base.
        bias: [out] or None; copied.
        kernel: the larger kernel, a multiple of the base's on every axis.

    Raises:
        ValueError: the kernel is no multiple.
    """
    check_dims("init_bucket_weight", "weight", weight, "out, C, kt, kh, kw")
    base = tuple(weight.shape[2:])
    if len(kernel) != 3 or any(k < 1 or k % b for k, b in zip(kernel, base, strict=False)):
        raise ValueError(
            f"init_bucket_weight: kernel must be a multiple of the base kernel {base}, got {tuple(kernel)}"
        )
    repeats = [k // b for k, b in zip(kernel, base, strict=True)]
    for axis, count in enumerate(repeats):
        weight = weight.repeat_interleave(count, dim=2 + axis)
    scaled = weight / (repeats[0] * repeats[1] * repeats[2])
    return scaled, None if bias is None else bias.clone()
