# SPDX-License-Identifier: Apache-2.0
"""Clips of the puppet world for training: videos drawn once to recorded voices, kept as latents and speech features.

Video frame 0 is the portrait; frame i >= 1 shows audio frame i - 1. The autoencoder is causal: latent 0 is frame 0,
latent k >= 1 is frames 4k-3 .. 4k, so latent k belongs to audio frames 4(k-1) .. 4(k-1)+3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from talkingdit.models.audio import SpeechFeatures, normalise_loudness
from talkingdit.puppets.render import mouth_boxes, render
from talkingdit.puppets.visemes import Visemes, visemes_from_audio
from talkingdit.puppets.world import Motion, Scene
from training.config import DataConfig, ModelConfig

LONG_FRAMES, SHORT_FRAMES = 169, 49
HISTORY = 19  # latents of history the model packs


@dataclass
class Voice:
    """A recording with everything derived from it, per video frame."""

    features: Tensor  # [layers, audio_dim, F]
    opening: np.ndarray  # [F]
    width: np.ndarray  # [F]
    speaker: str
    file: Path


def _recordings(folder: Path, split: Literal["train", "held_out"]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Entry and waveform [n] (16 kHz, loudness normalised) of every voice of a split, as `index.jsonl` lists them.

    Raises:
        ValueError: there is no index, or no voice of this split.
    """
    index = folder / "index.jsonl"
    if not index.exists():
        raise ValueError(f"voices: {index} does not exist: make it with `python -m training.voices --out {folder}`")
    rows = [row for row in map(json.loads, index.read_text().splitlines()) if row["split"] == split]
    if not rows:
        raise ValueError(f"voices: {index} lists no voice of split {split!r}")
    for row in tqdm(rows, desc=f"voices ({split})", leave=False):
        yield row, normalise_loudness(soundfile.read(folder / row["path"], dtype="float32")[0])


def read_visemes(folder: Path, split: Literal["train", "held_out"], fps: int) -> list[Visemes]:
    """Mouth shapes of the voices of a split; raises as `read_voices`."""
    return [visemes_from_audio(waveform, fps) for _, waveform in _recordings(folder, split)]


def read_voices(folder: Path, split: Literal["train", "held_out"], fps: int) -> list[Voice]:
    """The voices of a split, as listed in `index.jsonl`.

    Raises:
        ValueError: there is no index, or no voice of this split.
    """
    voices = []
    for row, waveform in _recordings(folder, split):
        visemes = visemes_from_audio(waveform, fps)
        features = SpeechFeatures(fps=fps)(waveform, len(visemes.opening))
        voices.append(Voice(features, visemes.opening, visemes.width, row["speaker"], folder / row["path"]))
    return voices


def mouth_cells(boxes: np.ndarray, cells: int) -> Tensor:
    """Latent cells that a mouth touches: boxes [F, 4] of frames 0..4K in frame sizes -> bool [K + 1, cells, cells]."""
    latents = 1 + (len(boxes) - 1) // 4
    mask = torch.zeros(latents, cells, cells, dtype=torch.bool)
    for k in range(latents):
        span = boxes[max(0, 4 * k - 3) : 4 * k + 1]
        x0, y0 = np.floor(span[:, :2].min(0) * cells).astype(int)
        x1, y1 = np.ceil(span[:, 2:].max(0) * cells).astype(int)
        mask[k, max(y0, 0) : y1, max(x0, 0) : x1] = True
    return mask


def encode_video(vae: AutoencoderKLWan, frames: np.ndarray) -> Tensor:
    """uint8 frames [4K + 1, S, S, 3] -> normalised latents [16, K + 1, S/8, S/8]."""
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    latents = vae.encode(video).latent_dist.mode()[0].float()
    mean, std = torch.tensor(vae.config["latents_mean"]), torch.tensor(vae.config["latents_std"])
    return (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)


