# SPDX-License-Identifier: Apache-2.0
"""Which denoising steps of a clip are computed, and what is kept between them (`talkingdit.pipelines.step_cache`)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from talkingdit.pipelines.step_cache import (
    CachedSteps,
    Fitted,
    Recorder,
    borrowed,
    decide,
    fitted_of,
    relative_change,
)

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.trunk import WanTrunk

BACKBONE, WIDTH = "wan2.1-t2v-14b", 5120  # whose coefficients serve a checkpoint of its width without its own


def fitted_for(model: WanTrunk, folder: Path) -> Fitted:
    """Coefficients for a checkpoint; UserError where there are none."""
    return fitted_of(folder, BACKBONE if model.config["dim"] == WIDTH else None)


def cached_steps(
    model: WanTrunk,
    timesteps: Tensor,
    branches: int,
    threshold: float,
    folder: Path,
    recorder: Recorder | None = None,
    breaks: Sequence[int] = (),
) -> CachedSteps:
    """The steps of a clip.

    Args:
        timesteps: [S] in 0..1000, on the device of the model.
        branches: forward passes per step, the most.
        threshold: of the step cache; 0 computes all steps.
        folder: of the checkpoint.
        recorder: of a calibration.
        breaks: steps that make other predictions than the one before.
    """
    if recorder is not None:
        inputs = model.step_inputs(timesteps)
        changes = [float(relative_change(now, before)) for before, now in pairwise(inputs)]
        return CachedSteps(branches, changes=changes, recorder=recorder)
    if not threshold:
        return CachedSteps(branches)
    fitted = fitted_for(model, folder)
    return CachedSteps(branches, decide(model.step_inputs(timesteps, fitted.projected), threshold, fitted, breaks))


def warnings(threshold: float, folder: Path) -> tuple[str, ...]:
    """What whoever sets a threshold may want to know."""
    return borrowed(folder, BACKBONE) if threshold else ()
