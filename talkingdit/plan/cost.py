# SPDX-License-Identifier: Apache-2.0
"""What planning asks a family for, and what it is given.

A family's cost.py fulfils `Cost`. Numbers are bytes and floating point operations; `size` is the bytes of an element in
the dtype of computing, `config` is that of the transformer with all defaults filled in (`Cost.complete`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from talkingdit.nn.units import Units
    from talkingdit.pipelines.memory import Memory
    from talkingdit.plan.clip import ClipShape
    from talkingdit.plan.run import MeshSizes, TrainingRun

# Parts that stand beside the transformer, by what reports call them.
TEXT_ENCODER = "text encoder"
AUTOENCODER = "autoencoder"
SPEECH_ENCODER = "speech encoder"

# Switches of `Memory` in the order in which they are tried: first those that change nothing in the video.
ALL_SWITCHES: tuple[dict[str, Any], ...] = (
    {"text_encoder": "cpu"},
    {"offload": "block"},
    {"vae": "tiled"},
    {"residual": "compute"},
    {"weights": "cast_fp8"},
    {"offload": "leaf"},
)


class Parameter(NamedTuple):
    """A parameter of the transformer."""

    shape: tuple[int, ...]
    float32: bool  # also where the rest is narrower


@dataclass(frozen=True)
class FrozenParts:
    """Bytes of what stands beside the transformer, by name; `width` is that of the autoencoder's elements."""

    sizes: Mapping[str, int]
    width: int = 4


@dataclass(frozen=True)
class SpeechCost:
    """What hearing a voice takes.

    Args:
        hearing: bytes on the card at the worst moment of the speech encoder, beyond its weights, per second of what it
            hears at once; 0 where it works on the host.
        features: bytes of its features per second of voice.
        fps: video frames per second.
    """

    hearing: float
    features: float
    fps: float


@dataclass(frozen=True)
class Activations:
    """What one rank keeps and sends of one micro-batch in training.

    Args:
        streams: by unit of the walk, of the residual stream that it is given, which is kept for its backward.
        kept: by unit of the walk, what it keeps for its backward besides.
        working: by unit of the walk, what is alive in its backward beyond the stream and what it keeps.
        multiplying: of that, what is alive while one of its frozen matrices multiplies.
        again: by unit of the walk, what it has beyond what it keeps when it was made again for its backward.
        conditions: inputs and what is made of them before the first unit.
        attending: units of the walk whose attention is over the whole sequence.
        exchanged: one of q, k, v of the rank's tokens in one of them.
        output: what the rank's tokens give in the end.
    """

    streams: Mapping[str, float]
    kept: Mapping[str, float]
    working: Mapping[str, float]
    multiplying: Mapping[str, float]
    again: Mapping[str, float]
    conditions: float
    attending: frozenset[str]
    exchanged: float
    output: float


class Cost(Protocol):
    """cost.py: imports neither torch nor diffusers before it counts parameters or tokens."""

    SUBSETS: Mapping[str, tuple[str, ...]]  # what can be trained alone, and how names of its parameters begin
    LORA_TARGETS: tuple[str, ...]  # ends of the names of linear layers that get adapters
    CAST: tuple[str, ...]  # beginnings of names: what casting narrows beside the large units
    SWITCHES: tuple[dict[str, Any], ...]  # switches that may help to fit a card, in the order to try them

    def complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the transformer with those that a preset leaves to their defaults."""

    def read_config(self, folder: Path) -> dict[str, Any]:
        """Arguments of the transformer of a checkpoint folder, from config.json alone; UserError for what is none."""

    def default_clip(self, config: Mapping[str, Any], folder: Path | None = None) -> ClipShape:
        """What the family generates where nothing else is said, or the checkpoint in a folder."""

    def frozen_parts(self, config: Mapping[str, Any], dtype: torch.dtype, folder: Path | None = None) -> FrozenParts:
        """Those that belong to this transformer: of a folder as far as it tells, else of the released model.

        A transformer that no released text encoder fits stands beside the parts that ship (plan/shipped.py). `dtype` is
        that of the transformer.
        """

    def parameters(self, config: Mapping[str, Any]) -> dict[str, Parameter]:
        """Every parameter of the transformer by name. Nothing is loaded."""

    def heads(self, config: Mapping[str, Any]) -> int:
        """Heads of attention, which Ulysses shares out."""

    def tokens(self, config: Mapping[str, Any], clip: ClipShape) -> tuple[int, int]:
        """Noisy tokens and all tokens of a sample."""

    def flops(self, config: Mapping[str, Any], clip: ClipShape, memory: Memory | None = None) -> float:
        """Of one forward of one branch: matrix products and attention, 2 per multiply-add."""

    def attention_flops(self, config: Mapping[str, Any], clip: ClipShape) -> float:
        """What of them is attention over the whole sequence."""

    def conditions(self, config: Mapping[str, Any], clip: ClipShape, memory: Memory, size: int) -> float:
        """Bytes kept for all steps of a clip, of every branch; ValueError for one that the model does not take."""

    def step(self, config: Mapping[str, Any], clip: ClipShape, memory: Memory, size: int) -> float:
        """Bytes of one forward at its worst moment, beyond weights and conditions."""

    def autoencoder(self, config: Mapping[str, Any], clip: ClipShape, memory: Memory, width: int) -> dict[str, float]:
        """Bytes by phase ("decode", "encode") at its worst moment; `width` is that of the autoencoder's elements."""

    def speech(self, config: Mapping[str, Any], folder: Path | None = None) -> SpeechCost:
        """Of the speech encoder, at the frame rate of the checkpoint in a folder or that of the family."""

    def activations(self, config: Mapping[str, Any], run: TrainingRun, mesh: MeshSizes, size: int) -> Activations:
        """Of a training step."""


class PlannedFamily(Protocol):
    """A family, as far as plans need it."""

    @property
    def cost(self) -> Cost: ...

    @property
    def units(self) -> Units: ...
