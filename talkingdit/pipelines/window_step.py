# SPDX-License-Identifier: Apache-2.0
"""One denoising step of all windows of a stage: show them to the model, then guide, update and fuse in one pass.

Predictions are kept only until every window that covers their frames has been seen; then those frames are fused, in
place of the latents that no window needs any more. So a step holds the predictions of a few windows, however long the
video is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from talkingdit import ops
from talkingdit.distributed.team import ALONE, Team, gather
from talkingdit.pipelines.guidance import rescale_factors
from talkingdit.pipelines.plans import Plan, Windows

Predict = Callable[[Tensor, Tensor, int], Sequence[Tensor] | Tensor]
Coefficients = Callable[[int], Sequence[float]]


@dataclass(frozen=True)
class WindowSampler:
    """What a denoising loop needs besides noise and plan; arguments as of `long_video.denoise`."""

    sigmas: Tensor | Sequence[float]
    predict: Predict
    coefficients: Coefficients
    batch: int = 1
    computed: Callable[[int], bool] | None = None
    rescale: float | Callable[[int], float] = 0.0
    device: torch.device | str | None = None
    team: Team = field(default=ALONE, repr=False)

    def __post_init__(self) -> None:
        levels = [float(s) for s in self.sigmas]
        if len(levels) < 2 or not all(math.isfinite(s) for s in levels):
            raise ValueError(f"denoise: sigmas must be at least two finite noise levels, got {levels}")
        if self.batch < 1:
            raise ValueError(f"denoise: batch must be at least 1, got {self.batch}")
        if self.computed is not None and not self.computed(0):
            raise ValueError("denoise: computed must be true of step 0, as there is nothing to take from before")

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def update(self, step: int, predictions: list[Tensor]) -> tuple[list[int], Tensor]:
        """The step's update a x + sum_k b_k p_k of n windows.

        Args:
            predictions: K of [n, C, f, H, W], without padding.

        Returns:
            Which predictions count, K' indices, and (a, b_1, ..., b_K') of them, [n, 1 + K'] float64.

        Raises:
            ValueError: the coefficients of the step are not as many as predictions, or one more, or not finite.
        """
        row, count = [float(c) for c in self.coefficients(step)], len(predictions)
        if not all(math.isfinite(c) for c in row) or len(row) not in (count, count + 1):
            raise ValueError(
                f"denoise: coefficients({step}) must be {count} finite numbers for {count} predictions, or "
                f"{count + 1} for a sampler's whole update, got {row}"
            )
        if len(row) == count:
            size = float(self.sigmas[step + 1]) - float(self.sigmas[step])
            row = [1.0, *(size * weight for weight in row)]
        counts = [k for k in range(count) if row[1 + k] != 0.0] or [0]
        rows = torch.tensor([[row[0], *(row[1 + k] for k in counts)]], dtype=torch.float64)
        rows = rows.repeat(predictions[0].shape[0], 1)
        phi = self.rescale(step) if callable(self.rescale) else self.rescale
        if phi and count > 1:
            factors = rescale_factors(predictions, row[1:], phi)
            rows = rows.to(factors.device)
            rows[:, 1:] *= factors[:, None]
        return counts, rows


@dataclass(frozen=True)
class _Seen:
    """Windows first to first + n of a step.

    Attributes:
        predictions: that count, K tensors [n, C, f, H, W].
        rows: their update, [n, 1 + K].
    """

    first: int
    predictions: list[Tensor]
    rows: Tensor

    @property
    def last(self) -> int:
        return self.first + self.predictions[0].shape[0]


class StageStep:
    """The steps of one stage, in place.

    Args:
        sampler: noise levels, model and guidance.
        plan: gives the windows.
        x: [C, L, H, W], the latents of the stage; written over.
        first: frame of the video that the stage begins with.
    """

    def __init__(self, sampler: WindowSampler, plan: Plan, x: Tensor, first: int) -> None:
        self.sampler, self.plan, self.x, self.first = sampler, plan, x, first
        self._last: list[Tensor] | None = None  # last predictions of every frame, K of [C, L, H, W], if they are wanted

    @torch.no_grad()
    def run(self, step: int) -> None:
        """One step of all windows."""
        computed = self.sampler.computed
        reused = computed is not None and not computed(step) and self._last is not None
        windows = self.plan.windows(self.x.shape[1], step)
        if windows.rounding is not None:
            self._run_rounded(windows, self._remembered(windows, step) if reused else self._seen(windows, step))
            return
        if reused:
            self._reuse(step)
            return
        fusion = _Fusion(windows, self.x)
        for seen in self._seen(windows, step):
            fusion.add(seen)
        fusion.finish()

    # ---- The model ---------------------------------------------------------------------------------------------------
    def _seen(self, windows: Windows, step: int) -> Iterator[_Seen]:
        """Predictions of all windows in order. Those of a team's round are made by its processes side by side."""
        groups, team = _groups(windows, self.sampler.batch), self.sampler.team
        for begin in range(0, len(groups), team.size):
            here = groups[begin : begin + team.size]
            # Who has nothing to do in the last round does what another does, as all must take part in the exchange.
            own = self._ask(windows, here[min(team.rank, len(here) - 1)], step)
            for group, predictions in zip(here, _exchange(own, team, self.sampler.batch), strict=False):
                kept = [p[: len(group)].to(self.x.device) for p in predictions]
                self._keep(windows, group, kept)
                counts, rows = self.sampler.update(step, [p[:, :, : windows.slots(group[0])] for p in kept])
                yield _Seen(group[0], [kept[k] for k in counts], rows)

    def _ask(self, windows: Windows, group: range, step: int) -> list[Tensor]:
        """What the model predicts for some windows of equal length: K tensors [n, C, f, H, W]."""
        slots = windows.slots(group[0])
        at = _frames(windows, group, slots, self.x.shape[1])
        # One copy of the frames that are asked for; the model's device holds no more.
        shown = torch.stack([self.x[:, row] for row in at.to(self.x.device)])
        shown = shown.to(self.sampler.device or self.x.device)
        frames = at + self.first
        if self.sampler.batch == 1:
            found, batched = self.sampler.predict(shown[0], frames[0], step), shown[0]
        else:
            found, batched = self.sampler.predict(shown, frames, step), shown
        if isinstance(found, Tensor):
            found = [found] if found.dim() == batched.dim() else list(found)
        for k, prediction in enumerate(found):
            if not isinstance(prediction, Tensor) or prediction.shape != batched.shape:
                got = tuple(prediction.shape) if isinstance(prediction, Tensor) else type(prediction).__name__
                raise ValueError(
                    f"denoise: predict must give tensors of the window's shape {tuple(batched.shape)}, got {got} for "
                    f"prediction {k} of frames {int(at[0, 0])} to {int(at[-1, -1])} in step {step}"
                )
        if not found:
            raise ValueError(f"denoise: predict must give at least one prediction, got none in step {step}")
        found = [self._typed(p if p.dim() == 5 else p[None]) for p in found]
        if len({p.dtype for p in found}) > 1:
            found = [p.to(self.x.dtype) for p in found]
        return [_pad(p, windows.frames) for p in found]

    def _typed(self, prediction: Tensor) -> Tensor:
        """In the type of the latents, but for 16-bit predictions of float32 latents, which are read as they are."""
        narrow = self.x.dtype == torch.float32 and prediction.dtype in (torch.bfloat16, torch.float16)
        return prediction if narrow else prediction.to(self.x.dtype)

    # ---- Predictions that are used again -----------------------------------------------------------------------------
    def _keep(self, windows: Windows, group: range, predictions: list[Tensor]) -> None:
        if self.sampler.computed is None:
            return
        if self._last is None or len(self._last) != len(predictions):
            shape = self.x.shape
            self._last = [torch.zeros(shape, dtype=p.dtype, device=p.device) for p in predictions]
        slots = windows.slots(group[0])
        begin = max(0, slots - self.x.shape[1])  # of a window that meets itself, the later slots count
        for last, prediction in zip(self._last, predictions, strict=True):
            for row, frames in enumerate(_frames(windows, group, slots, self.x.shape[1])):
                last[:, frames[begin:].to(last.device)] = prediction[row, :, begin:slots]

    def _reuse(self, step: int) -> None:
        """A step without the model: every frame is updated by its last predictions, whatever windows there would be."""
        assert self._last is not None
        last = [p[None] for p in self._last]
        counts, rows = self.sampler.update(step, last)
        whole = torch.ones(1, self.x.shape[1], dtype=torch.float64)
        ops.fused_window_step(self.x, [last[k] for k in counts], rows, [0], whole, out=self.x)

    def _remembered(self, windows: Windows, step: int) -> Iterator[_Seen]:
        """The last predictions of every frame as those of the step's windows."""
        assert self._last is not None
        for i in range(len(windows.starts)):
            at = _frames(windows, range(i, i + 1), windows.slots(i), self.x.shape[1])[0]
            last = [p[None, :, at.to(p.device)] for p in self._last]
            counts, rows = self.sampler.update(step, last)
            yield _Seen(i, [last[k] for k in counts], rows)

    # ---- Windows that are rounded before fusion ----------------------------------------------------------------------
    def _run_rounded(self, windows: Windows, all_seen: Iterable[_Seen]) -> None:
        """Each window's result is rounded by itself, as by programs whose windows are in a lower precision."""
        length, parts = self.x.shape[1], []
        for seen in all_seen:
            for i in range(seen.first, seen.last):
                slots, here = windows.slots(i), slice(i - seen.first, i - seen.first + 1)
                shown = self.x[:, _frames(windows, range(i, i + 1), slots, length)[0].to(self.x.device)]
                used = [p[here, :, :slots] for p in seen.predictions]
                whole = torch.ones(1, slots, dtype=torch.float64)
                parts.append(ops.fused_window_step(shown, used, seen.rows[here], [0], whole))
        _fuse_rounded(windows, parts, self.x)


class _Fusion:
    """The fusion of one step, frame by frame as they become complete.

    Args:
        windows: of the step.
        x: latents [C, L, H, W], written over.
    """

    def __init__(self, windows: Windows, x: Tensor) -> None:
        self._windows, self._x = windows, x
        self._pending: list[_Seen] = []
        self._done = torch.zeros(x.shape[1], dtype=torch.bool)
        # The last window that each frame waits for. Windows longer than the stage meet themselves: all at once then.
        length, count = x.shape[1], len(windows.starts)
        self._complete = torch.full((length,), count - 1)
        self._at_once = windows.frames > length
        if not self._at_once:
            self._complete.fill_(-1)
            for i in range(count):
                slots = windows.slots(i)
                at = _frames(windows, range(i, i + 1), slots, length)[0]
                self._complete[at] = i  # also where it has no weight: it is shown these frames

    def add(self, seen: _Seen) -> None:
        """The predictions of the next windows."""
        self._pending.append(seen)
        if not self._at_once and seen.last < len(self._windows.starts):
            self._fuse(~self._done & (self._complete < seen.last))

    def finish(self) -> None:
        """After the last windows."""
        self._fuse(~self._done)

    def _fuse(self, ready: Tensor) -> None:
        for first, last in _runs(ready, self._borders()):
            self._fuse_run(first, last)
        self._done |= ready
        length = self._x.shape[1]

        def waits(seen: _Seen) -> bool:
            at = _frames(self._windows, range(seen.first, seen.last), self._windows.frames, length)
            return not bool(self._done[at].all())

        self._pending = [seen for seen in self._pending if waits(seen)]

    def _borders(self) -> set[int]:
        """Frames that a run of frames does not cross: where windows begin that wrap around the end."""
        length = self._x.shape[1]
        if self._at_once:
            return set()
        starts = [start % length for start in self._windows.starts]
        return {start for start in starts if start + self._windows.frames > length}

    def _fuse_run(self, first: int, last: int) -> None:
        """Frames first to last, which all windows that cover them have been seen for."""
        length, windows = self._x.shape[1], self._windows
        whole = first == 0 and last == length
        starts, tables, used = [], [], []  # of the windows that reach into the run
        for seen in self._pending:
            rows = range(seen.first, seen.last)
            at = _frames(windows, rows, windows.frames, length)
            table = windows.weights[seen.first : seen.last] * ((at >= first) & (at < last))
            if not table.any():
                continue
            used.append(seen)
            tables.append(table)
            # Slots outside the run have weight 0; where those inside begin, the others fall anywhere.
            starts += [self._start(i, first, last, whole) for i in rows]
        predictions = [_joined([seen.predictions[k] for seen in used]) for k in range(len(used[0].predictions))]
        gains, weights = _joined([seen.rows for seen in used]), torch.cat(tables)
        here = self._x[:, first:last]
        if whole:
            ops.fused_window_step(here, predictions, gains, starts, weights, out=self._x)
        else:
            here.copy_(ops.fused_window_step(here, predictions, gains, starts, weights))

    def _start(self, index: int, first: int, last: int, whole: bool) -> int:
        """First frame of a window in the run's own count."""
        start, length = self._windows.starts[index], self._x.shape[1]
        if whole:
            return start
        start %= length
        wraps = start + self._windows.frames > length and first < start
        return start - first - (length if wraps else 0)


def _fuse_rounded(windows: Windows, parts: list[Tensor], x: Tensor) -> None:
    """Results of windows [C, slots, H, W], rounded each, are written into the latents."""
    assert windows.rounding is not None
    if windows.curve is None:
        rounded = torch.stack([_pad(part.to(windows.rounding)[None], windows.frames)[0] for part in parts])
        ops.window_fusion(rounded.to(x.dtype), windows.starts, windows.weights, x.shape[1], out=x)
        return
    for i, part in enumerate(parts):
        at = _frames(windows, range(i, i + 1), part.shape[1], x.shape[1])[0].to(x.device)
        shared = min(len(windows.curve), part.shape[1]) if i else 0
        rise = windows.curve[:shared, None, None].to(part)
        part[:, :shared] = rise * part[:, :shared] + (1 - rise) * x[:, at[:shared]]
        x[:, at] = part.to(windows.rounding).to(x.dtype)


def _frames(windows: Windows, rows: range, slots: int, length: int) -> Tensor:
    """Frames of the stage under the slots of some windows, [n, slots] int64."""
    starts = torch.tensor([windows.starts[i] for i in rows], dtype=torch.int64)
    return (starts[:, None] + torch.arange(slots)) % length


def _groups(windows: Windows, batch: int) -> list[range]:
    """Neighbours of equal length, at most `batch` of them."""
    groups: list[range] = []
    for i in range(len(windows.starts)):
        open_group = groups[-1] if groups else range(0)
        if 0 < len(open_group) < batch and windows.slots(open_group[0]) == windows.slots(i):
            groups[-1] = range(open_group[0], i + 1)
        else:
            groups.append(range(i, i + 1))
    return groups


def _exchange(own: list[Tensor], team: Team, batch: int) -> list[list[Tensor]]:
    """The predictions of all processes, in the order of ranks; groups of fewer windows are filled up."""
    if team.size == 1:
        return [own]
    stacked = torch.stack(own)  # [K, n, C, f, H, W]
    filled = stacked.new_zeros(1, stacked.shape[0], batch, *stacked.shape[2:])
    filled[0, :, : stacked.shape[1]] = stacked
    assert dist.group.WORLD is not None
    return [list(part) for part in gather(filled, dist.group.WORLD)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pad(prediction: Tensor, frames: int) -> Tensor:
    """Slots behind a short window's frames; they have no weight and are never read."""
    if prediction.shape[2] == frames:
        return prediction
    padded = prediction.new_empty(*prediction.shape[:2], frames, *prediction.shape[3:])
    padded[:, :, : prediction.shape[2]] = prediction
    return padded


def _runs(ready: Tensor, borders: set[int]) -> Iterator[tuple[int, int]]:
    """Ranges of frames that are ready, cut at borders."""
    at = ready.nonzero().flatten().tolist()
    begin = 0
    for i in range(1, len(at) + 1):
        if i == len(at) or at[i] != at[i - 1] + 1 or at[i] in borders:
            yield at[begin], at[i - 1] + 1
            begin = i
