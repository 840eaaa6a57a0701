# SPDX-License-Identifier: Apache-2.0
"""What training data is: one clip (`Sample`), where clips come from (`Source`), and what may be asked of it.

T, H, W are latent frames, rows and columns; one latent frame is four frames of the video, one row or column eight
pixels. C is the number of latent channels. Latents are normalised as the model sees them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

VIDEO = "video"


class BrokenSample(Exception):
    """A sample that cannot be had: a file is missing, damaged or too short. Training goes on without it.

    Args:
        key: of the sample.
        reason: what is wrong, one sentence that names the file.
    """

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)  # both, so that it survives the way out of a worker process
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclass
class Sample:
    """A clip with everything known about it. Floating point tensors are float32 on the CPU.

    The latents of a clip are encoded behind its past, as generation decodes them: behind the frames of `history`, or,
    where a video begins (no history), behind the reference image.
    """

    key: str  # unique within the source
    source: str  # name of the source
    latents: Tensor  # [C, T, H, W]
    audio: Tensor | None = None  # [layers, dim, 4 T] features of the speech encoder, one column per frame
    caption: str = ""
    text: Tensor | None = None  # [L, text_dim] features of the caption, without padding
    reference: Tensor | None = None  # [C, 1, H, W]
    history: Tensor | None = None  # [C, n, H, W], newest last
    audio_history: Tensor | None = None  # [layers, dim, n] columns before `audio`, newest last
    pose: Tensor | None = None  # [C, T, H, W]
    regions: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # name: [T, H, W] in 0..1
    outside: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # kind: [C, n, H, W], frames not of the clip
    kind: str = VIDEO


@dataclass(frozen=True)
class Shape:
    """What is known of item i of a source before it is read."""

    frames: int  # latent frames, the most that can be asked for
    height: int  # latent rows
    width: int  # latent columns
    fps: float = 16.0  # frames per second; four per latent frame
    history: int = 0  # latent frames of history; 0: none
    reference: bool = True
    kind: str = VIDEO
    resizable: bool = False  # any other height and width may be asked for

    @property
    def seconds(self) -> float:
        return 4 * self.frames / self.fps


@dataclass(frozen=True)
class ClipRequest:
    """Which clip of an item is wanted; None leaves it to the source.

    Args:
        frames: latent frames; never more than `Shape.frames`.
        height, width: latent rows and columns, even. Other ones than those of the shape only where it is resizable.
        history: True asks for a clip that goes on, where the item has room for its past, False for one that begins a
            video. Items that are stored are what they are; of one with history it is left out where it is not wanted.
    """

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    history: bool | None = None

    def __post_init__(self) -> None:
        for name, low, step in (("frames", 1, 1), ("height", 2, 2), ("width", 2, 2)):
            value = getattr(self, name)
            if value is not None and (value < low or value % step):
                raise ValueError(f"ClipRequest: {name} must be a multiple of {step}, at least {low}, got {value}")


class Source(Protocol):
    """Where clips come from; map-style, cheap to ask for shapes, and picklable for worker processes."""

    name: str

    def __len__(self) -> int: ...

    def shape(self, index: int) -> Shape:
        """What item `index` offers, without decoding anything."""

    def sample(self, index: int, rng: np.random.Generator, clip: ClipRequest) -> Sample:
        """A clip of item `index`; what is left open is drawn with `rng` alone, so that it can be drawn again.

        Raises:
            BrokenSample: it cannot be read; nothing else is raised for what a file can do wrong.
            ValueError: the request does not fit the shape.
        """
