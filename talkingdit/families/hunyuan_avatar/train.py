# SPDX-License-Identifier: Apache-2.0
"""How HunyuanVideo-Avatar is trained: what becomes of a batch (`samples.py`), which files begin and end a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.checkpoint import HunyuanAvatarSettings
from talkingdit.families.hunyuan_avatar.conditions import AvatarInputs
from talkingdit.families.hunyuan_avatar.config import RELEASED
from talkingdit.families.hunyuan_avatar.packed import PackedClip
from talkingdit.families.hunyuan_avatar.samples import EMOTION, FACE, STILL, emotion_track, split_text, voice_features
from talkingdit.families.hunyuan_avatar.sequence import MAX_CLIPS, tokens_of
from talkingdit.families.training import TrainBatch, TrainClip, TrainRun, Validator

if TYPE_CHECKING:
    from talkingdit.checkpoints.weights import Weights
    from talkingdit.data import Source
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel
    from talkingdit.nn.context_parallel import ContextParallel

EXTRAS: frozenset[str] = frozenset()
MAX_GROUPS = 2 * MAX_CLIPS  # batches count two per clip, of which there is one here
TYPICAL_TEXT = 256  # tokens

# ---- Models ----------------------------------------------------------------------------------------------------------


def build_networks(arguments: Mapping[str, Any], text_encoder: str) -> tuple[HunyuanAvatarModel, Any]:
    """A transformer and, for "prompt", the prompt encoder of the drawn world; both with random weights.

    Raises:
        UserError: a prompt encoder was asked for by a model that takes pooled features of another width.
    """
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel

    transformer = HunyuanAvatarModel(**arguments)
    width = transformer.config.text_states_dim
    transformer.register_to_config(text_dim=width)  # what training knows the width of text features by
    if text_encoder != "prompt":
        return transformer, None
    if transformer.config.text_states_dim_2 != width:
        raise UserError(
            f'model.text_encoder: "prompt" needs a model with text_states_dim_2 = text_states_dim = {width}, '
            f"got {transformer.config.text_states_dim_2}."
        )
    from talkingdit.families.puppet.text import PromptEncoder

    return transformer, PromptEncoder(width)


def open_weights(folder: Path) -> Weights:
    """Weights of any kind of checkpoint that `talkingdit.models.load` takes, under their native names."""
    from talkingdit.families.hunyuan_avatar.load import LOADER

    return LOADER.open_transformer(folder)[0]


def lacks_layers(folder: Path) -> bool:
    """Is this a HunyuanVideo model, without the layers for voices and a picture?"""
    from talkingdit.families.hunyuan_avatar.initialise import is_video_model

    return is_video_model(folder)


def check_export(arguments: Mapping[str, Any], text_encoder: str, run: TrainRun) -> None:
    """Whether generation will take what a run of these settings exports.

    Raises:
        UserError: it will not.
    """
    try:
        _settings(arguments, run)
    except ValueError as error:
        said = str(error).removeprefix("pipeline.json: ")
        raise UserError(f"training: generation would not take the model that this run exports: {said}.") from error


def _settings(arguments: Mapping[str, Any], run: TrainRun) -> HunyuanAvatarSettings:
    """What a model that is trained so tells those who generate with it."""
    if arguments.get("audio_window", RELEASED["audio_window"]) == RELEASED["audio_window"]:
        return HunyuanAvatarSettings(window=run.clip_latents, shift=run.shift, silence="none")
    return HunyuanAvatarSettings(
        fps=run.data["fps"],
        image_size=run.data["size"],
        size_multiple=16,
        window=run.clip_latents,
        shift_offset=max(1, run.clip_latents // 3),
        shift=run.shift,
        steps=run.validation.steps,
        text_guidance=run.validation.text_guidance,
        audio_guidance=run.validation.audio_guidance,
        early_steps=0,
        features="speech",
        silence="none",
        still="video",
        prompt_prefix="",
        negative_prompt="",
    )


def save(folder: Path, transformer: HunyuanAvatarModel, text_encoder: Any, run: TrainRun) -> None:
    """transformer/, text_encoder/ where it trained along, and pipeline.json; the parts that never train go beside them.

    Earlier files of the same names are replaced.
    """
    from talkingdit.checkpoints.saving import save_model, saved_model
    from talkingdit.checkpoints.weights import read_json
    from talkingdit.families.hunyuan_avatar.save import write_config

    with saved_model(transformer, folder / "transformer") as new:
        write_config(new, {k: v for k, v in read_json(new / "config.json").items() if k != "text_dim"})
    if text_encoder is not None:
        save_model(text_encoder, folder / "text_encoder")
        _copy_drawn_autoencoder(Path(run.data["shipped_vae"] or run.data["vae"]), folder / "vae")
    _settings(transformer.config, run).save(folder / "pipeline.json")


def _copy_drawn_autoencoder(source: Path, target: Path) -> None:
    """The autoencoder of the drawn world, with which its model is whole."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from talkingdit.checkpoints.saving import save_model

    if (source / "config.json").is_file():
        save_model(AutoencoderKLWan.from_pretrained(source), target)


# ---- Batches ---------------------------------------------------------------------------------------------------------


