# SPDX-License-Identifier: Apache-2.0
"""How Wan I2V and families on it are trained: what becomes of a batch, and which files a run begins from and ends with.

A training clip has T latents behind that of its first frame, the reference, which is known: the model sees 1 + T, and
the velocity of the T counts. Where a clip is given its first latents clean (`TrainClip.prefix`), it goes on from a
chunk before: these are what is known, and there is no first frame in front. What is known is clean, at timestep 0, and
stands in the channels of what is known, too. So generation has it (`WanI2VSettings.held`, `unknown`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.errors import UserError
from talkingdit.families.training import TrainBatch, TrainClip, TrainRun, Validator
from talkingdit.families.wan_i2v.conditions import ExtraTokens, WanI2VInputs
from talkingdit.families.wan_i2v.load import LOADER
from talkingdit.families.wan_s2v.packed import MAX_GROUPS as _MOST
from talkingdit.families.wan_s2v.train import attention_tokens as attention_tokens

if TYPE_CHECKING:
    from talkingdit.checkpoints.weights import Weights
    from talkingdit.data import Source
    from talkingdit.families.wan_i2v.model import WanI2VModel
    from talkingdit.nn.context_parallel import ContextParallel

Settings = TypeVar("Settings")
EXTRAS: frozenset[str] = frozenset()
MAX_GROUPS = _MOST * 2 // 3  # of two per clip, as batches are counted: here they are three
FEATURES_PER_LATENT = 4

# ---- Models ----------------------------------------------------------------------------------------------------------


def build_networks(arguments: Mapping[str, Any], text_encoder: str) -> tuple[WanI2VModel, None]:
    """A transformer with random weights; its text features come with the data.

    Raises:
        UserError: a prompt encoder was asked for.
    """
    from talkingdit.families.wan_i2v.model import WanI2VModel

    check_text_encoder(text_encoder, "Wan I2V")
    return WanI2VModel(**arguments), None


def check_text_encoder(text_encoder: str, title: str) -> None:
    """Raises UserError for a prompt encoder."""
    if text_encoder == "prompt":
        raise UserError(f'model.text_encoder: must be "none", {title} trains on text features that come with the data.')


def open_weights(folder: Path) -> Weights:
    """Weights of any kind of checkpoint that `load` takes, under their native names."""
    return LOADER.open_transformer(folder)[0]


def lacks_layers(folder: Path) -> bool:
    """Is this a Wan text-to-video model, whose patch embedding has no channels for what is known?"""
    from talkingdit.families.wan_s2v.initialise import open_video_model

    shapes = open_video_model(folder).shapes
    try:
        return shapes["patch_embedding.weight"][1] == shapes["head.head.weight"][0] // 4
    except KeyError as error:
        raise UserError(f"{folder}: no {error} in it; not the weights of a Wan transformer.") from error


def check_export(arguments: Mapping[str, Any], text_encoder: str, run: TrainRun) -> None:
    """Whether `save` will find settings that generation takes.

    Raises:
        UserError: it will not.
    """
    from talkingdit.families.wan_i2v.checkpoint import WanI2VSettings

    checked(WanI2VSettings, run)


def checked(settings: Callable[..., Settings], run: TrainRun) -> Settings:
    """Settings of generation for a model that a run trains.

    Raises:
        UserError: they are impossible.
    """
    try:
        return settings(**trained_settings(run))
    except ValueError as error:
        said = str(error).removeprefix("pipeline.json: ")
        raise UserError(f"training: generation would not take the model that this run exports: {said}.") from error


def save(folder: Path, transformer: WanI2VModel, text_encoder: None, run: TrainRun) -> None:
    """The transformer as `load` reads it, and how generation gives it what it was given."""
    from talkingdit.checkpoints.saving import save_model
    from talkingdit.families.wan_i2v.checkpoint import WanI2VSettings

    save_model(transformer, folder)
    checked(WanI2VSettings, run).save(folder / "pipeline.json")


def trained_settings(run: TrainRun) -> dict[str, Any]:
    """Settings of generation for a model that a run has trained: a clip is a training clip behind its first frame."""
    return {
        "fps": int(run.data["fps"]),
        "chunk_latents": run.clip_latents + 1,
        "shift": run.shift,
        "steps": run.validation.steps,
        "unknown": "zeros",
        "held": True,
    }


# ---- Batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelClip:
    """A training clip as the model sees it, without a batch axis."""

    latents: Tensor  # [C, T', H, W]
    timestep: Tensor  # []
    held: int  # latents in front that are known
    inputs: WanI2VInputs  # with a batch of one
    first: int  # latents in front of the clip's own


def velocities(transformer: Any, batch: TrainBatch) -> Tensor | Sequence[Tensor]:
    """Velocities of all clips, [n, C, T, H, W] of those of equal shapes, or of each of a packed sequence."""
    return velocities_of(transformer, batch, model_clip)


def velocities_of(
    transformer: Any, batch: TrainBatch, make: Callable[[Any, TrainClip, Tensor, torch.device], ModelClip]
) -> Tensor | Sequence[Tensor]:
    """The same for a family that gives clips to its model in another way."""
    clips = [make(transformer, clip, text, batch.device) for clip, text in zip(batch.clips, batch.texts, strict=True)]
    if batch.packed:
        found = transformer.denoise_packed(
            [clip.latents for clip in clips],
            [clip.timestep for clip in clips],
            [clip.inputs for clip in clips],
            held=[clip.held for clip in clips],
            context=batch.context,
        )
        return [velocity[:, clip.first :] for velocity, clip in zip(found, clips, strict=True)]
    longest = max(clip.latents.shape[1] for clip in clips)
    latents = torch.stack([_longer(clip.latents, longest) for clip in clips])
    frames = torch.arange(longest, device=batch.device)
    timestep = torch.stack([torch.where(frames < clip.held, 0, clip.timestep) for clip in clips])
    inputs = stacked([clip.inputs for clip in clips], longest)
    found = transformer(latents, timestep, inputs, context=batch.context)
    own = batch.clips[0].latents.shape[1]
    return torch.stack([v[:, clip.first : clip.first + own] for v, clip in zip(found, clips, strict=True)])


def model_clip(transformer: Any, clip: TrainClip, text: Tensor, device: torch.device) -> ModelClip:
    """What the model is given of a training clip: see the beginning of this file."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    latents, timestep = move(clip.latents), clip.timestep[-1].to(device)
    known, first, audio = latents[:, : clip.prefix], 0, clip.audio
    if not clip.prefix and clip.reference is not None:
        known, first = move(clip.reference), 1
        latents = torch.cat([known, latents], dim=1)
        if audio is not None:  # the first frame is heard as long as any latent
            audio = torch.cat([audio[..., :1].expand(-1, -1, FEATURES_PER_LATENT), audio], dim=-1)
    inputs = WanI2VInputs(
        text[None],
        condition=known_condition(transformer, known[None], latents.shape[1]),
        image=None if clip.image is None or not transformer.config.image_dim else move(clip.image)[None],
        extra=tuple(
            ExtraTokens(move(anchor.latents)[None], [transformer.anchor_time(anchor.type, anchor.kind)])
            for anchor in clip.anchors
        ),
        audio=None if audio is None or not transformer.config.audio_inject_layers else move(audio)[None],
    )
    return ModelClip(latents, timestep, known.shape[1], inputs, first)


