# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the models that the package ships and trains: a folder with everything that generation needs.

transformer/     config.json, diffusion_pytorch_model.safetensors
vae/             the same, an AutoencoderKLWan
text_encoder/    config.json and weights of the prompt encoder
pipeline.json    `PuppetSettings`
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from talkingdit.checkpoints.saving import save_model
from talkingdit.errors import UserError
from talkingdit.families.settings import PipelineSettings
from talkingdit.families.wan_s2v.presets import CLASSES

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from talkingdit.families.puppet.text import PromptEncoder
    from talkingdit.families.training import TrainRun
    from talkingdit.families.wan_s2v.model import WanS2VModel

SPATIAL = 8  # pixels per latent pixel
PATCH = 2  # latent pixels per token


@dataclass(frozen=True)
class PuppetSettings(PipelineSettings):
    """How a checkpoint was trained and is best used (pipeline.json)."""

    COUNTS: ClassVar[tuple[str, ...]] = ("fps", "size", "clip_latents", "audio_history", "steps")
    NUMBERS: ClassVar[tuple[str, ...]] = ("shift", "text_guidance", "audio_guidance")

    fps: int = 16
    size: int = 96  # side of the square frame, pixels
    clip_latents: int = 8  # latent frames generated at once, four frames each
    audio_history: int = 8  # audio frames before a clip that the model hears
    shift: float = 3.0  # of the noise schedule
    steps: int = 8
    text_guidance: float = 1.0
    audio_guidance: float = 2.0
    features: str = "speech"  # kind of audio features

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % (SPATIAL * PATCH):
            raise ValueError(f"pipeline.json: size must be a multiple of {SPATIAL * PATCH} pixels, got {self.size}")
        self.check_word("features", ("speech",))

    @staticmethod
    def of_run(run: TrainRun) -> PuppetSettings:
        """What a model that is trained so tells those who generate with it."""
        return PuppetSettings(
            fps=run.data["fps"],
            size=run.data["size"],
            clip_latents=run.clip_latents,
            audio_history=run.audio_context,
            shift=run.shift,
            steps=run.validation.steps,
            text_guidance=run.validation.text_guidance,
            audio_guidance=run.validation.audio_guidance,
        )


@dataclass(frozen=True)
class PuppetCheckpoint:
    """Everything that generation needs, in evaluation mode on one device."""

    transformer: WanS2VModel
    vae: AutoencoderKLWan
    text_encoder: PromptEncoder
    settings: PuppetSettings
    folder: Path


def save_checkpoint(
    folder: str | Path,
    transformer: WanS2VModel,
    vae: AutoencoderKLWan,
    text_encoder: PromptEncoder,
    settings: PuppetSettings,
) -> None:
    """Write a whole checkpoint in the layout that `load_checkpoint` reads, in the dtypes that the models have."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for name, model in (("transformer", transformer), ("vae", vae), ("text_encoder", text_encoder)):
        save_model(model, root / name)
    settings.save(root / "pipeline.json")


def _of_another(name: str) -> bool:
    """Is this the class of a transformer of another family?"""
    from talkingdit import families

    presets = [families.get(other).part("presets") for other in families.names()]
    return any(name in getattr(preset, "CLASSES", ()) for preset in presets)


def owns(folder: Path) -> bool:
    """Is this folder a checkpoint of drawn characters? By its text encoder, or how it says it is used.

    Other families have models of the drawn world too, of other transformers.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # told when it is loaded
        name = json.loads((folder / "transformer" / "config.json").read_text())["_class_name"]
        if name not in CLASSES and _of_another(name):
            return False
    for file, mark in (
        (folder / "text_encoder" / "config.json", "PromptEncoder"),
        (folder / "pipeline.json", "clip_latents"),
    ):
        try:
            values = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(values, dict) and (mark in values or values.get("_class_name") == mark):
            return True
    return False


def read_settings(folder: Path) -> PuppetSettings:
    """How the checkpoint is used.

    Raises:
        UserError: pipeline.json is missing, is not such a file, or has an impossible value.
    """
    return PuppetSettings.load(folder / "pipeline.json")


