# SPDX-License-Identifier: Apache-2.0
"""The sequences that are measured, by name: those of real models, and a tiny one to try the code with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from talkingdit import ops

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class TokenShape:
    """One sample of a transformer: the video grid first, then a reference and packed history where the model has them.

    Attributes:
        grids: (frames, height, width) in tokens and the first temporal position of every segment.
        heads, dim: attention heads and their size; the model is ``heads * dim`` wide.
        audio: audio tokens per latent frame of the video.
        split: rotated channels for (t, h, w); as Wan splits them unless given.
        theta: base of the rotations.
    """

    name: str
    grids: Sequence[tuple[int, Grid]]
    heads: int
    dim: int
    audio: int = 5
    split: tuple[int, int, int] | None = None
    theta: float = 10000.0

    @property
    def video(self) -> Grid:
        return self.grids[0][1]

    @property
    def tokens(self) -> int:
        return sum(f * h * w for _, (f, h, w) in self.grids)

    @property
    def ends(self) -> list[int]:
        """Ends of the two ranges that are modulated differently: the video, and the rest (the last frame if none)."""
        frames, height, width = self.video
        frames -= len(self.grids) == 1
        return [frames * height * width, self.tokens]

    def layout(self) -> ops.RopeLayout:
        other = 2 * (self.dim // 6)
        segments = [ops.Segment(range(t, t + f), range(h), range(w)) for t, (f, h, w) in self.grids]
        return ops.RopeLayout(segments, split=self.split or (self.dim - 2 * other, other, other), theta=self.theta)

    def with_audio(self, audio: int) -> TokenShape:
        return replace(self, name=f"{self.name} x {audio}", audio=audio)


def _wan_s2v(name: str, height: int, width: int) -> TokenShape:
    """Wan-S2V-14B: 20 frames, a reference at t = 30, and 19 frames of history at three scales (1456 = 28 x 52 tokens
    per frame of 448 x 832)."""
    history = [(-1, (1, height, width)), (-3, (1, height // 2, width // 2)), (-19, (4, height // 4, width // 4))]
    return TokenShape(name, [(0, (20, height, width)), (30, (1, height, width)), *history], heads=40, dim=128)


TOKENS = {
    "cpu": [TokenShape("wan-1.3b-6240", [(0, (4, 30, 52))], heads=12, dim=128)],
    "cuda": [
        _wan_s2v("wan-s2v-14b-448x832", 28, 52),
        _wan_s2v("wan-s2v-14b-704x1024", 44, 64),
        # 129 frames of 704 x 704; ten audio vectors of four tokens per latent frame.
        TokenShape(
            "hunyuan-avatar-13b-704x704",
            [(0, (33, 44, 44))],
            heads=24,
            dim=128,
            audio=40,
            split=(16, 56, 56),
            theta=256.0,
        ),
        TokenShape("wan2.2-ti2v-5b-704x1280", [(0, (31, 22, 40))], heads=24, dim=128),  # 121 frames, patches of 32
        TokenShape("wan-1.3b-480x832", [(0, (21, 30, 52))], heads=12, dim=128),
    ],
    "quick": [TokenShape("tiny", [(0, (3, 4, 6)), (30, (1, 4, 6))], heads=2, dim=32)],
}
