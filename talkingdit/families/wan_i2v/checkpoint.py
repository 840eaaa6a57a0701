# SPDX-License-Identifier: Apache-2.0
"""Released Wan I2V checkpoints: a folder with the transformer, autoencoder, text and picture encoder.

The official layout, and that of diffusers:

    config.json, diffusion_pytorch_model*.safetensors        transformer/
    Wan2.1_VAE.pth                                           vae/
    models_t5_umt5-xxl-enc-bf16.pth                          text_encoder/
    google/umt5-xxl/                                         tokenizer/
    models_clip_...-vit-huge-14.pth                          image_encoder/ (not of Wan 2.2)
    pipeline.json, optional: `WanI2VSettings`                the same
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from talkingdit.errors import UserError
from talkingdit.families.settings import PipelineSettings
from talkingdit.families.wan_i2v.presets import CLASSES, names_model
from talkingdit.families.wan_s2v.checkpoint import NEGATIVE_PROMPT, SOLVERS, one_file

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from talkingdit.encoders.clip import PictureEncoder
    from talkingdit.encoders.umt5 import UMT5Encoder
    from talkingdit.families.loader import TransformerLoader
    from talkingdit.families.wan_i2v.model import WanI2VModel

UNKNOWN = ("grey", "zeros")


@dataclass(frozen=True)
class WanI2VSettings(PipelineSettings):
    """How a Wan I2V checkpoint is used. The defaults are those of the official program for 480p.

    A file pipeline.json in the checkpoint folder may say other values.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ("fps", "chunk_latents", "steps", "max_area", "size_multiple")
    NUMBERS: ClassVar[tuple[str, ...]] = ("shift", "guidance")
    TEXTS: ClassVar[tuple[str, ...]] = ("negative_prompt",)

    fps: int = 16
    chunk_latents: int = 21  # latent frames generated at once: 81 frames, the given one among them
    shift: float = 3.0  # of the noise schedule; officially 5 for 720p
    steps: int = 40
    guidance: float = 5.0  # classifier-free guidance; 1 is plain
    solver: str = "unipc"
    max_area: int = 480 * 832  # most pixels of a frame
    size_multiple: int = 16  # height and width are multiples of this many pixels
    unknown: str = "grey"  # what stands in the place of unknown frames: latents of grey ones behind the known, or zeros
    held: bool = False  # the first frame stays clean, at timestep 0; officially it is denoised with the rest
    negative_prompt: str = NEGATIVE_PROMPT

    @property
    def motion_frames(self) -> int:
        """Frames of history that the model sees: none."""
        return 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_latents < 2:
            raise ValueError(f"pipeline.json: chunk_latents must be at least 2, got {self.chunk_latents}")
        if self.size_multiple % 16:
            raise ValueError(f"pipeline.json: size_multiple must be a multiple of 16, got {self.size_multiple}")
        self.check_word("solver", SOLVERS)
        self.check_word("unknown", UNKNOWN)
        self.check_switch("held")


@dataclass(frozen=True)
class WanI2VCheckpoint:
    """Everything that generation needs, in evaluation mode."""

    transformer: WanI2VModel
    vae: AutoencoderKLWan
    text_encoder: UMT5Encoder
    image_encoder: PictureEncoder | None
    settings: Any  # `WanI2VSettings` of the family
    folder: Path
    audio_encoder: Any = None  # of families whose models hear


@dataclass(frozen=True)
class CheckpointPaths:
    """Where the parts of a checkpoint lie."""

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    image_encoder: Path | None = None
    audio_encoder: Path | None = None


def owns(folder: Path) -> bool:
    """Is this folder a whole checkpoint of Wan I2V? By the class and the channels that its config.json names."""
    return owned(folder, CLASSES)


def owned(folder: Path, classes: Sequence[str]) -> bool:
    """Does the config.json of a checkpoint's transformer name one of these classes?"""
    for file in (folder / "config.json", folder / "transformer" / "config.json"):
        try:
            values = json.loads(file.read_text())
        except (OSError, ValueError):
            continue  # what is wrong with it is told when it is loaded
        return isinstance(values, dict) and names_model(values, classes)
    return False


def read_settings(folder: Path) -> WanI2VSettings:
    """How the checkpoint is used: pipeline.json, or what the official program has built in.

    Raises:
        UserError: pipeline.json is not such a file, or has an impossible value.
    """
    file = folder / "pipeline.json"
    return WanI2VSettings.load(file) if file.is_file() else WanI2VSettings()


