# SPDX-License-Identifier: Apache-2.0
"""Steps that are not computed: where a transformer's input has hardly changed, what its blocks added is used again.

TeaCache (arXiv:2411.19108; SkyReels-Audio, arXiv:2506.00830, table 4): with m_t the modulated input of a step, the
relative change |m_t - m_(t-1)|_1 / |m_(t-1)|_1, mapped by a polynomial that was fitted to the change of the outputs, is
added up from step to step; while the sum stays below a threshold, the step is skipped.

Wan's m_t depends on the timestep alone, so the decisions of a whole video are known before its first step: `plan`. A
model whose m_t depends on the latents asks step by step: `compute`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from talkingdit.atomic import write_whole
from talkingdit.errors import UserError

FILE = "step_cache.json"  # in a checkpoint's folder: its own coefficients, from `talkingdit calibrate`


@dataclass(frozen=True)
class Fitted:
    """Coefficients of a backbone, published or fitted.

    Attributes:
        coefficients: of the polynomial, highest power first.
        first, last: steps at either end that are always computed.
        projected: m_t is the projected time embedding (six vectors per block) and not the embedding itself.
    """

    coefficients: tuple[float, ...]
    first: int = 1
    last: int = 1
    projected: bool = False


# From https://github.com/ali-vilab/TeaCache, by backbone; "-early" are the sets that compute the first five steps.
PUBLISHED = {
    "wan2.1-t2v-1.3b": Fitted((2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01), 1, 1),
    "wan2.1-t2v-14b": Fitted((-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404), 1, 1),
    "wan2.1-i2v-480p": Fitted((-3.02331670e02, 2.23948934e02, -5.25463970e01, 5.87348440e00, -2.01973289e-01), 1, 1),
    "wan2.1-i2v-720p": Fitted((-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683), 1, 1),
    "wan2.1-t2v-1.3b-early": Fitted(
        (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02), 5, 0, True
    ),
    "wan2.1-t2v-14b-early": Fitted(
        (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01), 5, 0, True
    ),
    "wan2.1-i2v-480p-early": Fitted(
        (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01), 5, 0, True
    ),
    "wan2.1-i2v-720p-early": Fitted(
        (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02), 5, 0, True
    ),
    "hunyuan-video": Fitted((7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02), 1, 1),
}


def relative_change(now: Tensor, before: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mean of |now - before| over the mean of |before|, a scalar in float32.

    Args:
        group: of processes that have a shard of both each, of any length; all get that of the whole.
    """
    now, before = now.float(), before.float()
    if group is None:
        return (now - before).abs().mean() / before.abs().mean()
    sums = torch.stack([(now - before).abs().sum(), before.abs().sum()])
    dist.all_reduce(sums, group=group)
    return sums[0] / sums[1]


class TeaCache:
    """Decides which steps of one guidance branch are computed. It goes on over several videos of as many steps.

    Args:
        coefficients: of the polynomial, highest power first (`PUBLISHED`, or those of `fit`).
        threshold: of the accumulated change; steps are skipped while the sum is below it. At 0 only those are where
            the sum is negative, as the polynomial can be for small changes.
        steps: of a video.
        first: steps at the beginning that are always computed, at least 1.
        last: steps at the end, likewise.

    Attributes:
        accumulated: mapped change since the last computed step.

    Raises:
        ValueError: a negative threshold, or numbers of steps that do not fit.
    """

    def __init__(
        self, coefficients: Sequence[float], threshold: float, *, steps: int, first: int = 1, last: int = 1
    ) -> None:
        if not 0 <= threshold < math.inf:
            raise ValueError(f"TeaCache: threshold must be a number of at least 0, got {threshold}")
        if steps < 1 or first < 1 or last < 0:
            raise ValueError(
                f"TeaCache: steps and first must be at least 1 and last at least 0, got {steps}, {first} and {last}"
            )
        if not coefficients or not all(math.isfinite(c) for c in coefficients):
            raise ValueError(f"TeaCache: coefficients must be finite numbers, got {list(coefficients)}")
        self.coefficients = tuple(float(c) for c in coefficients)
        self.threshold, self.steps, self.first, self.last = threshold, steps, first, last
        self.accumulated = 0.0
        self._step = 0
        self._before: Tensor | None = None

    def compute(self, modulated: Tensor, group: dist.ProcessGroup | None = None) -> bool:
        """Whether the step of this modulated input must be computed; reads one number from its device.

        Args:
            group: of context parallelism, whose processes have a shard of the input each. They decide as one.
        """
        before, self._before = self._before, modulated.detach()
        if before is None or self._always(self._step):
            return self._decide(None)
        return self._decide(float(relative_change(self._before, before, group)))

    def plan(self, modulated: Sequence[Tensor]) -> list[bool]:
        """As many decisions as inputs are given; the device is read once."""
        inputs = [x.detach() for x in modulated]
        pairs = [(now, before) for now, before in zip(inputs, [self._before, *inputs], strict=False)]
        steps = [(self._step + i) % self.steps for i in range(len(inputs))]
        wanted = [i for i, (_, before) in enumerate(pairs) if before is not None and not self._always(steps[i])]
        changes: dict[int, float] = {}
        if wanted:
            values = torch.stack([relative_change(*pairs[i]) for i in wanted])  # type: ignore[arg-type]
            changes = dict(zip(wanted, values.tolist(), strict=True))
        self._before = inputs[-1] if inputs else self._before
        return [self._decide(changes.get(i)) for i in range(len(inputs))]

    def _always(self, step: int) -> bool:
        return step < self.first or step >= self.steps - self.last

    def _decide(self, change: float | None) -> bool:
        """The next step's decision; None is a step that is computed whatever changed."""
        self._step = (self._step + 1) % self.steps
        if change is not None:
            mapped = 0.0
            for coefficient in self.coefficients:
                mapped = mapped * change + coefficient
            self.accumulated += mapped
            if self.accumulated < self.threshold:
                return False
        self.accumulated = 0.0
        return True


