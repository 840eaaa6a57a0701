# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: what lies in them, and loading them with one clear sentence when something does not fit.

A whole checkpoint, what `--checkpoint` takes and training writes:

    transformer/     config.json, diffusion_pytorch_model.safetensors
    vae/             the same, an AutoencoderKLWan
    text_encoder/    config.json and weights of the prompt encoder
    pipeline.json    `PipelineSettings`

`load` reads a single model: such a `transformer/`, a released Wan2.2-S2V folder (config.json and weights at the top),
or a preset's name for random weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from talkingdit.errors import UserError

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from talkingdit.models.text import PromptEncoder
    from talkingdit.models.wan import WanS2VModel

# Names under which checkpoints store the class: ours, and that of the official program.
TRANSFORMERS = ("WanS2VModel", "WanModel_S2V")
SPATIAL = 8  # pixels per latent pixel
PATCH = 2  # latent pixels per token


@dataclass(frozen=True)
class PipelineSettings:
    """How a checkpoint was trained and is best used (pipeline.json)."""

    fps: int = 16
    size: int = 96  # side of the square picture, pixels
    clip_latents: int = 8  # latent frames generated at once, four pictures each
    shift: float = 3.0  # of the noise schedule
    steps: int = 8
    text_guidance: float = 1.0
    audio_guidance: float = 2.0
    features: str = "speech"  # kind of audio features

    def __post_init__(self) -> None:
        for name in ("fps", "size", "clip_latents", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"pipeline.json: {name} must be an integer of at least 1, got {value!r}")
        if self.size % (SPATIAL * PATCH):
            raise ValueError(f"pipeline.json: size must be a multiple of {SPATIAL * PATCH} pixels, got {self.size}")
        for name in ("shift", "text_guidance", "audio_guidance"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"pipeline.json: {name} must be a number of at least 0, got {value!r}")
        if self.shift == 0:
            raise ValueError("pipeline.json: shift must be above 0, got 0")
        if self.features != "speech":
            raise ValueError(f"pipeline.json: features must be 'speech', got {self.features!r}")

    @staticmethod
    def load(path: Path) -> PipelineSettings:
        """Read pipeline.json; a missing entry has its default, an unknown one is an error.

        Raises:
            UserError: the file is missing, is not such a file, or a value is impossible.
        """
        values = _read_json(path)
        known = {f.name for f in dataclasses.fields(PipelineSettings)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"{path}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        try:
            return PipelineSettings(**values)
        except ValueError as error:
            raise UserError(f"{path.parent}: {error}.") from error

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Checkpoint:
    """Everything that generation needs, in evaluation mode on one device."""

    transformer: WanS2VModel
    vae: AutoencoderKLWan
    text_encoder: PromptEncoder
    settings: PipelineSettings
    folder: Path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; the checkpoint is not complete.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}).") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object, got {type(values).__name__}.")
    return values


def _check_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no *.safetensors in it; the checkpoint is not complete.")


def _from_pretrained(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """`cls.from_pretrained`, strict: every weight must be there and fit, and none be left over."""
    _check_weights(folder)
    try:
        model, report = cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True)
    except (ValueError, TypeError, OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: does not load as {cls.__name__} ({_shortened(reason)}).") from error
    for problem, text in (("missing_keys", "lacks"), ("unexpected_keys", "has a weight that is not part of it:")):
        keys = sorted(report.get(problem, ()))
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"{folder}: the checkpoint of {cls.__name__} {text} {keys[0]}{more}.")
    return model.eval()


def _shortened(text: str, limit: int = 240) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _class_name(folder: Path, expected: tuple[str, ...]) -> str:
    name = _read_json(folder / "config.json").get("_class_name")
    if name not in expected:
        raise UserError(f"{folder / 'config.json'}: _class_name must be {' or '.join(expected)}, got {name!r}.")
    return name


def load(
    source: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", seed: int = 0
) -> WanS2VModel:
    """A transformer from a checkpoint folder, or with random weights from a preset.

    Args:
        source: a folder with config.json and *.safetensors (ours or the released Wan2.2-S2V, whose parameter names
            are the same), a whole checkpoint (its transformer/ is read), or a name from `PRESETS`.
        dtype: of the weights; None is float32.
        device: where the model goes.
        seed: of the random weights of a preset; the global generator is left as it was.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: no such folder or preset, another class, or weights that are missing, left over or of another shape.
    """
    from talkingdit.models.presets import PRESETS, preset
    from talkingdit.models.wan import WanS2VModel

    folder = Path(source)
    if not folder.is_dir():
        if str(source) not in PRESETS:
            raise UserError(f"{source}: neither a folder nor a preset ({', '.join(sorted(PRESETS))}).")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = WanS2VModel(**preset(str(source)))
        return model.to(device=device, dtype=dtype).eval()
    if not (folder / "config.json").exists() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    _class_name(folder, TRANSFORMERS)
    return _from_pretrained(WanS2VModel, folder, torch.float32 if dtype is None else dtype).to(device)


def save_checkpoint(
    folder: str | Path,
    transformer: WanS2VModel,
    vae: AutoencoderKLWan,
    text_encoder: PromptEncoder,
    settings: PipelineSettings,
) -> None:
    """Write a whole checkpoint in the layout that `load_checkpoint` reads, in the dtypes that the models have."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for name, model in (("transformer", transformer), ("vae", vae), ("text_encoder", text_encoder)):
        model.save_pretrained(root / name)
    settings.save(root / "pipeline.json")


def default_checkpoint() -> Path:
    """Folder of the model that ships with the package."""
    return Path(__file__).parents[1] / "puppets" / "assets" / "model"


def load_checkpoint(
    folder: str | Path | None = None, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Checkpoint:
    """A whole checkpoint; None is the one that ships with the package.

    Args:
        folder: with transformer/, vae/, text_encoder/ and pipeline.json.
        dtype: of the transformer and the autoencoder; None is float32. The prompt encoder is small and stays float32.
        device: where the models go.

    Raises:
        UserError: something is missing, does not load, or the parts do not fit each other.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from talkingdit.models.text import PromptEncoder

    root = default_checkpoint() if folder is None else Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: the checkpoint must be a folder, and there is none of this name.")
    for part in ("transformer", "vae", "text_encoder"):
        if not (root / part).is_dir():
            raise UserError(f"{root}: not a checkpoint, the folder {part}/ is missing in it.")
    settings = PipelineSettings.load(root / "pipeline.json")
    dtype = torch.float32 if dtype is None else dtype
    transformer = load(root / "transformer", dtype, device)
    _class_name(root / "vae", ("AutoencoderKLWan",))
    vae = _from_pretrained(AutoencoderKLWan, root / "vae", dtype).to(device)
    _class_name(root / "text_encoder", ("PromptEncoder",))
    text_encoder = _from_pretrained(PromptEncoder, root / "text_encoder", torch.float32).to(device)
    checkpoint = Checkpoint(transformer, vae, text_encoder, settings, root)
    _check_fit(checkpoint)
    return checkpoint


def _check_fit(checkpoint: Checkpoint) -> None:
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
        raise UserError(f"{root}: the vae must shrink pictures {SPATIAL} times, got {vae.scale_factor_spatial}.")
    text = checkpoint.text_encoder.config
    for name, fits in (("text_dim", text.text_dim == model.text_dim), ("text_len", text.text_len <= model.text_len)):
        if not fits:
            raise UserError(f"{root}: the transformer has {name} {model[name]} but the text encoder {text[name]}.")