def find_parts(root: Path, image: bool = True, audio: bool = False) -> CheckpointPaths:
    """Where the parts of a checkpoint lie.

    Args:
        image, audio: is there an encoder for pictures, for speech?

    Raises:
        UserError: a part is missing.
    """
    if (root / "transformer").is_dir():
        wanted = ["transformer", "vae", "text_encoder", "tokenizer"]
        wanted += ["image_encoder"] * image + ["audio_encoder"] * audio
        for name in wanted:
            if not (root / name).is_dir():
                raise UserError(f"{root}: not a whole checkpoint, the folder {name}/ is missing in it.")
        return CheckpointPaths(**{name: root / name for name in wanted})
    return CheckpointPaths(
        transformer=root,
        vae=one_file(root, "*VAE*.pth", "Wan2.1_VAE.pth, the autoencoder,"),
        text_encoder=one_file(root, "models_t5*.pth", "models_t5_umt5-xxl-enc-bf16.pth, the text encoder,"),
        tokenizer=one_file(root, "google/umt5*", "google/umt5-xxl/, the tokenizer of the text encoder,"),
        image_encoder=one_file(root, "models_clip*.pth", "models_clip...pth, the picture encoder,") if image else None,
        audio_encoder=one_file(root, "wav2vec2*", "wav2vec2.../, the speech encoder,") if audio else None,
    )


def load_checkpoint(folder: Path, dtype: torch.dtype, device: torch.device | str) -> WanI2VCheckpoint:
    """A whole checkpoint.

    Args:
        folder: of either layout.
        dtype: of the transformer and the text encoder, the large parts. The others are float32.
        device: where all parts go.

    Raises:
        UserError: a part is missing or does not load, or the parts do not fit each other.
    """
    from talkingdit.families.wan_i2v.load import LOADER

    return load_parts(folder, LOADER, read_settings(folder), dtype, device)


def load_parts(
    folder: Path,
    loader: TransformerLoader,
    settings: Any,
    dtype: torch.dtype,
    device: torch.device | str,
    audio: bool = False,
) -> WanI2VCheckpoint:
    """A checkpoint of a family that has these parts, see `load_checkpoint`.

    Args:
        loader: of its transformer.
        settings: of the checkpoint.
        audio: with a speech encoder of wav2vec 2.0.
    """
    import torch

    from talkingdit.autoencoders.wan import load_vae
    from talkingdit.encoders.clip import load_picture_encoder
    from talkingdit.encoders.umt5 import UMT5Encoder, load_tokenizer, load_umt5

    image = bool(loader.read_config(folder)["image_dim"])
    parts = find_parts(folder, image, audio)
    tokenizer = load_tokenizer(parts.tokenizer)
    pictures = None if parts.image_encoder is None else load_picture_encoder(parts.image_encoder, device)
    speech = None
    if parts.audio_encoder is not None:
        from talkingdit.encoders.wav2vec import load_speech_encoder

        speech = load_speech_encoder(parts.audio_encoder, device, fps=settings.fps)
    vae = load_vae(parts.vae, torch.float32, device).requires_grad_(False)
    transformer = loader.load(parts.transformer, dtype, device)
    umt5 = load_umt5(parts.text_encoder, dtype, device)
    text_encoder = UMT5Encoder(umt5, tokenizer, transformer.config.text_len).eval()
    checkpoint = WanI2VCheckpoint(transformer, vae, text_encoder, pictures, settings, folder, speech)
    check_fit(checkpoint)
    return checkpoint


def check_fit(checkpoint: WanI2VCheckpoint) -> None:
    """Do the parts fit each other?

    Raises:
        UserError: they do not.
    """
    root, model = checkpoint.folder, checkpoint.transformer.config
    vae: Any = checkpoint.vae.config
    text, image, audio = checkpoint.text_encoder, checkpoint.image_encoder, checkpoint.audio_encoder
    pairs = [
        ("out_dim", model.out_dim, "the autoencoder has latent channels", vae.z_dim),
        ("text_dim", model.text_dim, "the text encoder has width", text.text_dim),
    ]
    if image is not None:
        pairs.append(("image_dim", model.image_dim, "the picture encoder has width", image.image_dim))
    if audio is not None:
        pairs.append(("audio_dim", model.audio_dim, "the speech encoder has width", audio.audio_dim))
        pairs.append(("audio_layers", model.audio_layers, "the speech encoder has layers", audio.layers))
    for name, wanted, what, got in pairs:
        if wanted != got:
            raise UserError(f"{root}: the transformer has {name} {wanted} but {what} {got}.")
    if (vae.scale_factor_spatial, vae.scale_factor_temporal) != (8, 4):
        raise UserError(
            f"{root}: the autoencoder must shrink frames 8 times and time 4 times, "
            f"got {vae.scale_factor_spatial} and {vae.scale_factor_temporal}."
        )
    words, known = len(text.tokenizer), text.model.config.vocab_size
    if words > known:
        raise UserError(f"{root}: the tokenizer has {words} words but the text encoder {known}.")