def fit(changes_in: Sequence[float], changes_out: Sequence[float], degree: int = 4) -> list[float]:
    """Coefficients, highest power first, of the polynomial that maps changes of inputs to changes of outputs.

    Least squares. The degree is at most what the number of different inputs bears.

    Raises:
        ValueError: fewer than two pairs, or of different numbers.
    """
    import numpy as np

    if len(changes_in) != len(changes_out) or len(set(changes_in)) < 2:
        raise ValueError(
            f"step cache: a fit takes as many changes of outputs as of inputs, and two different ones at least, "
            f"got {len(changes_in)} and {len(changes_out)}"
        )
    degree = min(degree, len(set(changes_in)) - 1)
    return [float(c) for c in np.polyfit(np.asarray(changes_in), np.asarray(changes_out), degree)]


class BlockCache:
    """What all blocks together added to the residual stream in the last step that was computed, of one branch.

    A model that is given one computes while `compute` is set, and keeps; else it adds what was kept, and no block runs.

    Attributes:
        compute: of the next step; set by who plans the steps.
        kept: [B, N, dim], of the tokens that the model reads its velocity from.
        measured: changes of the kept tensor from one computed step to the next, where `measure` is set.
    """

    def __init__(self, measure: bool = False) -> None:
        self.compute = True
        self.kept: Tensor | None = None
        self.measure = measure
        self.measured: list[float] = []

    def keep(self, added: Tensor) -> None:
        """After a computed step."""
        if self.measure and self.kept is not None:
            self.measured.append(float(relative_change(added, self.kept)))
        self.kept = added

    @property
    def skips(self) -> bool:
        """Whether the next step is taken from what was kept."""
        return not self.compute and self.kept is not None


# ---- A checkpoint's own coefficients ---------------------------------------------------------------------------------
def read_fitted(folder: Path) -> Fitted | None:
    """Those of a checkpoint's folder; None where it has none.

    Raises:
        UserError: the file holds something else.
    """
    file = folder / FILE
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        numbers = tuple(float(value) for value in values["coefficients"])
        fitted = Fitted(numbers, int(values["first"]), int(values["last"]), bool(values["projected"]))
        TeaCache(fitted.coefficients, 0.0, steps=1, first=fitted.first, last=fitted.last)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file}: expected coefficients of a step cache, as `talkingdit calibrate` writes them."
        ) from error
    return fitted


def fitted_of(folder: Path, backbone: str | None) -> Fitted:
    """Those of a checkpoint's folder, else those published for its backbone.

    Args:
        backbone: a name in `PUBLISHED`; None for a model that is of none: another one's polynomial may be negative, and
            skip everything.

    Raises:
        UserError: there are neither.
    """
    found = read_fitted(folder)
    if found is None and backbone is None:
        raise UserError(f"{folder}: has no {FILE}; `talkingdit calibrate` makes it.")
    return found or PUBLISHED[str(backbone)]


def borrowed(folder: Path, backbone: str) -> tuple[str, ...]:
    """What whoever sets a threshold may want to know of a checkpoint without coefficients of its own."""
    if read_fitted(folder) is not None:
        return ()
    return (
        f"the step cache uses coefficients that were published for {backbone}; `talkingdit calibrate` finds those of "
        "this checkpoint.",
    )


