# SPDX-License-Identifier: Apache-2.0
"""Colours of later clips brought back to those of the first one.

Every clip goes on from pictures that were generated, decoded and encoded again, and a small shift of colour on each of
these ways adds up over a long video. Matching mean and spread per channel in Lab (Reinhard et al., "Color Transfer
between Images", 2001) to the first clip removes what adds up and leaves the motion alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LEAST_SPREAD = 0.5  # in Lab units (0..100); a channel with less, a grey picture, is shifted only
MOST_GAIN = 1.25  # a clip may differ in content: its contrast is changed by no more


def _to_lab(video: Tensor) -> np.ndarray:
    """[1, 3, F, H, W] in -1..1 -> [F, H, W, 3]: L in 0..100, a and b around 0."""
    import cv2

    rgb = ((video[0].float().cpu() + 1) / 2).permute(1, 2, 3, 0).numpy()
    return np.stack([cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2LAB) for frame in rgb])


def colours(video: Tensor) -> Tensor:
    """Mean and standard deviation per Lab channel over all pictures.

    Args:
        video: [1, 3, F, H, W] in -1..1.

    Returns:
        [2, 3] float32.
    """
    lab = _to_lab(video).astype(np.float64)
    return torch.from_numpy(np.stack([lab.mean((0, 1, 2)), lab.std((0, 1, 2))])).float()


def match_colours(video: Tensor, wanted: Tensor) -> Tensor:
    """The video with the mean and spread of another.

    Args:
        video: [1, 3, F, H, W] in -1..1.
        wanted: [2, 3] from `colours`.

    Returns:
        [1, 3, F, H, W] float32 in -1..1 on the same device. Contrast changes by a quarter at most.
    """
    import cv2

    lab = _to_lab(video)
    mean, spread = lab.mean((0, 1, 2), dtype=np.float64), lab.std((0, 1, 2), dtype=np.float64)
    target = wanted.double().numpy()
    gain = np.where(
        np.minimum(spread, target[1]) < LEAST_SPREAD,
        1.0,
        np.clip(target[1] / np.maximum(spread, LEAST_SPREAD), 1 / MOST_GAIN, MOST_GAIN),
    )
    matched = ((lab - mean) * gain + target[0]).astype(np.float32)
    rgb = np.stack([cv2.cvtColor(frame, cv2.COLOR_LAB2RGB) for frame in matched])
    return torch.from_numpy(rgb).permute(3, 0, 1, 2)[None].to(video.device).mul(2).sub(1).clamp(-1.0, 1.0)
