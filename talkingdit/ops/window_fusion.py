# SPDX-License-Identifier: Apache-2.0
"""Fusion of overlapping latent windows, alone or in one pass with guidance and the sampler's update.

Long videos are denoised in windows of frames that overlap. Every published way of putting them together again
(averages, ramps, prefix wins, sequential cross-fade) is a table of weights, see :mod:`talkingdit.ops.window_weights`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from talkingdit._native_loader import native
from talkingdit.ops._checks import check_dims, check_float, check_out, check_shape, check_tensor, rows
from talkingdit.ops._host_table import on_device
from talkingdit.ops._library import register
from talkingdit.ops._memory import empty

__all__ = ["fused_window_step", "fused_window_step_reference", "window_fusion", "window_fusion_reference"]

Table = Tensor | Sequence[float] | Sequence[Sequence[float]]

_MAX_PREDICTIONS = 4


# ---- window_fusion ---------------------------------------------------------------------------------------------------
def _fusion(windows: Tensor, starts: Tensor, weights: Tensor, length: int) -> Tensor:
    _, channels, _, height, width = windows.shape
    out = empty((channels, length, height, width), windows)
    native.window_fusion(out, None, [rows(windows)], None, starts, weights)
    return out


def _fusion_fake(windows: Tensor, starts: Tensor, weights: Tensor, length: int) -> Tensor:
    return windows.new_empty(windows.shape[1], length, *windows.shape[3:])


def _fusion_out(windows: Tensor, starts: Tensor, weights: Tensor, out: Tensor) -> None:
    native.window_fusion(out, None, [rows(windows)], None, starts, weights)


def _fusion_grad(grad: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    channels, _, height, width = grad.shape
    out = empty((weights.shape[0], channels, weights.shape[1], height, width), grad)
    native.window_fusion_backward(rows(grad), None, [out], None, starts, weights)
    return out


def _fusion_grad_fake(grad: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    channels, _, height, width = grad.shape
    return grad.new_empty(weights.shape[0], channels, weights.shape[1], height, width)


def _fusion_save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, starts, weights, ctx.length = inputs
    ctx.save_for_backward(starts, weights)


def _fusion_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return _fusion_grad_op(grad, *ctx.saved_tensors), None, None, None


def _fusion_grad_save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    grad, starts, weights = inputs
    ctx.length = grad.shape[1]
    ctx.save_for_backward(starts, weights)


def _fusion_grad_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    # The transpose of the transpose: gradients of windows are fused again.
    return _fusion_op(grad, *ctx.saved_tensors, ctx.length), None, None


_fusion_op = register(
    "window_fusion(Tensor windows, Tensor starts, Tensor weights, SymInt length) -> Tensor",
    _fusion,
    _fusion_fake,
    _fusion_backward,
    _fusion_save,
)
_fusion_out_op = register(
    "window_fusion_out(Tensor windows, Tensor starts, Tensor weights, Tensor(a!) out) -> ()",
    _fusion_out,
    lambda *_: None,
)
_fusion_grad_op = register(
    "window_fusion_backward(Tensor grad, Tensor starts, Tensor weights) -> Tensor",
    _fusion_grad,
    _fusion_grad_fake,
    _fusion_grad_backward,
    _fusion_grad_save,
)


# ---- fused_window_step -----------------------------------------------------------------------------------------------
def _step(x_t: Tensor, predictions: list[Tensor], coefficients: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    out = empty(x_t.shape, x_t)
    native.window_fusion(out, rows(x_t), [rows(p) for p in predictions], coefficients, starts, weights)
    return out


def _step_out(
    x_t: Tensor, predictions: list[Tensor], coefficients: Tensor, starts: Tensor, weights: Tensor, out: Tensor
) -> None:
    native.window_fusion(out, rows(x_t), [rows(p) for p in predictions], coefficients, starts, weights)


def _step_grad(
    grad: Tensor, coefficients: Tensor, starts: Tensor, weights: Tensor, dtype: torch.dtype, need: list[bool]
) -> tuple[Tensor, Tensor]:
    grad_x, grad_predictions = _step_grad_shapes(grad, coefficients, weights, dtype, need)
    native.window_fusion_backward(
        rows(grad),
        grad_x if need[0] else None,
        list(grad_predictions.unbind(0)) if need[1] else [],
        coefficients,
        starts,
        weights,
    )
    return grad_x, grad_predictions


def _step_grad_shapes(
    grad: Tensor, coefficients: Tensor, weights: Tensor, dtype: torch.dtype, need: list[bool]
) -> tuple[Tensor, Tensor]:
    channels, _, height, width = grad.shape
    shape = (coefficients.shape[1] - 1, weights.shape[0], channels, weights.shape[1], height, width)
    return empty(grad.shape if need[0] else (0,), grad), empty(shape if need[1] else (0,), grad, dtype)


def _step_grad_fake(
    grad: Tensor, coefficients: Tensor, starts: Tensor, weights: Tensor, dtype: torch.dtype, need: list[bool]
) -> tuple[Tensor, Tensor]:
    channels, _, height, width = grad.shape
    shape = (coefficients.shape[1] - 1, weights.shape[0], channels, weights.shape[1], height, width)
    grad_x = grad.new_empty(grad.shape if need[0] else (0,))
    return grad_x, grad.new_empty(shape if need[1] else (0,), dtype=dtype)


def _step_save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, predictions, coefficients, starts, weights = inputs
    ctx.save_for_backward(coefficients, starts, weights)
    ctx.dtype = predictions[0].dtype


def _step_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    coefficients, starts, weights = ctx.saved_tensors
    need = [ctx.needs_input_grad[0], any(ctx.needs_input_grad[1])]
    grad_x, grad_predictions = _step_grad_op(grad, coefficients, starts, weights, ctx.dtype, need)
    count = coefficients.shape[1] - 1
    per_prediction = list(grad_predictions.unbind(0)) if need[1] else [None] * count
    return grad_x if need[0] else None, per_prediction, None, None, None


_STEP = "Tensor x_t, Tensor[] predictions, Tensor coefficients, Tensor starts, Tensor weights"
_step_op = register(
    f"fused_window_step({_STEP}) -> Tensor", _step, lambda x_t, *_: x_t.new_empty(x_t.shape), _step_backward, _step_save
)
_step_out_op = register(f"fused_window_step_out({_STEP}, Tensor(a!) out) -> ()", _step_out, lambda *_: None)
_step_grad_op = register(
    "fused_window_step_backward(Tensor grad, Tensor coefficients, Tensor starts, Tensor weights, ScalarType dtype, "
    "bool[] need) -> (Tensor, Tensor)",
    _step_grad,
    _step_grad_fake,
)


# ---- tables ----------------------------------------------------------------------------------------------------------
def _as_table(op: str, name: str, value: Table | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        if dtype == torch.int64 and value.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must be integers, got {value.dtype}")
        if value.requires_grad:
            raise ValueError(f"{op}: {name} must not require a gradient: it is a constant of the op")
    return on_device(value, dtype, device).contiguous()


def _tables(
    op: str, windows: Tensor, starts: Tensor | Sequence[int], weights: Table, length: int
) -> tuple[Tensor, Tensor]:
    """Starts [n] int64 and weights [n, f] float64 on the device of the windows, checked."""
    count, frames = windows.shape[0], windows.shape[2]
    start_table = _as_table(op, "starts", starts, torch.int64, windows.device)
    weight_table = _as_table(op, "weights", weights, torch.float64, windows.device)
    check_shape(op, "starts", start_table, (count,), "n")
    check_shape(op, "weights", weight_table, (count, frames), "n, f")
    if length < 1:
        raise ValueError(f"{op}: length must be at least 1, got {length}")
    on_host = not any(isinstance(t, Tensor) and t.is_cuda for t in (starts, weights))
    if windows.is_cuda and on_host and not torch.compiler.is_compiling():
        # The CPU kernel finds uncovered frames itself; a CUDA kernel could not say so without a synchronisation.
        totals = _totals(torch.as_tensor(starts), torch.as_tensor(weights, dtype=torch.float64), length)
        if not bool((totals.isfinite() & (totals != 0)).all()):
            frame = int((~(totals.isfinite() & (totals != 0))).nonzero()[0])
            raise ValueError(
                f"{op}: weights of every frame must have a finite total other than 0, "
                f"got {float(totals[frame]):g} for frame {frame} of {length}"
            )
    return start_table, weight_table


def _frames(starts: Tensor, frames: int, length: int) -> Tensor:
    """Frame of the result under every slot, [n, f]."""
    return (starts[:, None] + torch.arange(frames, device=starts.device)) % length


def _totals(starts: Tensor, weights: Tensor, length: int) -> Tensor:
    index = _frames(starts, weights.shape[1], length).flatten()
    return weights.new_zeros(length).index_add(0, index, weights.flatten())


# ---- public ----------------------------------------------------------------------------------------------------------
def window_fusion(
    windows: Tensor, starts: Tensor | Sequence[int], weights: Table, length: int, out: Tensor | None = None
) -> Tensor:
    """Normalised weighted sum of the windows that cover each frame.

    ``out[:, l] = sum_{(i, j): (starts[i] + j) mod L = l} weights[i, j] windows[i, :, j] / sum weights[i, j]``. A frame
    that one window covers several times is counted several times. Slots of weight 0 are not read, so padding of short
    windows may hold anything. Gathered per output element: one pass, no atomics, the same bits every time.

    Args:
        windows: [n, C, f, H, W] float32, float64, bfloat16 or float16; any strides on the first four axes.
        starts: n first frames, integers of any sign, taken modulo ``length``. Host values or a tensor on any device.
            A CUDA graph keeps host values as they were at capture, and reads tensors of its device again.
        weights: [n, f], likewise; constants without a gradient. Builders are in :mod:`talkingdit.ops.window_weights`.
        length: frames of the result, L.
        out: preallocated result; inference only.

    Returns:
        [C, L, H, W] in the dtype of the windows.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit, or a frame has a total weight of 0 (nothing covers it).
            Where the tables are tensors on a CUDA device nobody can look, and such frames are filled with zeros.
        RuntimeError: ``out`` was given while a gradient is needed.
    """
    op = "window_fusion"
    check_dims(op, "windows", windows, "n, C, f, H, W")
    check_float(op, "windows", windows)
    start_table, weight_table = _tables(op, windows, starts, weights, length)
    if out is None:
        return _fusion_op(windows, start_table, weight_table, length)
    check_out(op, out, (windows.shape[1], length, *windows.shape[3:]), windows.dtype, [windows])
    _fusion_out_op(windows, start_table, weight_table, out)
    return out


def fused_window_step(
    x_t: Tensor,
    predictions: Tensor | Sequence[Tensor],
    coefficients: Table,
    starts: Tensor | Sequence[int],
    weights: Table,
    out: Tensor | None = None,
) -> Tensor:
    """One sampler step of all windows in one pass: combine predictions, update the latents, fuse.

    Window i becomes ``a x_t + sum_k b_k predictions[k][i]``, with ``x_t`` read at the window's frames, and all windows
    are fused as in :func:`window_fusion`. Nothing is rounded in between. Guidance and any linear sampler fold into the
    coefficients: for classifier-free guidance ``u + g (c - u)`` and an Euler step of size ``d``, they are
    ``(1, d g, d (1 - g))`` for the predictions ``(c, u)``.

    Args:
        x_t: latents [C, L, H, W], float32, float64, bfloat16 or float16.
        predictions: one to four tensors [n, C, f, H, W] of one dtype, or one tensor [K, n, C, f, H, W]; the dtype of
            ``x_t``, or bfloat16 or float16 for float32 latents. Any strides but on the last axis.
        coefficients: (a, b_1, ..., b_K) for all windows, or one such row per window [n, 1 + K]; without a gradient.
        starts, weights: as in :func:`window_fusion`.
        out: preallocated result, may be ``x_t``; inference only.

    Returns:
        [C, L, H, W] in the dtype of ``x_t``.

    Raises:
        TypeError, ValueError: as in :func:`window_fusion`; number of predictions or coefficients.
        RuntimeError: ``out`` was given while a gradient is needed.
    """
    op = "fused_window_step"
    check_dims(op, "x_t", x_t, "C, L, H, W")
    check_float(op, "x_t", x_t)
    parts = _predictions(op, x_t, predictions)
    start_table, weight_table = _tables(op, parts[0], starts, weights, x_t.shape[1])
    rates = _as_table(op, "coefficients", coefficients, torch.float64, x_t.device)
    rates = _coefficients(op, rates, parts[0].shape[0], len(parts))
    if out is None:
        return _step_op(x_t, parts, rates, start_table, weight_table)
    check_out(op, out, x_t.shape, x_t.dtype, [x_t, *parts])
    _step_out_op(x_t, parts, rates, start_table, weight_table, out)
    return out


def _predictions(op: str, x_t: Tensor, predictions: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(predictions, Tensor):
        check_dims(op, "predictions", predictions, "K, n, C, f, H, W")
        predictions = predictions.unbind(0)
    parts = list(predictions)
    if not 1 <= len(parts) <= _MAX_PREDICTIONS:
        raise ValueError(f"{op}: predictions must be one to {_MAX_PREDICTIONS} tensors, got {len(parts)}")
    for k, part in enumerate(parts):
        name = f"predictions[{k}]"
        check_tensor(op, name, part)
        check_dims(op, name, part, "n, C, f, H, W")
        expected = (parts[0].shape[0], x_t.shape[0], parts[0].shape[2], *x_t.shape[2:])
        check_shape(op, name, part, expected, "n, C, f, H, W")
        if part.device != x_t.device:
            raise ValueError(f"{op}: {name} must be on the device of x_t ({x_t.device}), got {part.device}")
        half = x_t.dtype == torch.float32 and part.dtype in (torch.bfloat16, torch.float16)
        if part.dtype != parts[0].dtype or not (part.dtype == x_t.dtype or half):
            raise TypeError(
                f"{op}: predictions must all be {x_t.dtype} like x_t (or bfloat16 or float16 for float32 latents), "
                f"got {part.dtype} for {name}"
            )
    return parts


def _coefficients(op: str, rates: Tensor, windows: int, predictions: int) -> Tensor:
    if (
        rates.dim() not in (1, 2)
        or rates.shape[-1] != 1 + predictions
        or (rates.dim() == 2 and rates.shape[0] != windows)
    ):
        raise ValueError(
            f"{op}: coefficients must be (a, b_1, ..., b_K) = {1 + predictions} numbers for {predictions} predictions, "
            f"or one such row for each of {windows} windows, got shape {tuple(rates.shape)}"
        )
    return rates if rates.dim() == 2 else rates.expand(windows, -1).contiguous()


# ---- references ------------------------------------------------------------------------------------------------------
def window_fusion_reference(windows: Tensor, starts: Tensor | Sequence[int], weights: Table, length: int) -> Tensor:
    """:func:`window_fusion` in plain PyTorch: add everything up, then divide by the total weight."""
    wide = windows if windows.dtype == torch.float64 else windows.float()
    first = torch.as_tensor(starts, device=windows.device)
    table = torch.as_tensor(weights, dtype=torch.float64, device=windows.device)
    index = _frames(first, windows.shape[2], length).flatten()
    weighted = (wide * table.to(wide.dtype)[:, None, :, None, None]).transpose(0, 1).flatten(1, 2)
    total = _totals(first, table, length).to(wide.dtype)
    summed = wide.new_zeros(windows.shape[1], length, *windows.shape[3:]).index_add(1, index, weighted)
    return (summed / total[:, None, None]).to(windows.dtype)


def fused_window_step_reference(
    x_t: Tensor,
    predictions: Tensor | Sequence[Tensor],
    coefficients: Table,
    starts: Tensor | Sequence[int],
    weights: Table,
) -> Tensor:
    """:func:`fused_window_step` in plain PyTorch: cut the latents, update every window, fuse."""
    wide = x_t if x_t.dtype == torch.float64 else x_t.float()
    parts = list(predictions)
    rates = torch.as_tensor(coefficients, dtype=torch.float64, device=x_t.device)
    rates = rates.expand(parts[0].shape[0], -1).to(wide.dtype)[..., None, None, None, None]
    first = torch.as_tensor(starts, device=x_t.device)
    cut = wide[:, _frames(first, parts[0].shape[2], x_t.shape[1])].transpose(0, 1)
    updated = rates[:, 0] * cut
    for k, part in enumerate(parts):
        updated = updated + rates[:, 1 + k] * part.to(wide.dtype)
    return window_fusion_reference(updated, starts, weights, x_t.shape[1]).to(x_t.dtype)
