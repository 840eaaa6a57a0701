# SPDX-License-Identifier: Apache-2.0
"""Latents and frames that are not numbers are told, in the place of a video of noise or black."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from talkingdit.errors import UserError


def check_finite(video: Tensor, what: str, where: str, checkpoint: Path | str) -> None:
    """See that a clip holds numbers; one pass over it, which needs no memory.

    Args:
        video: [1, C, n, H, W] of any dtype and device.
        what: it is, "latents" or "frames".
        where: it was found, in words behind "in ... ": "clip 1 after step 2".
        checkpoint: whose models made it.

    Raises:
        UserError: it holds NaN or infinity.
    """
    if not video.is_floating_point() or bool(video.sum(dtype=torch.float32).isfinite()):
        return
    # Finite numbers whose sum is not are no fault.
    wrong = [i for i, frame in enumerate(video.unbind(2)) if not bool(frame.isfinite().all())]
    if not wrong:
        return
    got = "NaN" if bool(video[:, :, wrong[0]].isnan().any()) else "infinity"
    at = "latent frame" if what == "latents" else "frame"
    at = f"{at} {wrong[0]}" if len(wrong) == 1 else f"{at}s {wrong[0]} to {wrong[-1]}"
    raise UserError(
        f"{checkpoint}: expected finite {what}, got {got} in {where}, {at}; a weight is no number, or too large for "
        "the precision."
    )
