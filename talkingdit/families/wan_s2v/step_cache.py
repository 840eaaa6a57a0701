# SPDX-License-Identifier: Apache-2.0
"""Which denoising steps of a clip are computed, and what is kept between them (`talkingdit.pipelines.step_cache`)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from talkingdit.errors import UserError
from talkingdit.pipelines.step_cache import (
    FILE,
    PUBLISHED,
    CachedSteps,
    Fitted,
    Recorder,
    decide,
    read_fitted,
    relative_change,
)

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.trunk import WanTrunk

BACKBONE, WIDTH = "wan2.1-t2v-14b", 5120  # whose coefficients serve a checkpoint of its width without its own


def fitted_for(model: WanTrunk, folder: Path) -> Fitted:
    """Coefficients for a checkpoint.

    Raises:
        UserError: it has none, and is not of the backbone that some were published for: another one's polynomial may
            be negative, and skip everything.
    """
    found = read_fitted(folder)
    if found is None and model.config["dim"] == WIDTH:
        return PUBLISHED[BACKBONE]
    if found is None:
        raise UserError(f"{folder}: has no {FILE}; `talkingdit calibrate` makes it.")
    return found


def cached_steps(
    model: WanTrunk,
    timesteps: Tensor,
    branches: int,
    threshold: float,
    folder: Path,
    recorder: Recorder | None = None,
) -> CachedSteps:
    """The steps of a clip.

    Args:
        timesteps: [S] in 0..1000, on the device of the model.
        branches: forward passes per step.
        threshold: of the step cache; 0 computes all steps.
        folder: of the checkpoint.
        recorder: of a calibration.
    """
    if recorder is not None:
        inputs = model.step_inputs(timesteps)
        changes = [float(relative_change(now, before)) for before, now in pairwise(inputs)]
        return CachedSteps(branches, changes=changes, recorder=recorder)
    if not threshold:
        return CachedSteps(branches)
    fitted = fitted_for(model, folder)
    return CachedSteps(branches, decide(model.step_inputs(timesteps, fitted.projected), threshold, fitted))


def warnings(threshold: float, folder: Path) -> tuple[str, ...]:
    """What whoever sets a threshold may want to know."""
    if not threshold or read_fitted(folder) is not None:
        return ()
    return (
        f"the step cache uses coefficients that were published for {BACKBONE}; `talkingdit calibrate` finds those of "
        "this checkpoint.",
    )
