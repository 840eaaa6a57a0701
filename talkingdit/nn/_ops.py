# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch for ops that have no kernel yet; same contracts."""
# mypy: ignore-errors

from dataclasses import dataclass

import torch
import torch.nn.functional as F


def audio_attention(q, k, v, tokens_per_frame, token_offset=0):
    b, n, h, d = q.shape
    f = n // tokens_per_frame
    q = q.reshape(b * f, tokens_per_frame, h, d).transpose(1, 2)
    k, v = (z.flatten(0, 1).transpose(1, 2) for z in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, h, d)


@dataclass
class Bucket:
    frames: int
    kernel: tuple
    weight: torch.Tensor
    bias: torch.Tensor | None


def framepack(latents, buckets, padding="zero"):
    """buckets newest first"""
    out = []
    end = latents.shape[2]
    for b in buckets:
        x = latents[:, :, end - b.frames : end]
        end -= b.frames
        pads = [(-s) % k for s, k in zip(x.shape[2:], b.kernel, strict=True)]
        if any(pads):
            mode = {"zero": "constant", "replicate": "replicate"}[padding]
            x = F.pad(x, (0, pads[2], 0, pads[1], 0, pads[0]), mode=mode)
        out.append(F.conv3d(x, b.weight, b.bias, stride=b.kernel).flatten(2).transpose(1, 2))
    return torch.cat(out, 1)
