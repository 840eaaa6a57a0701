# SPDX-License-Identifier: Apache-2.0
"""Flow matching: the straight path from data to noise, the timesteps drawn on it, and the loss on its velocity."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_sigmas(batch: int, shift: float, generator: torch.Generator | None = None) -> Tensor:
    """Logit-normal noise levels [B] in (0, 1), shifted towards noise: sigma' = s sigma / (1 + (s - 1) sigma).

    Logit-normal sampling and the shift are those of Stable Diffusion 3 (Esser et al. 2024, sections 3.1 and 5.3.2).
    """
    sigma = torch.sigmoid(torch.randn(batch, generator=generator))
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x_0 + sigma noise, for clean, noise [B, ...] and sigma [B]."""
    level = sigma.view(-1, *[1] * (clean.ndim - 1))
    return torch.lerp(clean, noise, level)


def velocity_loss(prediction: Tensor, clean: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean square error of every sample: [B].

    Args:
        prediction, clean, noise: [B, C, T, H, W]; the velocity to predict is noise - clean.
        weight: [B, 1, T, H, W], of mean one in every sample.
    """
    error = (prediction.float() - (noise - clean)) ** 2
    return (weight * error).mean(dim=(1, 2, 3, 4))
