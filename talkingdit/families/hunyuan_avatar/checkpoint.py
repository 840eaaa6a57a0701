# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo-Avatar checkpoints: a folder with the transformer, autoencoder, text encoders and speech encoder.

The released layout, from its ckpts/ down, and ours, which only names folders otherwise:

    hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt (or _fp8.pt, _fp8_map.pt)    transformer/
    hunyuan-video-t2v-720p/vae/                                                                 vae/
    llava_llama_image/                                                                          text_encoder/
    text_encoder_2/                                                                             text_encoder_2/
    whisper-tiny/                                                                               audio_encoder/
    pipeline.json, optional: `HunyuanAvatarSettings`                                            the same

A folder of the released repository, with ckpts/ in it, is taken as that ckpts/. Without text encoders a checkpoint
takes text features from a file. One of the drawn world has its autoencoder (of Wan's kind), its prompt encoder for both
text encoders, and no speech encoder: its features are computed (`features` in pipeline.json). The one that ships has no
autoencoder either: that of the other shipped model is its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.presets import CLASSES
from talkingdit.families.settings import PipelineSettings
from talkingdit.puppets import MODEL, PEOPLE

if TYPE_CHECKING:
    import torch

    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel
    from talkingdit.families.hunyuan_avatar.words import AvatarTextEncoder

NEGATIVE_PROMPT = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion, blurring, Lens changes"
)
PROMPT_PREFIX = "Authentic, Realistic, Natural, High-quality, Lens-Fixed, "
FEATURES = ("whisper", "speech")
SILENCE = ("zeros", "none")
STILL = ("window", "video")
_RELEASED = "hunyuan-video-t2v-720p"