def known_condition(transformer: Any, known: Tensor, frames: int) -> Tensor:
    """Channels behind the noisy ones for clips whose first latents [B, C, n, H, W] are known, zeros for the rest."""
    channels = transformer.config.out_dim
    condition = transformer.known(known)[:, channels:]
    return F.pad(condition, (0, 0, 0, 0, 0, frames - known.shape[2]))


def stacked(clips: Sequence[WanI2VInputs], frames: int) -> WanI2VInputs:
    """Inputs with a batch of one as one batch. What some of them lack is zeros, or hidden from attention.

    Args:
        frames: latent frames of the longest; the others are padded.
    """
    length = max(clip.text.shape[1] for clip in clips)
    text = torch.cat([F.pad(clip.text, (0, 0, 0, length - clip.text.shape[1])) for clip in clips])
    lengths = [_frames(clip) for clip in clips]
    return WanI2VInputs(
        text,
        condition=torch.cat([_longer(clip.condition[0], frames)[None] for clip in clips if clip.condition is not None]),
        image=_with_zeros([clip.image for clip in clips]),
        extra=_extra(clips),
        audio=_with_zeros(
            [
                None if clip.audio is None else F.pad(clip.audio, (0, FEATURES_PER_LATENT * (frames - own)))
                for clip, own in zip(clips, lengths, strict=True)
            ]
        ),
        lengths=None if set(lengths) == {frames} else lengths,
    )


def _frames(clip: WanI2VInputs) -> int:
    assert clip.condition is not None
    return clip.condition.shape[2]


def _longer(x: Tensor, frames: int) -> Tensor:
    """[C, T, H, W] with zeros behind."""
    return F.pad(x, (0, 0, 0, 0, 0, frames - x.shape[1]))


def _with_zeros(values: Sequence[Tensor | None]) -> Tensor | None:
    """The values [1, ...] with zeros in place of those that are missing, which is what the model takes for "none"."""
    like = next((value for value in values if value is not None), None)
    return None if like is None else torch.cat([torch.zeros_like(like) if v is None else v for v in values])


def _extra(clips: Sequence[WanI2VInputs]) -> tuple[ExtraTokens, ...]:
    """The extra tokens of all clips, each place once; samples that have none there are said to have none."""
    places: dict[Any, list[Tensor | None]] = {}
    for i, clip in enumerate(clips):
        seen: dict[Any, int] = {}
        for extra in clip.extra:  # of several at one place the first stands with the first, and so on
            seen[extra.place] = seen.get(extra.place, 0) + 1
            places.setdefault((extra.place, seen[extra.place]), [None] * len(clips))[i] = extra.latents
    found = []
    for (place, _), latents in places.items():
        whole = _with_zeros(latents)
        assert whole is not None
        drop = [one is None for one in latents]
        found.append(ExtraTokens(whole, place[0], drop if any(drop) else False))
    return tuple(found)


def count_tokens(config: Mapping[str, Any], frames: int, height: int, width: int, reference: bool, history: int) -> int:
    """Tokens of a clip in the model's sequence: its own and those of its first frame."""
    return (frames + bool(reference)) * (height // 2) * (width // 2)


# ---- Sources and validation ------------------------------------------------------------------------------------------


def open_source(kind: str, name: str, run: TrainRun) -> Source:
    """Wan I2V trains on what every family does.

    Raises:
        UserError: always.
    """
    raise UserError(f"data.sources.{name}.kind: Wan I2V has none of its own, got {kind!r}.")


def open_validator(run: TrainRun, device: torch.device, context: ContextParallel | None) -> Validator | None:
    """None yet: videos of a run are made by `talkingdit generate` with what it exports.

    Raises:
        UserError: cases were asked for.
    """
    if run.validation.cases is None:
        return None
    raise UserError(
        "sample.cases: only Wan-S2V generates cases while it trains; use `talkingdit generate` on an export."
    )
