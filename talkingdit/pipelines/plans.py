# SPDX-License-Identifier: Apache-2.0
"""How a long video is cut for denoising: what is denoised together, what is given, with which weights, final when.

A plan knows nothing of models. It cuts a video of L latent frames into **stages**, one after the other, each of which
goes through all denoising steps, and every step of a stage into **windows** of frames, which the model sees:

    plan                                          stages               windows of a step
    ShiftFusion(window, stride, shift)            one, the whole       every `stride` frames, moved on from step to step
    OverlapBlend(window, overlap, ramp)           one, the whole       side by side, blended over what they share
    ChunkPrefix(window, overlap)                  chunk after chunk    one; its first frames are given, clean
    ClipPrefix(window)                            clip after clip      one; what is before is handed on by the model

The frames of a stage are final when it ends; those of a plan with one stage during its last step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, Protocol

import torch
from torch import Tensor

from talkingdit.ops.window_weights import counter_weights, crossfade_weights, fade_curve

__all__ = [
    "ChunkPrefix",
    "ClipPrefix",
    "OverlapBlend",
    "Plan",
    "Ramp",
    "ShiftFusion",
    "Stage",
    "Windows",
    "blend_curve",
]

Ramp = Literal["linear", "log", "open", "earlier", "later"]
HUNYUAN_AVATAR_WINDOW = 33  # latent frames; its released program knows no other


@dataclass(frozen=True)
class Windows:
    """The windows of one step, in the order in which the model sees them.

    Attributes:
        starts: n first frames, counted from the beginning of the stage and taken modulo its length.
        frames: slots of each window, f.
        weights: [n, f] float64, of every slot in the frame that it covers. Totals of frames need not be 1.
        valid: slots of each window that hold frames; those behind are padding of weight 0. None: all.
        rounding: type that the result of every window is rounded to before fusion, as by programs that keep windows
            in a lower precision; None does not round.
        curve: with `rounding`, [o] weights of a window over the frames of the one before; each is blended over what
            the ones before it left, and then rounded. None: rounded windows are averaged by `weights`.
    """

    starts: tuple[int, ...]
    frames: int
    weights: Tensor = field(repr=False, compare=False)
    valid: tuple[int, ...] | None = None
    rounding: torch.dtype | None = None
    curve: Tensor | None = field(default=None, repr=False, compare=False)

    def slots(self, index: int) -> int:
        """Frames of one window."""
        return self.frames if self.valid is None else self.valid[index]


@dataclass(frozen=True)
class Stage:
    """A part of a video that goes through all denoising steps by itself.

    Attributes:
        first, last: its frames, `last` not included.
        given: frames at its beginning that earlier stages made and the model is shown clean.
        hold: whether it is shown them clean in every step, or in the first one only.
        blend: [o] weights of this stage's result over its first o frames, which earlier stages have made too.
        final: frames of the video before this one do not change any more when the stage has ended.
    """

    first: int
    last: int
    given: int = 0
    hold: bool = True
    blend: tuple[float, ...] = ()
    final: int = 0


class Plan(Protocol):
    """What the engine asks a plan. Plans are frozen dataclasses; all is known before the first step."""

    def stages(self, length: int | None) -> Iterator[Stage]:
        """The stages of a video of so many latent frames; without end where the length is not known (None).

        Raises:
            ValueError: the plan needs to know the length.
        """

    def windows(self, length: int, step: int) -> Windows:
        """The windows of a step (0 is the first) over a stage of so many frames."""


def blend_curve(overlap: int, ramp: Ramp) -> Tensor:
    """Weight of what is newer over the frames that it shares with what is older, [overlap] float64.

    ``linear`` and ``log`` run from 0 to 1 (:func:`talkingdit.ops.fade_curve`), ``open`` is i / overlap and never
    reaches 1, ``earlier`` keeps the older frames (one-sided), ``later`` replaces them.
    """
    if ramp == "open":
        return torch.arange(overlap, dtype=torch.float64) / max(overlap, 1)
    if ramp in ("earlier", "later"):
        return torch.full((overlap,), float(ramp == "later"), dtype=torch.float64)
    return fade_curve(overlap, ramp)


def _check(plan: str, name: str, value: int, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{plan}: {name} must be an integer of {limit}, got {value!r}")


def _check_ramp(plan: str, ramp: str) -> None:
    if ramp not in ("linear", "log", "open", "earlier", "later"):
        raise ValueError(f'{plan}: ramp must be "linear", "log", "open", "earlier" or "later", got {ramp!r}')


def _whole(plan: str, length: int | None) -> Iterator[Stage]:
    if length is None:
        raise ValueError(f"{plan}: the length of the video must be known, as all of it is denoised together")
    return iter((Stage(0, length, final=length),))


@dataclass(frozen=True)
class ShiftFusion:
    """Windows that move on from step to step and wrap around the end of the video; every window counts once.

    Time-aware position shift fusion (Sonic, arXiv:2411.16331; HunyuanVideo-Avatar, arXiv:2505.20156, Algorithm 1).
    Step i has windows at 0, stride, 2 stride, ... < L, each minus the shift accumulated so far, i * shift, modulo L.

    Args:
        window: frames of a window. Frames that it covers more than once, where it is longer than the video, count so
            often.
        stride: from one window to the next; the window itself where they do not overlap.
        shift: frames that the windows move on with each step.
        cycle: the accumulated shift is taken modulo it; 0 never. None takes the rule of the released programs: for
            HunyuanVideo-Avatar's windows of 33 frames side by side, modulo the window, and no shift where one window
            covers the video; else Sonic's, which is never, also where its windows do not overlap.
        rounding: of each window's result, see `Windows`; such windows are averaged in the type of the latents.
    """

    window: int
    stride: int
    shift: int
    cycle: int | None = None
    rounding: torch.dtype | None = None

    def __post_init__(self) -> None:
        _check("ShiftFusion", "window", self.window, 1)
        _check("ShiftFusion", "stride", self.stride, 1, self.window)
        _check("ShiftFusion", "shift", self.shift, 0)
        if self.cycle is not None:
            _check("ShiftFusion", "cycle", self.cycle, 0)

    def stages(self, length: int | None) -> Iterator[Stage]:
        return _whole("ShiftFusion", length)

    def windows(self, length: int, step: int) -> Windows:
        moved = self._moved(length, step)
        starts = tuple(first - moved for first in range(0, length, self.stride))
        return Windows(starts, self.window, counter_weights(len(starts), self.window), rounding=self.rounding)

    def _moved(self, length: int, step: int) -> int:
        cycle = self.cycle
        if cycle is None and self.stride == self.window == HUNYUAN_AVATAR_WINDOW:
            cycle = self.window if self.window < length else 1
        return step * self.shift % cycle if cycle else step * self.shift


@dataclass(frozen=True)
class OverlapBlend:
    """Windows side by side, each blended over the frames that it shares with the one before.

    The bidirectional latent fusion of SkyReels-Audio (arXiv:2506.00830, Algorithm 1) with ``ramp="linear"``, and the
    loops of StableAvatar and EchoMimicV3. The first window is 0 to `window`; each further one begins `overlap` frames
    before the end of the one before; the last one ends with the video and may be shorter. In the blended frames

        z = w new + (1 - w) previous

    (the paper prints w - 1, with which the weights would not sum to one). What is fused is what both windows see in
    the next step, hence bidirectional.

    Args:
        window: frames of a window.
        overlap: frames that neighbours share, less than the window.
        ramp: w over the shared frames, see :func:`blend_curve`; ``"earlier"`` is one-sided fusion.
        blend_from: first step that blends; in the steps before, later windows replace what they share.
        tail: ``"short"`` lets the last window be shorter, ``"full"`` moves it back until it is a whole one (if the
            video has as many frames), so that it shares more.
        rounding: of each window's result after it was blended over the one before, see `Windows`.
    """

    window: int
    overlap: int
    ramp: Ramp = "linear"
    blend_from: int = 1
    tail: Literal["short", "full"] = "short"
    rounding: torch.dtype | None = None

    def __post_init__(self) -> None:
        _check("OverlapBlend", "window", self.window, 1)
        _check("OverlapBlend", "overlap", self.overlap, 0, self.window - 1)
        _check("OverlapBlend", "blend_from", self.blend_from, 0)
        _check_ramp("OverlapBlend", self.ramp)
        if self.tail not in ("short", "full"):
            raise ValueError(f'OverlapBlend: tail must be "short" or "full", got {self.tail!r}')

    def stages(self, length: int | None) -> Iterator[Stage]:
        return _whole("OverlapBlend", length)

    def windows(self, length: int, step: int) -> Windows:
        frames = min(self.window, length)
        starts = [0]
        while starts[-1] + frames < length:
            starts.append(starts[-1] + frames - self.overlap)
        if self.tail == "full":
            starts[-1] = min(starts[-1], length - frames)
        valid = [min(frames, length - start) for start in starts]
        curve = blend_curve(self.overlap if step >= self.blend_from else 0, self.ramp)
        weights = crossfade_weights(starts, frames, length, curve, valid)
        return Windows(tuple(starts), frames, weights, tuple(valid), self.rounding, curve)


@dataclass(frozen=True)
class ChunkPrefix:
    """Chunk after chunk, each of which begins with the last latents of the one before (Gloria, sections 4.3 and 7.2).

    A chunk's first frames are those that it shares with the one before. The model is shown `given` of them clean;
    what it makes of the shared frames is blended over what the chunk before made of them, at the clean latent level.
    Chunks depend on their last `overlap` frames alone, so a video of any length, also of one that is not known, takes
    the memory of one.

    Args:
        window: frames of a chunk; the last one may be shorter.
        overlap: frames that neighbours share.
        given: so many of them are shown clean; None shows all.
        hold: shown clean in every step (True), or only put in place of the noise before the first (False).
        ramp: weight of the newer chunk over the shared frames, see :func:`blend_curve`.
    """

    window: int
    overlap: int = 4
    given: int | None = None
    hold: bool = True
    ramp: Ramp = "linear"

    def __post_init__(self) -> None:
        _check("ChunkPrefix", "window", self.window, 1)
        _check("ChunkPrefix", "overlap", self.overlap, 0, self.window - 1)
        if self.given is not None:
            _check("ChunkPrefix", "given", self.given, 0, self.overlap)
        _check_ramp("ChunkPrefix", self.ramp)

    def stages(self, length: int | None) -> Iterator[Stage]:
        given = self.overlap if self.given is None else self.given
        curve = tuple(blend_curve(self.overlap, self.ramp).tolist())
        for index in count():
            first = index * (self.window - self.overlap)
            last = first + self.window if length is None else min(first + self.window, length)
            end = last == length
            final = last if end else last - self.overlap
            yield Stage(first, last, final=final) if index == 0 else Stage(first, last, given, self.hold, curve, final)
            if end:
                return

    def windows(self, length: int, step: int) -> Windows:
        return Windows((0,), length, counter_weights(1, length))


@dataclass(frozen=True)
class ClipPrefix:
    """Clip after clip without shared latents: what a clip is told of the ones before, its model hands on (Wan-S2V).

    Args:
        window: frames of a clip; the last one may be shorter.
    """

    window: int

    def __post_init__(self) -> None:
        _check("ClipPrefix", "window", self.window, 1)

    def stages(self, length: int | None) -> Iterator[Stage]:
        for first in count(0, self.window):
            if length is not None and first >= length:
                return
            last = first + self.window
            last = last if length is None else min(last, length)
            yield Stage(first, last, final=last)

    def windows(self, length: int, step: int) -> Windows:
        return Windows((0,), length, counter_weights(1, length))
