# SPDX-License-Identifier: Apache-2.0
"""Weight tables for :func:`talkingdit.ops.window_fusion`.

Every fusion rule of the long-video papers is a table ``[n, f]`` of one weight per window and per frame of the window;
the kernels only ever compute the normalised weighted sum. All builders run on the host and return float64 CPU tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["counter_weights", "crossfade_weights", "fade_curve", "prefix_weights", "ramp_weights"]


def _check(op: str, name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def fade_curve(overlap: int, scheme: str = "linear") -> Tensor:
    """Weight of the newer window over the frames that it shares with the previous one.

    ``linear`` is ``linspace(0, 1, overlap)``; ``log`` is ``log(1 + u (e - 1))`` of that line, stretched to 0..1
    (StableAvatar, EchoMimicV3). The first value is 0, so the older window alone decides the first shared frame.

    Args:
        overlap: number of shared frames, 0 or more.
        scheme: ``"linear"`` or ``"log"``.

    Returns:
        ``[overlap]`` float64.

    Raises:
        ValueError: negative overlap or unknown scheme.
    """
    _check("fade_curve", "overlap", overlap, 0)
    line = torch.linspace(0, 1, overlap, dtype=torch.float64)
    if scheme == "linear":
        return line
    if scheme == "log":
        curve = torch.log1p(line * (math.e - 1))
        span = curve.max() - curve.min() if overlap > 1 else torch.ones((), dtype=torch.float64)
        return (curve - curve[:1]) / span
    raise ValueError(f'fade_curve: scheme must be "linear" or "log", got {scheme!r}')


def counter_weights(windows: int, frames: int) -> Tensor:
    """The plain average ``[n, f]``: every window that covers a frame counts once (Sonic, HunyuanVideo-Avatar)."""
    _check("counter_weights", "windows", windows, 1)
    _check("counter_weights", "frames", frames, 1)
    return torch.ones(windows, frames, dtype=torch.float64)


def ramp_weights(windows: int, frames: int, overlap: int, scheme: str = "linear") -> Tensor:
    """Overlap-add ramps: each window fades in over its first and out over its last ``overlap`` frames.

    The first window does not fade in and the last does not fade out. Ramps of neighbours add up to one, so with windows
    ``frames - overlap`` apart the table needs no normalisation. Unlike :func:`crossfade_weights` the order of the
    windows does not matter, also where more than two of them meet.

    Args:
        windows: number of windows n.
        frames: frames per window f.
        overlap: frames shared by neighbours, 0..f.
        scheme: see :func:`fade_curve`.

    Returns:
        ``[n, f]`` float64.

    Raises:
        ValueError: sizes out of range, unknown scheme.
    """
    table = counter_weights(windows, frames)
    if overlap > frames:
        raise ValueError(f"ramp_weights: overlap must not exceed the {frames} frames of a window, got {overlap}")
    rise = fade_curve(overlap, scheme)
    table[1:, :overlap] *= rise
    table[:-1, frames - overlap :] *= 1 - rise
    return table


def crossfade_weights(
    starts: Sequence[int], frames: int, length: int, curve: Tensor, valid: Sequence[int] | None = None
) -> Tensor:
    """Sequential cross-fade: windows are laid down in order, each over what is already there.

    Where frame ``l`` has been written before, the first ``len(curve)`` frames of the new window give
    ``w * new + (1 - w) * previous`` and later frames replace what was there; ``previous`` is the fused result so far.
    An empty curve makes later windows overwrite earlier ones, a curve of zeros keeps the earlier ones.
    The result depends on the order of the windows.

    Args:
        starts: first frame of each window; taken modulo ``length``, so it may be negative.
        frames: frames per window f.
        length: frames of the fused result L.
        curve: ``[overlap]`` weights of the newer window, see :func:`fade_curve`.
        valid: number of real frames of each window (default: all f); weights behind it are 0.

    Returns:
        ``[n, f]`` float64; the weights of a covered frame add up to one.

    Raises:
        ValueError: sizes out of range.
    """
    _check("crossfade_weights", "frames", frames, 1)
    _check("crossfade_weights", "length", length, 1)
    if valid is not None and len(valid) != len(starts):
        raise ValueError(
            f"crossfade_weights: valid must have one entry for each of {len(starts)} windows, got {len(valid)}"
        )
    rise = [float(w) for w in curve]
    table = torch.zeros(len(starts), frames, dtype=torch.float64)
    owners: list[list[tuple[int, int]]] = [[] for _ in range(length)]
    for i, start in enumerate(starts):
        for j in range(frames if valid is None else min(frames, valid[i])):
            there = owners[(start + j) % length]
            w = rise[j] if there and j < len(rise) else 1.0
            for past in there:
                table[past] *= 1.0 - w
            table[i, j] = w
            there.append((i, j))
    return table


def prefix_weights(starts: Sequence[int], frames: int, length: int, valid: Sequence[int] | None = None) -> Tensor:
    """Prefix wins: a frame belongs to the first window, in the given order, that covers it.

    Arguments, result and errors as for :func:`crossfade_weights`.
    """
    return crossfade_weights(starts, frames, length, torch.zeros(frames, dtype=torch.float64), valid)
