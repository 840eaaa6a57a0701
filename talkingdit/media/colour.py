# SPDX-License-Identifier: Apache-2.0
"""Colours of later clips brought back to those of the first one.

Every clip goes on from frames that were generated, decoded and encoded again, and a small shift of colour on each of
these ways adds up over a long video; videos that are denoised in windows drift too, mostly into the dark. Matching mean
and spread per channel in Lab (Reinhard et al., "Color Transfer between Images", 2001) to the first clip removes what
adds up and leaves the motion alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SPREAD = 0.5  # in Lab units (L is 0..100); a channel with less, as in grey frames, is shifted only
MOST_GAIN = 1.25  # a clip may differ in content: its contrast is changed by no more
CHUNK = 8  # frames converted at once

# Linear sRGB to XYZ in parts of the white point D65 (IEC 61966-2-1); rows sum to one.
RGB_TO_XYZ = (
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)
LAB = ((0.0, 116.0, 0.0), (500.0, -500.0, 0.0), (0.0, 200.0, -200.0))  # of the cube roots, L without its -16
LINEAR_LAB = 6 / 29  # cube roots below continue as a line


def _mix(matrix: Tensor, video: Tensor) -> Tensor:
    return torch.einsum("ij,bjthw->bithw", matrix.to(video), video)


def _matrices() -> tuple[Tensor, Tensor]:
    return torch.tensor(RGB_TO_XYZ, dtype=torch.float64), torch.tensor(LAB, dtype=torch.float64)


def _to_lab(video: Tensor) -> Tensor:
    """[1, 3, F, H, W] sRGB in -1..1 to L in 0..100, a and b around 0."""
    to_xyz, to_lab = _matrices()
    rgb = ((video.float() + 1) / 2).clamp(0, 1)
    xyz = _mix(to_xyz, torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92))
    root = torch.where(xyz > LINEAR_LAB**3, xyz.clamp(min=1e-9) ** (1 / 3), xyz / (3 * LINEAR_LAB**2) + 4 / 29)
    lab = _mix(to_lab, root)
    lab[:, 0] -= 16
    return lab


def _from_lab(lab: Tensor) -> Tensor:
    """The inverse of `_to_lab`; colours outside sRGB are cut off."""
    to_xyz, to_lab = _matrices()
    lab = lab.clone()
    lab[:, 0] += 16
    root = _mix(to_lab.inverse(), lab)
    xyz = torch.where(root > LINEAR_LAB, root**3, 3 * LINEAR_LAB**2 * (root - 4 / 29))
    rgb = _mix(to_xyz.inverse(), xyz).clamp(0, 1)
    rgb = torch.where(rgb > 0.04045 / 12.92, 1.055 * rgb.clamp(min=1e-9) ** (1 / 2.4) - 0.055, 12.92 * rgb)
    return (rgb * 2 - 1).clamp(-1.0, 1.0)


def colours(video: Tensor) -> Tensor:
    """Mean and standard deviation per Lab channel over all frames.

    Args:
        video: [1, 3, F, H, W] in -1..1.

    Returns:
        [2, 3] float32 on the CPU.
    """
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for part in video.split(CHUNK, dim=2):
        lab = _to_lab(part).double()
        sums += torch.stack([lab.sum((0, 2, 3, 4)), lab.square().sum((0, 2, 3, 4))]).cpu()
    mean, square = sums / (video.numel() / 3)
    return torch.stack([mean, (square - mean.square()).clamp(min=0).sqrt()]).float()


def match_colours(video: Tensor, wanted: Tensor) -> Tensor:
    """The video with the mean and spread of another.

    Args:
        video: [1, 3, F, H, W] in -1..1.
        wanted: [2, 3] from `colours`.

    Returns:
        [1, 3, F, H, W] float32 in -1..1 on the same device. Contrast changes by a quarter at most.
    """
    gain, shift = _correction(colours(video), wanted.cpu())
    return _corrected(video, gain.expand(video.shape[2], 3), shift.expand(video.shape[2], 3))


def _correction(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and shift [3] of Lab channels by which the mean and spread that were found become those wanted."""
    (mean, spread), (target, target_spread) = found, wanted
    gain = (target_spread / spread.clamp(min=LEAST_SPREAD)).clamp(1 / MOST_GAIN, MOST_GAIN)
    gain = torch.where(torch.minimum(spread, target_spread) < LEAST_SPREAD, torch.ones(3), gain)
    return gain, target - mean * gain


def _corrected(video: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """A video [1, 3, F, H, W] with a gain and a shift of its own [F, 3] for every frame."""
    done = []
    for part, gains, shifts in zip(video.split(CHUNK, dim=2), gain.split(CHUNK), shift.split(CHUNK), strict=True):
        rates, offsets = (row.T.to(video.device)[None, :, :, None, None] for row in (gains, shifts))
        done.append(_from_lab(_to_lab(part) * rates + offsets))
    return torch.cat(done, dim=2)


class ColourUnifier:
    """Colours of a long video kept as they are at its beginning, part by part, as parts of it become final.

    The color unification of SkyReels-Audio (arXiv:2506.00830, section 2.4), which does not say how. Here every part is
    brought to the mean and spread of the first one, and what changes from one part's correction to the next does so
    evenly over the frames, so that no border is seen. It knows nothing of what comes later, and keeps a few numbers.

    Args:
        wanted: [2, 3] from `colours`, such as those of the reference picture; None takes those of the first part, which
            stays as it is.
        strength: 1 corrects all, 0 nothing.
        reached: to go on behind a part, `reached` of the one that has corrected it.

    Attributes:
        wanted: see above; None before the first part.
        reached: gain and shift [2, 3] of the end of the last part; None before the first.

    Raises:
        ValueError: another strength.
    """

    def __init__(self, wanted: Tensor | None = None, strength: float = 1.0, reached: Tensor | None = None) -> None:
        if not 0 <= strength <= 1:
            raise ValueError(f"colours: strength must be 0 to 1, got {strength}")
        self.wanted, self.strength, self.reached = wanted, strength, reached

    def __call__(self, video: Tensor) -> Tensor:
        """The next part [1, 3, F, H, W] in -1..1, corrected: float32."""
        if self.wanted is None:
            self.wanted, self.reached = colours(video), torch.tensor([[1.0], [0.0]]).expand(2, 3)
            return video
        gain, shift = _correction(colours(video), self.wanted.cpu())
        now = torch.stack([1 + self.strength * (gain - 1), self.strength * shift])
        before = now if self.reached is None else self.reached.cpu()
        # The correction of a part holds in its middle; it reaches the one of this part there and keeps it.
        rise = ((torch.arange(video.shape[2]) + 0.5) / (video.shape[2] / 2)).clamp(max=1)[:, None, None]
        rows = before + rise * (now - before)
        self.reached = now
        return _corrected(video, rows[:, 0], rows[:, 1])
