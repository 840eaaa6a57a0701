# SPDX-License-Identifier: Apache-2.0
"""How much the loss at a noise level counts (`objective.weighting`), beside how often that level is drawn.

Every weighting has a mean of one over the levels that a stage draws, so that switching it on changes what is learned
and not how fast. With sigma the noise level, the signal-to-noise ratio of a straight path is ((1 - sigma) / sigma)^2.

| name | weight, up to the factor | after |
|---|---|---|
| bell | exp(-2 (sigma - 1/2)^2) - exp(-1/2) | DiffSynth-Studio's schedule for training (flow matching); ai-toolkit |
| half_bell | the same above 1/2, and that of 1/2 below | ai-toolkit's second table |
| logit_normal | density of the logit-normal at sigma | Stable Diffusion 3 (arXiv:2403.03206), equation 19 |
| cosmap | 2 / (pi (1 - 2 sigma + 2 sigma^2)) | the same, section 3.1; diffusers, musubi-tuner |
| sigma_sqrt | sigma^-2, of levels from 1/1000 on | diffusers, musubi-tuner |
| min_snr | sigma^2 min(snr, gamma) | min-SNR (arXiv:2303.09556) |

min-SNR weighs the error of x0 by min(snr, gamma); x0 is x - sigma velocity, so that error is sigma^2 the velocity's.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from training.losses import shifted
from training.sections import ObjectiveConfig

QUANTILES = 4096  # at which the mean over the drawn levels is taken
LEAST = 1e-3  # of sigma_sqrt, which has no bound; the least level of a table of 1000


def level_weight(sigma: float, objective: ObjectiveConfig) -> float:
    """Weight of the loss of a sample at a noise level in 0..1; 1 without a weighting."""
    if objective.weighting == "none":
        return 1.0
    o = objective
    drawn = (o.levels, o.mean, o.std, o.mode_scale, o.shift)
    how = (o.weighting, o.weighting_mean, o.weighting_std, o.snr_gamma)
    return float(_plain(torch.tensor([sigma], dtype=torch.float64), *how)) / _mean(drawn, how)


def _plain(sigma: Tensor, name: str, mean: float, std: float, gamma: float) -> Tensor:
    """Weights without the factor that makes their mean one."""
    if name in ("bell", "half_bell"):
        if name == "half_bell":
            sigma = sigma.clamp(min=0.5)
        return (torch.exp(-2 * (sigma - 0.5) ** 2) - math.exp(-0.5)).clamp(min=0)
    if name == "logit_normal":
        sigma = sigma.clamp(1e-9, 1 - 1e-9)
        far = (torch.logit(sigma) - mean) / std
        return torch.exp(-0.5 * far**2) / (std * math.sqrt(2 * math.pi) * sigma * (1 - sigma))
    if name == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    if name == "sigma_sqrt":
        return sigma.clamp(min=LEAST) ** -2
    return torch.minimum((1 - sigma) ** 2, gamma * sigma**2)


@lru_cache(maxsize=64)
def _mean(drawn: tuple[str, float, float, float, float], how: tuple[str, float, float, float]) -> float:
    """Mean of a weighting over the levels that are drawn."""
    return float(_plain(quantiles(QUANTILES, *drawn), *how).mean())


def quantiles(count: int, levels: str, mean: float, std: float, mode_scale: float, shift: float) -> Tensor:
    """Noise levels of which as many are drawn below the first as between any two: float64 [count], not sorted.

    Arguments as `sample_sigmas` has them.
    """
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if levels == "logit_normal":
        sigma = torch.sigmoid(mean + std * torch.special.ndtri(even))
    elif levels == "mode":
        sigma = 1 - even - mode_scale * (torch.cos(math.pi / 2 * even) ** 2 - 1 + even)
    else:
        sigma = even
    return shifted(sigma, shift)