def velocities(transformer: Any, batch: TrainBatch) -> Tensor | Sequence[Tensor]:
    """Velocities of all clips, [n, C, T, H, W] of those of equal shapes, or of each of a packed sequence.

    Raises:
        UserError: a clip has latents that are given clean, which this model does not take.
    """
    if any(clip.prefix for clip in batch.clips):
        raise UserError("conditions.prefix: HunyuanVideo-Avatar takes no latents that are given clean; set it to 0.")
    clips = [_clip(transformer.config, clip, text, batch) for clip, text in zip(batch.clips, batch.texts, strict=True)]
    if batch.packed or len({_kind(clip) for clip in clips}) > 1:
        packed: Sequence[Tensor] = transformer.denoise_packed(clips, context=batch.context)
        return packed if batch.packed else torch.stack(list(packed))
    return _stacked(transformer, clips, batch)


def _clip(config: Any, clip: TrainClip, text: Tensor, batch: TrainBatch) -> PackedClip:
    """A clip as the model takes it, on the device of the batch."""

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(batch.device, non_blocking=True)

    frames = clip.latents.shape[1]
    tokens, mask, pooled = split_text(config, text)
    voices, masks = _voices(config, clip)
    pictures = clip.outside.get(EMOTION) if config.emotion else None
    emotion = index = None
    if pictures is not None:
        emotion = pictures.transpose(0, 1)[:, :, None]
        index = emotion_track(clip.regions, len(emotion), frames)
    still = clip.outside.get(STILL)
    reference = clip.reference
    if reference is not None and still is not None and still.shape[1] >= frames:
        reference = still[:, :frames]
    return PackedClip(
        latents=clip.latents.to(batch.device, non_blocking=True),
        timestep=clip.timestep[0].to(batch.device),
        text=tokens.to(batch.device),
        text_mask=mask.to(batch.device),
        pooled_text=pooled.to(batch.device),
        reference=move(reference),
        audio=move(voices),
        face_mask=move(masks),
        emotion=move(emotion),
        emotion_index=index,
    )


def _voices(config: Any, clip: TrainClip) -> tuple[Tensor | None, Tensor | None]:
    """Features of voices [S, 4 T - 3, window, blocks, channels] and masks [S, T, H, W] of a clip."""
    found = dict(sorted(clip.voices.items())) or ({} if clip.audio is None else {FACE: clip.audio})
    if not found:
        return None, None
    voices = torch.stack([voice_features(config, columns) for columns in found.values()])
    if not any(name in clip.regions for name in found):
        return voices, None
    everywhere = torch.ones(clip.latents.shape[1:])
    return voices, torch.stack([clip.regions.get(name, everywhere).float() for name in found])


def _kind(clip: PackedClip) -> tuple[Any, ...]:
    """Clips for which this is equal can have a batch axis."""
    given = (clip.latents, clip.reference, clip.audio, clip.face_mask, clip.emotion)
    return tuple(None if tensor is None else tuple(tensor.shape) for tensor in given)


def _stacked(transformer: Any, clips: Sequence[PackedClip], batch: TrainBatch) -> Tensor:
    """With a batch axis."""

    def stack(name: str) -> Tensor | None:
        values = [getattr(clip, name) for clip in clips]
        return None if values[0] is None else torch.stack(values)

    longest = max(len(clip.text) for clip in clips)
    text = torch.stack([F.pad(clip.text, (0, 0, 0, longest - len(clip.text))) for clip in clips])
    inputs = AvatarInputs(
        text,
        torch.stack(
            [F.pad(clip.text_mask, (0, longest - len(clip.text))) for clip in clips if clip.text_mask is not None]
        ),
        stack("pooled_text"),
        stack("reference"),
        stack("audio"),
        stack("face_mask"),
        emotion=stack("emotion"),
        emotion_index=stack("emotion_index"),
    )
    timestep = torch.stack([clip.timestep for clip in clips])
    latents = torch.stack([clip.latents for clip in clips])
    velocities: Tensor = transformer(latents, timestep, inputs, context=batch.context)
    return velocities


def count_tokens(config: Mapping[str, Any], frames: int, height: int, width: int, reference: bool, history: int) -> int:
    """Tokens of a clip in the model's sequence; its text is taken to be of a usual length."""
    return tokens_of(config, frames, height, width, reference, TYPICAL_TEXT if config.get("num_heads", 24) > 8 else 0)


def attention_tokens(config: Mapping[str, Any]) -> float:
    """From 4 n (2 dim^2 + dim mlp) operations of a block's products and 4 n^2 dim of its attention."""
    return float(config["hidden_size"] * (2 + config["mlp_width_ratio"]))


# ---- Sources and validation ------------------------------------------------------------------------------------------


def open_source(kind: str, name: str, run: TrainRun) -> Source:
    """Clips of drawn scenes of several people ("scenes"), which rank 0 draws if nobody has done so before."""
    from talkingdit.distributed.team import from_rank_0
    from talkingdit.families.hunyuan_avatar.drawn import DrawnScenes, Scenes, precompute

    scenes = DrawnScenes.of(run)
    from_rank_0(lambda: precompute(scenes, run.seed))
    return Scenes(scenes, name)


def open_validator(run: TrainRun, device: torch.device, context: ContextParallel | None) -> Validator | None:
    """None: videos are generated with the model that a run exports."""
    return None