def _draw(rng: np.random.Generator, voices: list[Voice], frames: int, size: int) -> dict[str, Any]:
    """One training video and what belongs to it; mouth shapes come one frame after the portrait."""
    while True:
        voice = voices[rng.integers(len(voices))]
        spare = len(voice.opening) - (frames - 1)
        if spare >= 0:
            break
    start = int(rng.integers(spare + 1))
    scene = Scene.random(rng, "train")
    motion = [Motion.random(rng, frames)]
    first = 0.0 if rng.random() < 0.7 else rng.random()
    opening = np.concatenate([[first], voice.opening[start : start + frames - 1]]).astype(np.float32)
    width = np.concatenate([[0.5], voice.width[start : start + frames - 1]]).astype(np.float32)
    return {
        "frames": render(scene, opening[None], width[None], motion, size),
        "cells": mouth_cells(mouth_boxes(scene, motion)[0], size // 8),
        "audio": voice.features[:, :, start : start + frames - 1],
        "caption": scene.caption(),
    }


@torch.no_grad()
def precompute(config: DataConfig, seed: int = 0) -> None:
    """Draw and encode all training videos into `config.cache`, unless they are there already for these settings."""
    wanted = {
        "long": config.long_videos,
        "short": config.short_videos,
        "size": config.size,
        "fps": config.fps,
        "seed": seed,
        "vae": (config.vae / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns,
    }
    stamp = config.cache / "stamp.json"
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return
    stamp.unlink(missing_ok=True)
    config.cache.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKLWan.from_pretrained(config.vae).eval()
    voices = read_voices(config.voices, "train", config.fps)
    for kind, count, frames in (
        ("long", config.long_videos, LONG_FRAMES),
        ("short", config.short_videos, SHORT_FRAMES),
    ):
        latents, cells, audio, captions = [], [], [], []
        for index in tqdm(range(count), desc=f"drawing {kind} videos"):
            drawn = _draw(np.random.default_rng((seed, frames, index)), voices, frames, config.size)
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(encode_video(vae, drawn["frames"]).to(torch.bfloat16))
            cells.append(drawn["cells"])
            audio.append(drawn["audio"].to(torch.float16))
            captions.append(drawn["caption"])
        tensors = {"latents": torch.stack(latents), "cells": torch.stack(cells), "audio": torch.stack(audio)}
        save_file(tensors, config.cache / f"{kind}.safetensors", metadata={"captions": json.dumps(captions)})
    stamp.write_text(json.dumps(wanted))


class PuppetClips:
    """Batches of clips cut from the cached videos; every batch is wholly a video's start or wholly later clips.

    A batch is a dict: latents [B, 16, T, h, w], reference [B, 16, 1, h, w], history [B, 16, 19, h, w] (zeros before the
    video's start) or None, audio [B, layers, dim, 4T], audio_history [B, layers, dim, context] or None, mouth
    [B, 1, T, h, w] bool, captions.
    """

    def __init__(self, config: DataConfig, model: ModelConfig) -> None:
        self.clip, self.context = model.clip_latents, model.audio_context
        self.videos: list[dict[str, Any]] = []
        for kind in ("long", "short"):
            with safe_open(config.cache / f"{kind}.safetensors", "pt") as file:
                captions = json.loads(file.metadata()["captions"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            for i, caption in enumerate(captions):
                self.videos.append({name: tensor[i] for name, tensor in tensors.items()} | {"caption": caption})
        # Videos are drawn in proportion to the number of clips that can be cut from them.
        room = np.array([v["latents"].shape[1] - self.clip for v in self.videos], np.float64)
        self.share = room / room.sum()

    def batch(self, rng: np.random.Generator, size: int, first: bool) -> dict[str, Any]:
        """Draw a batch; `first` asks for clips that start a video."""
        context = -(-self.context // 4)  # latents whose audio frames must exist before a later clip
        rows: dict[str, list[Tensor]] = {
            k: [] for k in ("latents", "reference", "history", "audio", "audio_history", "mouth")
        }
        captions = []
        for index in rng.choice(len(self.videos), size, p=self.share):
            video = self.videos[index]
            latents = video["latents"].float()
            start = 1 if first else int(rng.integers(1 + context, latents.shape[1] - self.clip + 1))
            past = latents[:, max(0, start - HISTORY) : start]
            history = torch.zeros(latents.shape[0], HISTORY, *latents.shape[2:])
            history[:, HISTORY - past.shape[1] :] = past
            audio, at = video["audio"].float(), 4 * (start - 1)
            rows["latents"].append(latents[:, start : start + self.clip])
            rows["reference"].append(latents[:, :1])
            rows["history"].append(history)
            rows["audio"].append(audio[..., at : at + 4 * self.clip])
            rows["audio_history"].append(audio[..., max(0, at - self.context) : at])
            rows["mouth"].append(video["cells"][None, start : start + self.clip])
            captions.append(video["caption"])
        absent = ("history", "audio_history") if first else ()
        batch: dict[str, Any] = {k: None if k in absent else torch.stack(v) for k, v in rows.items()}
        return batch | {"captions": captions}
