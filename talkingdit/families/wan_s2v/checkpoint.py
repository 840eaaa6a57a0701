# SPDX-License-Identifier: Apache-2.0
"""Released Wan2.2-S2V checkpoints: a folder with the transformer, autoencoder, text and speech encoder.

The official layout, and that of diffusers (also where only files moved and weights kept their names):

    config.json, diffusion_pytorch_model*.safetensors        transformer/
    Wan2.1_VAE.pth                                           vae/
    models_t5_umt5-xxl-enc-bf16.pth                          text_encoder/
    google/umt5-xxl/                                         tokenizer/
    wav2vec2-large-xlsr-53-english/                          audio_encoder/ (and audio_processor/)
    pipeline.json, optional: `WanS2VSettings`                the same
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from talkingdit.errors import UserError
from talkingdit.families.settings import PipelineSettings
from talkingdit.families.wan_s2v.options import Solver
from talkingdit.families.wan_s2v.presets import CLASSES

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from talkingdit.encoders.umt5 import UMT5Encoder
    from talkingdit.encoders.wav2vec import Wav2VecEncoder
    from talkingdit.families.wan_s2v.model import WanS2VModel

SOLVERS = get_args(Solver)
NEGATIVE_PROMPT = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)


@dataclass(frozen=True)
class WanS2VSettings(PipelineSettings):
    """How a Wan-S2V checkpoint is used. The defaults are those of the released model and its official program.

    A file pipeline.json in the checkpoint folder may say other values.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ("fps", "infer_frames", "motion_frames", "steps", "max_area", "size_multiple")
    NUMBERS: ClassVar[tuple[str, ...]] = ("shift", "guidance")
    TEXTS: ClassVar[tuple[str, ...]] = ("negative_prompt",)

    fps: int = 16
    infer_frames: int = 80  # frames generated at once, a multiple of 4
    motion_frames: int = 73  # frames of history, 4 n - 3
    drop_first_motion: bool = True  # the first clip has no history
    shift: float = 3.0  # of the noise schedule
    steps: int = 40
    guidance: float = 4.5  # classifier-free guidance; 1 is plain
    solver: str = "unipc"
    max_area: int = 704 * 1024  # most pixels of a frame
    size_multiple: int = 64  # height and width are multiples of this many pixels
    negative_prompt: str = NEGATIVE_PROMPT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.infer_frames % 4:
            raise ValueError(f"pipeline.json: infer_frames must be a multiple of 4, got {self.infer_frames}")
        if self.motion_frames % 4 != 1:
            raise ValueError(f"pipeline.json: motion_frames must be 4 n - 3, got {self.motion_frames}")
        if self.size_multiple % 16:
            raise ValueError(f"pipeline.json: size_multiple must be a multiple of 16, got {self.size_multiple}")
        self.check_word("solver", SOLVERS)
        self.check_switch("drop_first_motion")


@dataclass(frozen=True)
class WanS2VCheckpoint:
    """Everything that generation with a Wan-S2V model needs, in evaluation mode."""

    transformer: WanS2VModel
    vae: AutoencoderKLWan
    text_encoder: UMT5Encoder
    audio_encoder: Wav2VecEncoder
    settings: WanS2VSettings
    folder: Path


@dataclass(frozen=True)
class CheckpointPaths:
    """Where the parts of a checkpoint lie."""

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    audio_encoder: Path


def owns(folder: Path) -> bool:
    """Is this folder a whole Wan-S2V checkpoint? By the class that it names, or where it names none by its files."""
    for file in (folder / "config.json", folder / "transformer" / "config.json"):
        try:
            return json.loads(file.read_text())["_class_name"] in CLASSES
        except (OSError, ValueError, TypeError, KeyError):
            continue  # what is wrong with it is told when it is loaded
    names = ("config.json", "models_t5*.pth", "transformer", "audio_encoder", "tokenizer", "model_index.json")
    return any(any(folder.glob(name)) for name in names)


