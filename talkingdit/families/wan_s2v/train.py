# SPDX-License-Identifier: Apache-2.0
"""How Wan-S2V is trained: what becomes of a batch, and which files a run begins from and ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.errors import UserError
from talkingdit.families.training import TrainBatch, TrainClip, TrainRun, Validator
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.packed import MAX_GROUPS as MAX_GROUPS
from talkingdit.families.wan_s2v.packed import PackedClip
from talkingdit.families.wan_s2v.sequence import tokens_of

if TYPE_CHECKING:
    from talkingdit.checkpoints.weights import Weights
    from talkingdit.data import Source
    from talkingdit.families.wan_s2v.model import WanS2VModel
    from talkingdit.nn.context_parallel import ContextParallel

EXTRAS: frozenset[str] = frozenset()


# ---- Models ----------------------------------------------------------------------------------------------------------


def build_networks(arguments: Mapping[str, Any], text_encoder: str) -> tuple[WanS2VModel, None]:
    """A transformer with random weights; its text features come with the data.

    Raises:
        UserError: a prompt encoder was asked for.
    """
    from talkingdit.families.wan_s2v.model import WanS2VModel

    if text_encoder == "prompt":
        raise UserError('model.text_encoder: must be "none", Wan-S2V trains on text features that come with the data.')
    return WanS2VModel(**arguments), None


def open_weights(folder: Path) -> Weights:
    """Weights of any kind of checkpoint that `talkingdit.models.load` takes, under their native names."""
    from talkingdit.families.wan_s2v.load import LOADER

    return LOADER.open_transformer(folder)[0]


def lacks_layers(folder: Path) -> bool:
    """Is this a Wan video model (T2V, I2V), without audio layers, history packer and token kinds?"""
    from talkingdit.families.wan_s2v.initialise import is_video_model

    return is_video_model(folder)


def check_export(arguments: Mapping[str, Any], text_encoder: str, run: TrainRun) -> None:
    """Whether `save` will have a place for a model of these arguments.

    Raises:
        UserError: it will not.
    """
    from talkingdit.families.wan_s2v.save import check_official

    check_official(arguments, "model.settings")


def save(folder: Path, transformer: WanS2VModel, text_encoder: None, run: TrainRun) -> None:
    """The layout of the released checkpoints: config.json and safetensors."""
    from talkingdit.families.wan_s2v.save import save_official

    save_official(folder, transformer)


# ---- Batches ---------------------------------------------------------------------------------------------------------


def velocities(transformer: Any, batch: TrainBatch) -> Tensor | Sequence[Tensor]:
    """Velocities of all clips, [n, C, T, H, W] of those of equal shapes, or of each of a packed sequence."""
    return run_packed(transformer, packed_clips(batch), batch.context) if batch.packed else _stacked(transformer, batch)


def packed_clips(batch: TrainBatch) -> list[PackedClip]:
    """The clips of a batch, on its device."""

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(batch.device, non_blocking=True)

    return [
        PackedClip(
            latents=clip.latents.to(batch.device, non_blocking=True),
            timestep=(clip.timestep if clip.prefix else clip.timestep[0]).to(batch.device),
            text=text,
            reference=move(clip.reference),
            history=move(clip.history),
            pose=move(clip.pose),
            audio=move(clip.audio),
            audio_history=move(clip.audio_history),
        )
        for clip, text in zip(batch.clips, batch.texts, strict=True)
    ]


def run_packed(transformer: Any, clips: Sequence[PackedClip], context: ContextParallel | None) -> Sequence[Tensor]:
    """Velocities [C, T, H, W] of packed clips."""
    velocities: Sequence[Tensor] = transformer.denoise_packed(clips, context=context)
    return velocities


def _stacked(transformer: Any, batch: TrainBatch) -> Tensor:
    """With a batch axis. Conditions that some of the clips lack are masked."""
    clips = batch.clips

    def stack(tensors: Sequence[Tensor] | None) -> Tensor | None:
        return None if tensors is None else torch.stack(list(tensors)).to(batch.device, non_blocking=True)

    inputs: dict[str, Any] = {
        name: stack(_with_zeros([getattr(clip, name) for clip in clips])) for name in ("reference", "pose", "audio")
    }
    inputs["drop_reference"] = [clip.reference is None for clip in clips]
    histories = _histories(clips)
    inputs["history"] = stack(histories)
    inputs["drop_history"] = [clip.history is None for clip in clips]
    if histories is not None:
        inputs["history_lengths"] = _history_lengths(clips, histories[0].shape[1])
    inputs["audio_history"] = stack(_audio_histories(clips))
    timestep = torch.stack([clip.timestep for clip in clips]).to(batch.device)
    if not any(clip.prefix for clip in clips):
        timestep = timestep[:, 0]
    length = max(len(text) for text in batch.texts)
    text = torch.stack([F.pad(text, (0, 0, 0, length - len(text))) for text in batch.texts])
    latents = torch.stack([clip.latents for clip in clips]).to(batch.device, non_blocking=True)
    velocities: Tensor = transformer(latents, timestep, WanInputs(text, **inputs), context=batch.context)
    return velocities


def _with_zeros(values: Sequence[Tensor | None]) -> list[Tensor] | None:
    """The values with zeros in place of those that are missing, which is what the model takes for "none"."""
    like = next((value for value in values if value is not None), None)
    return None if like is None else [torch.zeros_like(like) if value is None else value for value in values]


def _histories(clips: Sequence[TrainClip]) -> list[Tensor] | None:
    """Histories [C, n, H, W] with zeros in front up to the longest, or nothing but zeros."""
    like = next((clip.history for clip in clips if clip.history is not None), None)
    if like is None:
        return None
    longest = max(clip.history.shape[1] for clip in clips if clip.history is not None)
    whole = []
    for clip in clips:
        value = like[:, :0] if clip.history is None else clip.history
        front = value.new_zeros(value.shape[0], longest - value.shape[1], *value.shape[2:])
        whole.append(torch.cat([front, value], dim=1))
    return whole


def _history_lengths(clips: Sequence[TrainClip], longest: int) -> list[int] | None:
    """Latent frames of each history where they differ, else None."""
    lengths = [longest if clip.history is None else clip.history.shape[1] for clip in clips]
    return None if set(lengths) == {longest} else lengths


def _audio_histories(clips: Sequence[TrainClip]) -> list[Tensor] | None:
    """Features before the clips, continued to the past up to the longest as the model would do it alone."""
    lengths = [clip.audio_history.shape[-1] for clip in clips if clip.audio_history is not None]
    like = next((clip.audio for clip in clips if clip.audio is not None), None)
    if not lengths or like is None:
        return None
    whole = []
    for clip in clips:
        if clip.audio is None:
            past = like.new_zeros(*like.shape[:2], 1)
        else:
            past = clip.audio[..., :1] if clip.audio_history is None else clip.audio_history
        front = past[..., :1].expand(-1, -1, max(lengths) - past.shape[-1])
        whole.append(torch.cat([front, past], dim=-1))
    return whole


def count_tokens(config: Mapping[str, Any], frames: int, height: int, width: int, reference: bool, history: int) -> int:
    """Tokens of a clip in the model's sequence, see `talkingdit.families.wan_s2v.sequence.tokens_of`."""
    return tokens_of(config, frames, height, width, reference, history)


def attention_tokens(config: Mapping[str, Any]) -> float:
    """From 12 n dim^2 + 4 n dim ffn_dim operations of a block's products and 4 n^2 dim of its attention."""
    return float(3 * config["dim"] + config["ffn_dim"])


# ---- Sources and validation ------------------------------------------------------------------------------------------


def open_source(kind: str, name: str, run: TrainRun) -> Source:
    """Wan-S2V trains on what every family does.

    Raises:
        UserError: always.
    """
    raise UserError(f"data.sources.{name}.kind: Wan-S2V has none of its own, got {kind!r}.")


def open_validator(run: TrainRun, device: torch.device, context: ContextParallel | None) -> Validator | None:
    """Videos of the cases of a manifest, if the run names one."""
    if run.validation.cases is None:
        return None
    from talkingdit.families.wan_s2v.validate import WanS2VValidator

    return WanS2VValidator(run, device, context)