@dataclass(frozen=True)
class HunyuanAvatarSettings(PipelineSettings):
    """How a checkpoint is used. The defaults are those of the released model and its program.

    A file pipeline.json in the checkpoint folder may say other values.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ("fps", "window", "steps", "image_size", "size_multiple")
    NUMBERS: ClassVar[tuple[str, ...]] = (
        "shift",
        "guidance_start",
        "guidance_high",
        "guidance_low",
        "early_mask",
        "face_area",
    )
    TEXTS: ClassVar[tuple[str, ...]] = ("prompt_prefix", "negative_prompt")

    fps: int = 25
    window: int = 33  # latent frames that are generated at once
    shift_offset: int = 10  # latent frames that windows of a long video move on in every step
    shift: float = 5.0  # of the noise schedule
    steps: int = 50
    guidance_start: float = 7.5  # falls to 2 over all steps, and is used in the first `early_steps`
    guidance_high: float = 6.5  # falls to `guidance_low` over all steps, and is used in the others
    guidance_low: float = 3.5
    early_steps: int = 10  # in which faces are masked with `early_mask`
    early_mask: float = 0.6
    face_area: float = 3.0  # of a face's box that hears its voice, in sides of the box
    image_size: int = 704  # the shorter side of a frame, pixels
    size_multiple: int = 64  # height and width are multiples of this many pixels
    text_guidance: float | None = None  # separate constant strengths of text and voice in place of the schedule
    audio_guidance: float | None = None
    features: str = "whisper"  # of a voice: "whisper", or "speech", which need no encoder
    silence: str = "zeros"  # what audio guidance leads away from: features of zeros, or "none", nothing heard at all
    still: str = "window"  # what the picture, as a still video, begins with: every window, or the video
    prompt_prefix: str = PROMPT_PREFIX
    negative_prompt: str = NEGATIVE_PROMPT

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shift_offset", "early_steps"):
            self.check_count(name, 0)
        for name in ("text_guidance", "audio_guidance"):
            if getattr(self, name) is not None:
                self.check_number(name)
        if self.window < 2:
            raise ValueError(f"pipeline.json: window must be at least 2, got {self.window}")
        if self.size_multiple % 16:
            raise ValueError(f"pipeline.json: size_multiple must be a multiple of 16, got {self.size_multiple}")
        self.check_word("features", FEATURES)
        self.check_word("silence", SILENCE)
        self.check_word("still", STILL)


@dataclass(frozen=True)
class HunyuanAvatarCheckpoint:
    """Everything that generation needs, in evaluation mode."""

    transformer: HunyuanAvatarModel
    vae: Any  # AutoencoderKLHunyuanVideo, or AutoencoderKLWan
    text_encoder: AvatarTextEncoder  # of prompts with a picture, see `words.py`
    audio_encoder: Any  # talkingdit.encoders.whisper.WhisperEncoder, or SpeechFeatures
    settings: HunyuanAvatarSettings
    folder: Path


@dataclass(frozen=True)
class CheckpointPaths:
    """Where the parts of a checkpoint lie; None for what it may lack."""

    transformer: Path
    vae: Path
    text_encoder: Path | None
    pooled_encoder: Path | None
    audio_encoder: Path | None


def owns(folder: Path) -> bool:
    """Is this folder a whole checkpoint of this family? By the class that it names, or by the released folders."""
    for file in (folder / "config.json", folder / "transformer" / "config.json"):
        try:
            return json.loads(file.read_text())["_class_name"] in CLASSES
        except (OSError, ValueError, TypeError, KeyError):
            continue  # what is wrong with it is told when it is loaded
    root = _root(folder)
    return any((root / name).is_dir() for name in (_RELEASED, "llava_llama_image"))


def _root(folder: Path) -> Path:
    inner = folder / "ckpts"
    return inner if inner.is_dir() and not (folder / "transformer").is_dir() else folder


def read_settings(folder: Path) -> HunyuanAvatarSettings:
    """How the checkpoint is used: pipeline.json, or what the released program has built in.

    Raises:
        UserError: pipeline.json is not such a file, or has an impossible value.
    """
    file = _root(folder) / "pipeline.json"
    return HunyuanAvatarSettings.load(file) if file.is_file() else HunyuanAvatarSettings()


def find_parts(folder: Path) -> CheckpointPaths:
    """Where the parts of a checkpoint lie.

    Raises:
        UserError: one is missing.
    """
    root = _root(folder)
    if (root / "transformer").is_dir():
        places = ("transformer", "vae", "text_encoder", "text_encoder_2", "audio_encoder")
    else:
        places = (
            f"{_RELEASED}/transformers",
            f"{_RELEASED}/vae",
            "llava_llama_image",
            "text_encoder_2",
            "whisper-tiny",
        )
    needed = {0: "the transformer", 1: "the autoencoder"}
    if read_settings(folder).features == "whisper":
        needed[4] = "the speech encoder"
    shared = root.resolve() == PEOPLE.resolve()
    if shared:
        del needed[1]
    for number, name in needed.items():
        if not (root / places[number]).is_dir():
            raise UserError(f"{root}: not a whole checkpoint, {places[number]}/, {name}, is missing in it.")
    transformer, vae, *encoders = (root / place for place in places)
    if shared:
        vae = MODEL / "vae"
    text, pooled, audio = (path if path.is_dir() else None for path in encoders)
    return CheckpointPaths(transformer, vae, text, pooled, audio)


def load_checkpoint(folder: Path, dtype: torch.dtype, device: torch.device | str) -> HunyuanAvatarCheckpoint:
    """A whole checkpoint.

    Args:
        folder: of either layout.
        dtype: of the transformer and the text encoders, the large parts. The autoencoder and the speech encoder are
            float32.
        device: where all parts go.

    Raises:
        UserError: a part is missing or does not load, or the parts do not fit each other.
    """

    from talkingdit.families.hunyuan_avatar.load import load
    from talkingdit.families.hunyuan_avatar.words import load_text_encoder

    parts = find_parts(folder)
    settings = read_settings(folder)
    checkpoint = HunyuanAvatarCheckpoint(
        audio_encoder=load_audio_encoder(parts, settings, device),
        vae=load_vae(parts.vae, device).requires_grad_(False),
        transformer=load(parts.transformer, dtype, device),
        text_encoder=load_text_encoder(folder, parts.text_encoder, parts.pooled_encoder, dtype, device),
        settings=settings,
        folder=folder,
    )
    check_fit(checkpoint)
    return checkpoint


def load_vae(folder: Path, device: torch.device | str) -> Any:
    """HunyuanVideo's autoencoder, or one of Wan's kind."""
    import torch

    from talkingdit.autoencoders import wan
    from talkingdit.autoencoders.hunyuan import load_hunyuan_vae
    from talkingdit.checkpoints.weights import read_json

    config = folder / "config.json"
    if config.is_file() and read_json(config).get("_class_name") == "AutoencoderKLWan":
        return wan.load_vae(folder, torch.float32, device)
    return load_hunyuan_vae(folder, torch.float32, device)


def load_audio_encoder(parts: CheckpointPaths, settings: HunyuanAvatarSettings, device: torch.device | str) -> Any:
    from talkingdit.encoders.log_mel import SpeechFeatures
    from talkingdit.encoders.whisper import load_whisper

    if settings.features == "speech":
        return SpeechFeatures(fps=settings.fps)
    assert parts.audio_encoder is not None
    return load_whisper(parts.audio_encoder, device, fps=settings.fps)


def check_fit(checkpoint: HunyuanAvatarCheckpoint) -> None:
    """Do the parts fit each other?

    Raises:
        UserError: two do not.
    """
    from talkingdit.families.hunyuan_avatar.voices import feature_shape

    root = checkpoint.folder
    model: Any = checkpoint.transformer.config
    vae: Any = checkpoint.vae.config
    wan = "z_dim" in vae
    window, blocks, channels = feature_shape(checkpoint.audio_encoder)
    text_dim, pooled_dim = checkpoint.text_encoder.dims or (model.text_states_dim, model.text_states_dim_2)
    pairs = (
        (
            "in_channels",
            model.in_channels,
            "the autoencoder has latent channels",
            vae["z_dim" if wan else "latent_channels"],
        ),
        ("text_states_dim", model.text_states_dim, "the text encoder has width", text_dim),
        ("text_states_dim_2", model.text_states_dim_2, "the pooled text encoder has width", pooled_dim),
        ("audio_channels", model.audio_channels, "the features of a voice have width", channels),
        ("audio_blocks", model.audio_blocks, "the features of a voice have hidden states", blocks),
        ("audio_window", model.audio_window, "the features of a voice have places in time", window),
    )
    for name, wanted, what, got in pairs:
        if wanted != got:
            raise UserError(f"{root}: the transformer has {name} {wanted} but {what} {got}.")
    names = (
        ("scale_factor_spatial", "scale_factor_temporal")
        if wan
        else ("spatial_compression_ratio", "temporal_compression_ratio")
    )
    if (found := tuple(vae[name] for name in names)) != (8, 4):
        raise UserError(
            f"{root}: the autoencoder must shrink frames 8 times and time 4 times, got {found[0]} and {found[1]}."
        )