def read_settings(folder: Path) -> WanS2VSettings:
    """How the checkpoint is used: pipeline.json, or what the official program has built in.

    Raises:
        UserError: pipeline.json is not such a file, or has an impossible value.
    """
    file = folder / "pipeline.json"
    return WanS2VSettings.load(file) if file.is_file() else WanS2VSettings()


def find_parts(root: Path) -> CheckpointPaths:
    """Where the parts of a checkpoint lie.

    Raises:
        UserError: one is missing.
    """
    if (root / "transformer").is_dir():
        parts = CheckpointPaths(
            *(root / name for name in ("transformer", "vae", "text_encoder", "tokenizer", "audio_encoder"))
        )
        for part in dataclasses.astuple(parts):
            if not part.is_dir():
                raise UserError(f"{root}: not a whole checkpoint, the folder {part.name}/ is missing in it.")
        return parts
    return CheckpointPaths(
        transformer=root,
        vae=one_file(root, "*VAE*.pth", "Wan2.1_VAE.pth, the autoencoder,"),
        text_encoder=one_file(root, "models_t5*.pth", "models_t5_umt5-xxl-enc-bf16.pth, the text encoder,"),
        tokenizer=one_file(root, "google/umt5*", "google/umt5-xxl/, the tokenizer of the text encoder,"),
        audio_encoder=one_file(root, "wav2vec2*", "wav2vec2-large-xlsr-53-english/, the speech encoder,"),
    )


def one_file(root: Path, pattern: str, what: str) -> Path:
    """The one file or folder of a checkpoint that a pattern fits; UserError where there is none or more."""
    found = sorted(root.glob(pattern))
    if not found:
        raise UserError(f"{root}: not a whole checkpoint, {what} is missing in it.")
    if len(found) > 1:
        raise UserError(f"{root}: {found[0].name} and {found[1].name} could both be meant; leave one in the folder.")
    return found[0]


def load_checkpoint(folder: Path, dtype: torch.dtype, device: torch.device | str) -> WanS2VCheckpoint:
    """A whole Wan-S2V checkpoint.

    Args:
        folder: of either layout.
        dtype: of the transformer and the text encoder, the large parts. The autoencoder and the speech encoder are
            float32, as in the official program.
        device: where all parts go.

    Raises:
        UserError: a part is missing or does not load, or the parts do not fit each other.
    """
    import torch

    from talkingdit.autoencoders.wan import load_vae
    from talkingdit.encoders.umt5 import UMT5Encoder, load_tokenizer, load_umt5
    from talkingdit.encoders.wav2vec import load_speech_encoder
    from talkingdit.families.wan_s2v.load import load

    parts = find_parts(folder)
    settings = read_settings(folder)
    tokenizer = load_tokenizer(parts.tokenizer)
    audio_encoder = load_speech_encoder(parts.audio_encoder, device, fps=settings.fps)
    vae = load_vae(parts.vae, torch.float32, device).requires_grad_(False)
    transformer = load(parts.transformer, dtype, device)
    umt5 = load_umt5(parts.text_encoder, dtype, device)
    text_encoder = UMT5Encoder(umt5, tokenizer, transformer.config.text_len).eval()
    checkpoint = WanS2VCheckpoint(transformer, vae, text_encoder, audio_encoder, settings, folder)
    _check_fit(checkpoint)
    return checkpoint


def _check_fit(checkpoint: WanS2VCheckpoint) -> None:
    """Do the parts fit each other?"""
    root, model = checkpoint.folder, checkpoint.transformer.config
    vae: Any = checkpoint.vae.config
    audio, text = checkpoint.audio_encoder, checkpoint.text_encoder
    pairs = (
        ("in_dim", model.in_dim, "the autoencoder has latent channels", vae.z_dim),
        ("out_dim", model.out_dim, "the autoencoder has latent channels", vae.z_dim),
        ("text_dim", model.text_dim, "the text encoder has width", text.text_dim),
        ("audio_dim", model.audio_dim, "the speech encoder has width", audio.audio_dim),
        ("audio_layers", model.audio_layers, "the speech encoder has layers", audio.layers),
    )
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
