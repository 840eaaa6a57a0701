# SPDX-License-Identifier: Apache-2.0
"""History packing of Wan-S2V: older latent frames become fewer tokens (after FramePack, arXiv:2504.12626)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from talkingdit import ops
from talkingdit.nn.layers import Conv3d, lend
from talkingdit.ops._framepack_segments import bucket_grid

# Kernels of the buckets, newest bucket first: full size, halved and quartered in time, height and width.
KERNELS = ((1, 2, 2), (2, 4, 4), (4, 8, 8))


def packed_segments(
    buckets: Sequence[int], drop_mode: str, padding: str, height: int, width: int, add_last: int = 2
) -> list[ops.Segment]:
    """Places of the tokens that a `FramePacker` of these settings makes of latents of this height and width.

    A bucket that begins n frames before the clip starts at t = -n and strides over its range; heights and widths stride
    over the patch grid of the video, all truncated to integers.
    """
    total = sum(buckets)
    return ops.framepack_segments(
        _buckets(buckets, drop_mode, add_last), (height, width), range(-total, 0), padding=padding
    )


def packed_tokens(
    buckets: Sequence[int], drop_mode: str, padding: str, height: int, width: int, add_last: int = 2
) -> int:
    """How many tokens those are."""
    grids = [
        bucket_grid(len(bucket.indices(sum(buckets))), (height, width), bucket.kernel, padding)
        for bucket in _buckets(buckets, drop_mode, add_last)
    ]
    return sum(math.prod(grid) for grid in grids)


def _buckets(
    counts: Sequence[int], drop_mode: str, add_last: int, projections: Sequence[tuple[Tensor, Tensor]] | None = None
) -> list[ops.Bucket]:
    """The buckets that give tokens, newest first, in a buffer of sum(counts) frames."""
    found = []
    end = sum(counts)
    for i, (count, kernel) in enumerate(zip(counts, KERNELS, strict=True)):
        if drop_mode == "padd" or i >= 2 - add_last:
            weight, bias = (None, None) if projections is None else projections[i]
            found.append(ops.Bucket(range(end - count, end), kernel, weight, bias))
        end -= count
    return found


class FramePacker(nn.Module):
    """Packs the last latent frames of the past into tokens, newest bucket first.

    Args:
        channels: latent channels.
        dim: width of the transformer.
        buckets: latent frames per bucket, newest first; officially 1, 2 and 16.
        drop_mode: what `add_last` < 2 does with the newest buckets: "padd" zeroes their latents, "drop" leaves out
            their tokens.
        padding: for heights and widths that are not multiples of a kernel: "none" cuts the rest off (as the official
            convolutions do), "zero" and "replicate" fill up.
    """

    def __init__(self, channels: int, dim: int, buckets: Sequence[int], drop_mode: str, padding: str):
        super().__init__()
        if len(buckets) != 3 or any(n < 1 or n % kernel[0] for n, kernel in zip(buckets, KERNELS, strict=True)):
            raise ValueError(
                "FramePacker: zip_frame_buckets must be three frame counts, newest first, multiples of 1, 2 and 4, "
                f"got {list(buckets)}"
            )
        if drop_mode not in ("padd", "drop"):
            raise ValueError(f"FramePacker: framepack_drop_mode must be 'padd' or 'drop', got {drop_mode!r}")
        if padding not in ("none", "zero", "replicate"):
            raise ValueError(f"FramePacker: framepack_padding must be 'none', 'zero' or 'replicate', got {padding!r}")
        self.buckets = tuple(int(n) for n in buckets)
        self.drop_mode = drop_mode
        self.padding = padding
        self.proj, self.proj_2x, self.proj_4x = (
            Conv3d(channels, dim, kernel_size=kernel, stride=kernel) for kernel in KERNELS
        )

    def forward(self, latents: Tensor, add_last: int = 2) -> Tensor:
        """Latents [B, C, T, H, W], newest frame last -> tokens [B, N, dim].

        Missing frames of the past are zeros, more frames than the buckets hold are cut off.
        """
        frames = sum(self.buckets)
        projections = [lend(projection) for projection in (self.proj, self.proj_2x, self.proj_4x)]
        latents = latents[:, :, -frames:].to(projections[0][0].dtype)
        latents = F.pad(latents, (0, 0, 0, 0, frames - latents.shape[2], 0))
        if self.drop_mode == "padd" and add_last < 2:
            blank = sum(self.buckets[: 2 - add_last])
            latents = F.pad(latents[:, :, :-blank], (0, 0, 0, 0, 0, blank))
        return ops.framepack(
            latents, _buckets(self.buckets, self.drop_mode, add_last, projections), padding=self.padding
        )
