# SPDX-License-Identifier: Apache-2.0
"""What training hands to a family and gets from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from talkingdit.checkpoints.weights import Weights
    from talkingdit.data import Source
    from talkingdit.nn.context_parallel import ContextParallel

GENERATE = "generate"  # the task that every model has: the whole clip, from its conditions
EDITED = "lower_face"  # region of a sample that a model that edits makes anew
ANCHORS = "anchors"  # frames from outside of the clip, which some models take


@dataclass(frozen=True)
class TrainAnchor:
    """A frame that stands beside a clip."""

    type: str
    kind: str  # of the type
    latents: Tensor  # [C, 1, h, w]


@dataclass(frozen=True, kw_only=True)
class TrainClip:
    """A sample as a model gets it: float32 tensors on the CPU without a batch axis, None for what it is not given."""

    latents: Tensor  # [C, T, H, W], noisy behind the first `prefix`
    timestep: Tensor  # [T] in 0..1000; 0 for the first `prefix`
    prefix: int = 0  # latent frames that are given clean
    audio: Tensor | None = None  # [layers, dim, 4 T]
    audio_history: Tensor | None = None  # [layers, dim, n], the newest last
    reference: Tensor | None = None  # [C, 1, H, W]
    history: Tensor | None = None  # [C, n, H, W], the newest last
    pose: Tensor | None = None  # [C, T, H, W]
    voices: Mapping[str, Tensor] = field(default_factory=dict)  # as `audio`, of several who speak, by name
    regions: Mapping[str, Tensor] = field(default_factory=dict)  # [T, H, W] in 0..1, by name
    outside: Mapping[str, Tensor] = field(default_factory=dict)  # [C, n, H, W], by kind
    image: Tensor | None = None  # [L, image_dim] features of the reference
    anchors: tuple[TrainAnchor, ...] = ()
    task: str = GENERATE
    given: Tensor | None = None  # [C, T, H, W] the clip, grey in its region `EDITED`


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """Samples that go through a model together.

    Args:
        clips: of equal shapes, or with `packed` of any.
        texts: features [L, text_dim] of each, on the device.
        packed: one sequence of all clips, or a batch axis.
        device: of the model.
        context: the processes that share the sequence, if any. Each gets the whole velocity; gradients of a parameter
            must add up over them.
    """

    clips: Sequence[TrainClip]
    texts: Sequence[Tensor]
    packed: bool
    device: torch.device
    context: ContextParallel | None = None


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """How videos are generated while a model trains: [sample] of a configuration."""

    steps: int
    text_guidance: float
    audio_guidance: float
    clips: int  # videos, where the family chooses what to generate
    seconds: float  # of each
    cases: Path | None  # manifest of images and voices, where the user does
    encoders: Path | None  # checkpoint with the parts that do not train
    max_area: int  # most pixels of a frame


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """What a family may know of a run.

    Args:
        out: folder of the run.
        seed: of the run.
        clip_latents: latent frames of a clip of generation.
        audio_context: feature frames before a clip that the audio encoder sees.
        shift: of the noise levels of its last stage, and so of generation.
        validation: how videos are generated on the way.
        data: [data] of the configuration: where a source that is the family's own has its files.
    """

    out: Path
    seed: int
    clip_latents: int
    audio_context: int
    shift: float
    validation: ValidationSettings
    data: Mapping[str, Any]


class Validator(Protocol):
    """Generates with a model while it trains, and measures what came out."""

    def run(
        self, transformer: Any, text_encoder: Any, step: int, show: Callable[[str, Tensor], None]
    ) -> dict[str, float]:
        """Every rank calls it at the same step, with weights as they are: parameters are gathered from all.

        Args:
            transformer, text_encoder: as `Train.build_networks` made them, in evaluation mode.
            step: of the run, for names of files.
            show: logs frames [n, 3, H, W] uint8 under a name; called on rank 0 alone.

        Returns:
            what was measured, by name; nothing on other ranks than 0.
        """


class Train(Protocol):
    """train.py: what is handed over stands above. Importing it loads no diffusers."""

    EXTRAS: frozenset[str]  # what stages may ask for beside the usual conditions: "anchors", tasks by name
    MAX_GROUPS: int  # most timesteps in a packed sequence: two per clip, or one per latent frame and one

    def build_networks(self, arguments: Mapping[str, Any], text_encoder: str) -> tuple[Any, Any]:
        """On the default device, with random weights: a transformer, a diffusers model with `text_dim` in its config,
        and the text encoder that trains along ("prompt") or None; UserError for a text encoder that it cannot have."""

    def open_weights(self, folder: Path) -> Weights:
        """Weights of a transformer to start from, by the names of its parameters."""

    def lacks_layers(self, folder: Path) -> bool:
        """Is there a model of another kind, from which `Load.load` with `init_from` makes one of the family?"""

    def velocities(self, transformer: Any, batch: TrainBatch) -> Tensor | Sequence[Tensor]:
        """The velocity of every clip: a tensor [n, C, T, H, W], or [C, T, H, W] of each."""

    def count_tokens(
        self, config: Mapping[str, Any], frames: int, height: int, width: int, reference: bool, history: int
    ) -> int:
        """Tokens of a clip of latents [frames, height, width] with its conditions in the model's sequence."""

    def attention_tokens(self, config: Mapping[str, Any]) -> float:
        """Tokens of a clip at which its attention costs as much as all else in a block."""

    def check_export(self, arguments: Mapping[str, Any], text_encoder: str, run: TrainRun) -> None:
        """Before a run begins: UserError for what `save` could not write at its end, such as settings of a transformer
        or of generation that the layout has no place for. A family that can write everything need not have it."""

    def save(self, folder: Path, transformer: Any, text_encoder: Any, run: TrainRun) -> None:
        """Write trained models, in the dtypes that they have, as a folder that generation reads."""

    def open_source(self, kind: str, name: str, run: TrainRun) -> Source:
        """A source of one of the kinds in `Family.sources`; every rank calls it."""

    def open_validator(self, run: TrainRun, device: torch.device, context: ContextParallel | None) -> Validator | None:
        """What generates and measures on the way, None where the run says nothing to do; every rank calls it."""
