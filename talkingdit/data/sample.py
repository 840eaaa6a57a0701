# SPDX-License-Identifier: Apache-2.0
"""What training data is: one clip (`Sample`), where clips come from (`Source`), and what may be asked of it.

T, H, W are latent frames, rows and columns; one latent frame is four frames of the video, one row or column eight
pixels. C is the number of latent channels. Latents are normalised as the model sees them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
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
    image: Tensor | None = None  # [L, image_dim] features of the reference, of a picture encoder
    given: Tensor | None = None  # [C, T, H, W] the clip, grey where a model that edits is to make it
    regions: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # name: [T, H, W] in 0..1
    voices: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # name: as `audio`, of several who speak
    outside: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # kind: [C, n, h, w], single frames
    inside: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # kind: [n], 1 for those that the clip has
    kind: str = VIDEO

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that it has, by name; those of a dictionary as `regions.face`."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                yield from ((f"{field.name}.{name}", tensor) for name, tensor in value.items())
            elif value is not None and not isinstance(value, str):
                yield field.name, value


def flaw(sample: Sample) -> str | None:
    """What makes a sample useless for training, one sentence without a key; None for a good one.

    One number that is not finite voids the step of all samples beside it, and tensors that do not belong to the same
    clip end a run in the middle of a model.
    """
    for name, tensor in sample.tensors():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            return f"{name} has values that are not finite ({bad} of {tensor.numel()})"
    channels, frames, height, width = sample.latents.shape
    wanted: dict[str, tuple[int | None, ...]] = {
        "audio": (None, None, 4 * frames),
        "audio_history": (None, None, None),
        "text": (None, None),
        "image": (None, None),
        "pose": (channels, frames, height, width),
        "given": (channels, frames, height, width),
        "reference": (channels, 1, height, width),
        "history": (channels, None, height, width),
    }
    voices = {f"voices.{name}": tensor for name, tensor in sample.voices.items()}
    wanted |= dict.fromkeys(voices, wanted["audio"])
    for name, shape in wanted.items():
        tensor = voices[name] if name in voices else getattr(sample, name)
        if tensor is None:
            continue
        got = tuple(tensor.shape)
        if len(got) != len(shape) or any(n not in (None, size) for n, size in zip(shape, got, strict=True)):
            expected = ", ".join("any" if n is None else str(n) for n in shape)
            return f"{name} must be [{expected}] beside latents {list(sample.latents.shape)}, got {list(got)}"
    return None


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
    """Where clips come from; map-style, cheap to ask for shapes, and picklable for worker processes.

    A source may also have `group(index)`, a name of the video that an item is of, the same in every run: clips of one
    video are then held out together. Without it every item is a video of its own.
    """

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


def group_of(source: Source, index: int) -> str:
    """Name of the video that an item is of."""
    named: Callable[[int], object] = getattr(source, "group", str)
    return str(named(index))
