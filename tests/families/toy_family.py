# SPDX-License-Identifier: Apache-2.0
"""A family of models in one file, as another package may have it: what is asked of a family, and no more.

A latent pixel goes through a small network alone, with the mean of the words and of its frame's speech features.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from talkingdit.autoencoders.streaming import encode, to_video
from talkingdit.autoencoders.tail import decode_after
from talkingdit.autoencoders.wan import load_vae
from talkingdit.checkpoints import weights
from talkingdit.checkpoints.folder import load_part
from talkingdit.data import encoding
from talkingdit.data.encoders import CheckpointEncoders, Encoders, PlainSettings
from talkingdit.distributed.layout import Parallel
from talkingdit.encoders.log_mel import SpeechFeatures
from talkingdit.errors import UserError
from talkingdit.families.family import Family
from talkingdit.families.flag import GenerationOptions
from talkingdit.families.training import TrainBatch, TrainRun
from talkingdit.media.framing import fit_portrait
from talkingdit.nn.units import Unit
from talkingdit.pipelines.inputs import Inputs, Outline
from talkingdit.pipelines.long_video import ClipPipeline, GeneratedClip
from talkingdit.plan.clip import ClipShape
from talkingdit.plan.cost import AUTOENCODER, FrozenParts, Parameter, SpeechCost

FPS, CLIP_FRAMES = 16, 8
FAMILY = Family("toy", "the toy family", __name__)
PRESETS = {"toy_tiny": {"channels": 16, "dim": 32, "num_layers": 2, "text_dim": 8, "audio_dim": 6}}

# ---- The transformer -------------------------------------------------------------------------------------------------

UNITS = (Unit("blocks.*", large=True), Unit("head"))


def walk(config: Mapping[str, Any]) -> list[str]:
    return [f"blocks.{i}" for i in range(config["num_layers"])]


class ToyModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, channels: int, dim: int, num_layers: int, text_dim: int, audio_dim: int) -> None:
        super().__init__()
        self.patch, self.time = nn.Linear(channels, dim), nn.Linear(1, dim)
        self.text, self.audio = nn.Linear(text_dim, dim), nn.Linear(audio_dim, dim)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.SiLU()) for _ in range(num_layers))
        self.head = nn.Linear(dim, channels)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, audio: Tensor | None = None) -> Tensor:
        """Velocity of latents [B, C, T, H, W] at timestep [B, T]; text [B, L, text_dim], audio [B, audio_dim, 4 T]."""
        if audio is None:  # silence
            audio = latents.new_zeros(len(latents), self.config["audio_dim"], 4 * latents.shape[2])
        heard = self.audio(audio.unflatten(-1, (-1, 4)).mean(-1).transpose(1, 2))
        x = heard + self.time(timestep[..., None] / 1000) + self.text(text.mean(1, keepdim=True))
        x = self.patch(latents.movedim(1, -1)) + x[:, :, None, None]
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).movedim(-1, 1)


# ---- Folders: transformer/ and vae/ ----------------------------------------------------------------------------------


def loads(source: Path) -> bool:
    file = source / "transformer" / "config.json"
    return file.is_file() and weights.read_json(file).get("_class_name") == "ToyModel"


owns = loads


def read_settings(folder: Path) -> None:
    return None


def load_checkpoint(folder: Path, dtype: torch.dtype, device: torch.device | str) -> SimpleNamespace:
    transformer, vae = load(folder, dtype, device), load_vae(folder / "vae", dtype, device)
    return SimpleNamespace(transformer=transformer, vae=vae, settings=None, folder=folder)


def load(source: str | Path, dtype: Any = None, device: Any = "cpu", seed: int = 0, **options: Any) -> ToyModel:
    if source not in PRESETS:
        return load_part(ToyModel, Path(source) / "transformer", dtype or torch.float32, device)
    torch.manual_seed(seed)
    return ToyModel(**PRESETS[str(source)]).to(device, dtype).eval()


def read_config(source: str | Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    stored = PRESETS.get(str(source)) or weights.read_json(Path(source) / "transformer" / "config.json")
    return {name: stored[name] for name in PRESETS["toy_tiny"]} | dict(config or {})


def empty(source: str | Path) -> ToyModel:
    with torch.device("meta"):
        return ToyModel(**read_config(source))


# ---- Videos: one clip after the other, each behind the portrait ------------------------------------------------------


class Options(GenerationOptions):
    small = True


def outline(inputs: Inputs, settings: None, options: Options) -> Outline:
    frames = -(-len(inputs.sound) * FPS // 16000)
    clips = -(-frames // CLIP_FRAMES)
    return Outline((32, 32), FPS, clips, options.steps or 2, 1, frames, settings={"seed": options.seed})


class Features(SpeechFeatures):
    def features(self, waveform: Any, frames: int) -> Tensor:
        return super().features(waveform, frames)[:, :6]


class ToyPipeline(ClipPipeline):
    def __init__(self, checkpoint: Any, parallel: Parallel | None) -> None:
        self.checkpoint, self.parallel = checkpoint, parallel or Parallel()

    @torch.no_grad()
    def encode(self, inputs: Inputs, outline: Outline) -> Any:
        portrait = encode(self.checkpoint.vae, to_video(fit_portrait(inputs.image, 32)[0][None]))
        return portrait, Features(FPS).features(inputs.sound, outline.clips * CLIP_FRAMES).mean(0), outline

    @torch.no_grad()
    def clip(
        self, conditions: Any, index: int, carry: Any, *, last: bool = False, progress: Any = None
    ) -> GeneratedClip:
        portrait, audio, outline = conditions
        x = torch.randn(portrait.expand(-1, -1, CLIP_FRAMES // 4, -1, -1).shape)
        for step in range(outline.steps):
            time = torch.full((1, x.shape[2]), 1000 * (1 - step / outline.steps))
            heard = audio[None, :, index * CLIP_FRAMES : (index + 1) * CLIP_FRAMES]
            x = x - self.checkpoint.transformer(x, time, torch.zeros(1, 1, 8), heard) / outline.steps
            progress()
        video = decode_after(self.checkpoint.vae, portrait, x)[:, :, : outline.frames - index * CLIP_FRAMES]
        return GeneratedClip(index, video, None if last else {"index": torch.tensor(index)})


open_pipeline = ToyPipeline

# ---- Training clips --------------------------------------------------------------------------------------------------


class ToyEncoders(CheckpointEncoders):
    OFFERS = ("latents", "audio")

    def read_settings(self) -> PlainSettings:
        return PlainSettings(FPS)

    def files(self) -> list[Path]:
        return [self.folder / "vae"]

    def load(self) -> Encoders:
        return Encoders(load_vae(self.folder / "vae", torch.float32, self.device), self.settings, audio=Features(FPS))


encoders, encode_clip = ToyEncoders, encoding.encode_clip

# ---- Costs -----------------------------------------------------------------------------------------------------------


SWITCHES, CAST, SUBSETS, LORA_TARGETS = (), (), {}, ()
complete = dict


def default_clip(config: Mapping[str, Any], folder: Path | None = None) -> ClipShape:
    return ClipShape(32, 32, CLIP_FRAMES // 4, steps=2, branches=1)


def frozen_parts(config: Mapping[str, Any], dtype: torch.dtype, folder: Path | None = None) -> FrozenParts:
    return FrozenParts({} if folder is None else {AUTOENCODER: next(folder.glob("vae/*.safetensors")).stat().st_size})


def parameters(config: Mapping[str, Any]) -> dict[str, Parameter]:
    return {name: Parameter(tuple(p.shape), False) for name, p in ToyModel(**config).named_parameters()}


def conditions(config: Mapping[str, Any], clip: ClipShape, memory: Any, size: int) -> float:
    return float(size * config["dim"] * clip.latents)


def step(config: Mapping[str, Any], clip: ClipShape, memory: Any, size: int) -> float:
    return 3.0 * size * config["dim"] * tokens(config, clip)[1]


def autoencoder(config: Mapping[str, Any], clip: ClipShape, memory: Any, width: int) -> dict[str, float]:
    return {"decode": 100.0 * width * clip.pixels}


def speech(config: Mapping[str, Any], folder: Path | None = None) -> SpeechCost:
    return SpeechCost(0.0, 4.0 * config["audio_dim"] * FPS, FPS)


def heads(config: Mapping[str, Any]) -> int:
    return 1


def tokens(config: Mapping[str, Any], clip: ClipShape) -> tuple[int, int]:
    cells = clip.latents * clip.pixels // 64
    return cells, cells


def flops(config: Mapping[str, Any], clip: ClipShape, memory: Any = None) -> float:
    dim = config["dim"]
    return 2.0 * tokens(config, clip)[1] * dim * (config["num_layers"] * dim + 2 * config["channels"])


# ---- Training --------------------------------------------------------------------------------------------------------

EXTRAS: frozenset[str] = frozenset()
MAX_GROUPS = sys.maxsize


def build_networks(arguments: Mapping[str, Any], text_encoder: str) -> tuple[ToyModel, None]:
    return ToyModel(**arguments), None


def velocities(transformer: ToyModel, batch: TrainBatch) -> Tensor:
    if batch.packed or batch.context is not None:
        raise UserError("the toy family trains on stacked clips, each on one process.")
    latents, timestep = (torch.stack([getattr(clip, name) for clip in batch.clips]) for name in ("latents", "timestep"))
    silence = torch.zeros(1, transformer.config["audio_dim"], 4 * latents.shape[2])
    audio = torch.stack([(silence if clip.audio is None else clip.audio).mean(0) for clip in batch.clips])
    return transformer(latents, timestep, torch.stack([text.mean(0, keepdim=True) for text in batch.texts]), audio)


def count_tokens(config: Any, frames: int, height: int, width: int, reference: bool, history: int) -> int:
    return frames * height * width


def attention_tokens(config: Mapping[str, Any]) -> float:
    return float("inf")


def save(folder: Path, transformer: ToyModel, text_encoder: None, run: TrainRun) -> None:
    transformer.save_pretrained(folder / "transformer")
    shutil.copytree(run.data["vae"], folder / "vae")