def write_fitted(file: Path, fitted: Fitted, **origin: Any) -> None:
    """Whole or not at all; ``origin`` says how the numbers were found.

    Raises:
        UserError: the disk is full, or the file cannot be written.
    """
    try:
        write_whole(file, (json.dumps(asdict(fitted) | origin, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error}).") from error


# ---- The steps of a clip ---------------------------------------------------------------------------------------------
@dataclass
class Recorder:
    """What calibration measures: pairs of changes, of the modulated input and of what the blocks added."""

    changes_in: list[float] = field(default_factory=list)
    changes_out: list[float] = field(default_factory=list)


class CachedSteps:
    """The steps of one clip: which are computed, and what is kept for every branch.

    Args:
        branches: forward passes per step, the most.
        computed: a decision per step; None computes all and keeps nothing.
        changes: of the modulated input between steps, for a recorder, which has every step computed.
    """

    def __init__(
        self,
        branches: int,
        computed: Sequence[bool] | None = None,
        changes: Sequence[float] = (),
        recorder: Recorder | None = None,
    ) -> None:
        self.computed, self._changes, self._recorder = computed, changes, recorder
        self._caches: list[BlockCache | None] = [None] * branches
        if computed is not None or recorder is not None:
            self._caches = [BlockCache(measure=recorder is not None) for _ in range(branches)]

    def begin(self, step: int, branches: int | None = None) -> list[BlockCache | None]:
        """What the forward passes of a step are given.

        Args:
            branches: how many this step has; None for the most. What was kept for the others is forgotten.
        """
        count = len(self._caches) if branches is None else branches
        for number, cache in enumerate(self._caches):
            if cache is not None:
                cache.compute = self.computed is None or self.computed[step]
                if number >= count:
                    cache.kept = None
        return self._caches[:count]

    def end(self) -> None:
        """After the last step: what was measured goes to the recorder."""
        for cache in self._caches:
            if cache is not None and self._recorder is not None:
                self._recorder.changes_in += self._changes
                self._recorder.changes_out += cache.measured


class WindowCaches:
    """What is kept for every window of a long video, and for every branch: windows do not mix.

    For plans whose windows stay where they are from step to step (`OverlapBlend`, `ChunkPrefix`). Where they move on
    (`ShiftFusion`), `denoise(computed=...)` keeps what was predicted for every frame instead, which also takes far less
    memory: latents, not tokens.

    Args:
        branches: forward passes per window and step.
        computed: a decision per step.
        host: what is kept waits in host memory, so that the device holds that of one window.
    """

    def __init__(self, branches: int, computed: Sequence[bool], host: bool = False) -> None:
        self.computed, self._branches, self._host = computed, branches, host
        self._caches: dict[tuple[int, int], list[BlockCache]] = {}

    def begin(self, step: int, frames: Tensor, device: torch.device | str | None = None) -> list[BlockCache]:
        """What the forward passes of a window are given.

        Args:
            frames: [f] of the window, as `long_video.denoise` tells them.
            device: of the model, with `host`.
        """
        key = (int(frames[0]), len(frames))
        caches = self._caches.setdefault(key, [BlockCache() for _ in range(self._branches)])
        for cache in caches:
            cache.compute = self.computed[step]
            if device is not None and cache.kept is not None:
                cache.kept = cache.kept.to(device)
        return caches

    def end(self, frames: Tensor) -> None:
        """After the forward passes of a window."""
        for cache in self._caches[int(frames[0]), len(frames)] if self._host else ():
            cache.kept = None if cache.kept is None else cache.kept.cpu()


def decide(inputs: Tensor, threshold: float, fitted: Fitted, breaks: Sequence[int] = ()) -> list[bool]:
    """Which steps of a clip are computed.

    Args:
        inputs: [S, ...], the modulated input of every step, of a model where it depends on the timestep alone.
        breaks: steps in rising order, 1 to S - 1, where the cache begins anew: what was kept is of other predictions.
    """
    steps, computed = len(inputs), list[bool]()
    for begin, end in pairwise((0, *breaks, steps)):
        # Of steps that are always computed, those that lie in this part.
        first, last = max(1, fitted.first - begin), max(0, fitted.last - (steps - end))
        cache = TeaCache(fitted.coefficients, threshold, steps=end - begin, first=first, last=last)
        computed += cache.plan(list(inputs[begin:end]))
    return computed


def changes_of(predictions: Sequence[object]) -> tuple[int, ...]:
    """The steps that make other predictions than the one before, of what every step makes."""
    return tuple(step for step, (before, now) in enumerate(pairwise(predictions), 1) if now != before)