def load_checkpoint(folder: Path, dtype: torch.dtype, device: torch.device | str) -> PuppetCheckpoint:
    """A whole checkpoint of this layout.

    Args:
        dtype: of the transformer and the autoencoder. The prompt encoder is small and stays float32.

    Raises:
        UserError: something is missing, does not load, or the parts do not fit each other.
    """
    import torch

    from talkingdit.autoencoders.wan import load_vae
    from talkingdit.checkpoints.folder import load_part
    from talkingdit.families.puppet.text import PromptEncoder
    from talkingdit.families.wan_s2v.load import load

    for part in ("transformer", "vae", "text_encoder"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder}: not a checkpoint, the folder {part}/ is missing in it.")
    settings = read_settings(folder)
    transformer = load(folder / "transformer", dtype, device)
    vae = load_vae(folder / "vae", dtype, device)
    text_encoder = load_part(PromptEncoder, folder / "text_encoder", torch.float32, device)
    checkpoint = PuppetCheckpoint(transformer, vae, text_encoder, settings, folder)
    _check_fit(checkpoint)
    return checkpoint


def load_bare(folder: Path, dtype: torch.dtype, device: torch.device | str) -> PuppetCheckpoint:
    """As `load_checkpoint`, of networks that compute the same and can do nothing else, without importing diffusers.

    A checkpoint of settings that those do not know is loaded as `load_checkpoint` does.
    """
    import torch

    from talkingdit.autoencoders.wan_network import BareAutoencoderKLWan, plain
    from talkingdit.checkpoints.folder import bare_arguments, load_bare_part
    from talkingdit.families.puppet.text_network import BarePromptEncoder
    from talkingdit.families.wan_s2v.load import load_bare as load_transformer

    parts = {"vae": (BareAutoencoderKLWan, "AutoencoderKLWan"), "text_encoder": (BarePromptEncoder, "PromptEncoder")}
    if not all((folder / name / "config.json").is_file() for name in (*parts, "transformer")):
        return load_checkpoint(folder, dtype, device)
    given = {}
    for part, (cls, name) in parts.items():
        arguments = bare_arguments(cls, name, folder / part)
        if arguments is None or (part == "vae" and not plain(arguments)):
            return load_checkpoint(folder, dtype, device)
        given[part] = arguments
    settings = read_settings(folder)
    transformer = load_transformer(folder / "transformer", dtype, device)
    dtypes = {"vae": dtype, "text_encoder": torch.float32}
    vae, text_encoder = (
        load_bare_part(*parts[part], given[part], folder / part, (dtypes[part], device)) for part in parts
    )
    checkpoint = PuppetCheckpoint(transformer, vae, text_encoder, settings, folder)
    _check_fit(checkpoint)
    return checkpoint


def _check_fit(checkpoint: PuppetCheckpoint) -> None:
    """Do the parts fit each other?"""
    root, model = checkpoint.folder, checkpoint.transformer.config
    vae: Any = checkpoint.vae.config
    for name in ("in_dim", "out_dim"):
        if model[name] != vae.z_dim:
            raise UserError(
                f"{root}: the transformer has {name} {model[name]} but the vae has {vae.z_dim} latent channels."
            )
    if len(vae.latents_mean) != vae.z_dim or len(vae.latents_std) != vae.z_dim:
        raise UserError(f"{root}: the vae needs latents_mean and latents_std of {vae.z_dim} channels each.")
    if vae.scale_factor_spatial != SPATIAL:
        raise UserError(f"{root}: the vae must shrink frames {SPATIAL} times, got {vae.scale_factor_spatial}.")
    text = checkpoint.text_encoder.config
    for name, fits in (("text_dim", text.text_dim == model.text_dim), ("text_len", text.text_len <= model.text_len)):
        if not fits:
            raise UserError(f"{root}: the transformer has {name} {model[name]} but the text encoder {text[name]}.")
