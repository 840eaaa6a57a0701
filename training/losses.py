# SPDX-License-Identifier: Apache-2.0
"""Flow matching: the straight path from data to noise, the noise levels drawn on it, and the loss on its velocity."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample_sigmas(
    batch: int,
    shift: float,
    generator: torch.Generator | None = None,
    levels: str = "logit_normal",
    mean: float = 0.0,
    std: float = 1.0,
    mode_scale: float = 1.29,
) -> Tensor:
    """Noise levels [B] in (0, 1), shifted towards noise: sigma' = s sigma / (1 + (s - 1) sigma).

    The three distributions and the shift are those of Stable Diffusion 3 (Esser et al. 2024, sections 3.1 and 5.3.2).

    Args:
        levels: "logit_normal" (of `mean` and `std`; a mean over 0 is more noise), "uniform", or "mode" (equation 20:
            `mode_scale` over 0 prefers the middle, under 0 the ends).

    Raises:
        ValueError: another name, or a mode scale with which levels would leave 0..1.
    """
    if levels == "logit_normal":
        sigma = torch.sigmoid(mean + std * torch.randn(batch, generator=generator))
    elif levels == "uniform":
        sigma = torch.rand(batch, generator=generator)
    elif levels == "mode":
        if not -1 <= mode_scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"sample_sigmas: mode_scale must be -1 to {2 / (math.pi - 2):.3f}, where no level occurs twice, "
                f"got {mode_scale:g}"
            )
        u = torch.rand(batch, generator=generator)
        sigma = 1 - u - mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    else:
        raise ValueError(f"sample_sigmas: levels must be 'logit_normal', 'uniform' or 'mode', got {levels!r}")
    return shifted(sigma, shift)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels in 0..1 moved towards noise (shift over 1)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x_0 + sigma noise, for clean, noise [B, ...] and sigma [B]."""
    level = sigma.view(-1, *[1] * (clean.ndim - 1))
    return torch.lerp(clean, noise, level)


def joint_weights(edited: Tensor, inside: float, outside: float | Tensor) -> Tensor:
    """Weights of the joint loss of image animation and video editing (SkyReels-Audio, arXiv:2506.00830, equation 2).

    w1 V + w2 (1 - V). The paper prints L_msk behind the second weight, which it does not define; both losses are taken
    to be the squared error of the velocity.

    Args:
        edited: V, [..., T, H, W] in 0..1: one where the model makes the video, the mask at the size of latents.
        inside, outside: w1 and w2.
    """
    return inside * edited + outside * (1 - edited)


def facial_gate(weights: Tensor, lips: Tensor | None, closed: bool) -> Tensor:
    """The gated facial mask loss (the same paper, section 2.3, after equation 2): M_lip * L where the gate is closed.

    Args:
        weights: [..., T, H, W] of the loss.
        lips: M_lip, of the same shape, in 0..1; None for a sample without, which passes as it is.
        closed: p < p_mask, drawn for the sample.
    """
    return weights * lips.to(weights.dtype) if closed and lips is not None else weights


def velocity_loss(prediction: Tensor, clean: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean square error of every sample: [B].

    Args:
        prediction, clean, noise: [B, C, T, H, W]; the velocity to predict is noise - clean.
        weight: [B, 1, T, H, W], of mean one in every sample.
    """
    error = (prediction.float() - (noise - clean)) ** 2
    return (weight * error).mean(dim=(1, 2, 3, 4))
