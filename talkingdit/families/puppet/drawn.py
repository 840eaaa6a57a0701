# SPDX-License-Identifier: Apache-2.0
"""The drawn world as a source of clips: videos drawn once to recorded voices, kept as latents and speech features.

Video frame 0 is the portrait; frame i >= 1 shows audio frame i - 1. The autoencoder is causal: latent 0 is frame 0,
latent k >= 1 is frames 4k-3 .. 4k, so latent k belongs to audio frames 4(k-1) .. 4(k-1)+3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import soundfile
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from talkingdit.atomic import write_whole
from talkingdit.autoencoders.wan import load_vae
from talkingdit.checkpoints.saving import save_tensors
from talkingdit.data.sample import ClipRequest, Sample, Shape
from talkingdit.encoders.log_mel import SpeechFeatures, normalise_loudness
from talkingdit.errors import UserError
from talkingdit.families.training import TrainRun
from talkingdit.lock import RunLock
from talkingdit.nn.bfloat16 import bfloat16_products
from talkingdit.puppets.render import mouth_boxes, render
from talkingdit.puppets.visemes import Visemes, visemes_from_audio
from talkingdit.puppets.world import Motion, Scene

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

FRAMES = {"long": 169, "short": 49}  # of a video, by file
HISTORY = 19  # latents of history the model packs


@dataclass(frozen=True, kw_only=True)
class DrawnVideos:
    """What videos are drawn, and where they and what they are made of lie."""

    voices: Path  # made by `python -m training.voices`
    vae: Path
    cache: Path  # latents and features of the videos
    long_videos: int
    short_videos: int
    size: int  # side of a frame, pixels
    fps: int

    @staticmethod
    def of(run: TrainRun) -> DrawnVideos:
        """Those of a run."""
        return DrawnVideos(**{field.name: run.data[field.name] for field in fields(DrawnVideos)})


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
        UserError: there is no index, or no voice of this split.
    """
    index = folder / "index.jsonl"
    if not index.exists():
        raise UserError(f"voices: {index} does not exist: make it with `python -m training.voices --out {folder}`")
    rows = [row for row in map(json.loads, index.read_text().splitlines()) if row["split"] == split]
    if not rows:
        raise UserError(f"voices: {index} lists no voice of split {split!r}")
    for row in tqdm(rows, desc=f"voices ({split})", leave=False):
        yield row, normalise_loudness(soundfile.read(folder / row["path"], dtype="float32")[0])


def read_visemes(folder: Path, split: Literal["train", "held_out"], fps: int) -> list[Visemes]:
    """Mouth shapes of the voices of a split; raises as `read_voices`."""
    return [visemes_from_audio(waveform, fps) for _, waveform in _recordings(folder, split)]


def read_voices(folder: Path, split: Literal["train", "held_out"], fps: int) -> list[Voice]:
    """The voices of a split, as listed in `index.jsonl`.

    Raises:
        UserError: there is no index, or no voice of this split.
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
def precompute(videos: DrawnVideos, seed: int = 0) -> None:
    """Draw and encode all training videos into the cache, unless they are there already for these settings.

    Raises:
        UserError: another run draws into the cache.
    """
    wanted = {
        "long": videos.long_videos,
        "short": videos.short_videos,
        "size": videos.size,
        "fps": videos.fps,
        "seed": seed,
        "vae": (videos.vae / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns,
    }
    stamp = videos.cache / "stamp.json"
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return
    videos.cache.mkdir(parents=True, exist_ok=True)
    with RunLock(videos.cache / ".lock", videos.cache, "drawing of training videos"):
        _fill(videos, seed)
        write_whole(stamp, json.dumps(wanted).encode())


def _fill(videos: DrawnVideos, seed: int) -> None:
    """Draw and encode anew; what is there counts for nothing meanwhile."""
    (videos.cache / "stamp.json").unlink(missing_ok=True)
    vae = load_vae(videos.vae)
    voices = read_voices(videos.voices, "train", videos.fps)
    for kind, count in (("long", videos.long_videos), ("short", videos.short_videos)):
        frames = FRAMES[kind]
        latents, cells, audio, captions = [], [], [], []
        for index in tqdm(range(count), desc=f"drawing {kind} videos"):
            drawn = _draw(np.random.default_rng((seed, frames, index)), voices, frames, videos.size)
            with bfloat16_products():
                latents.append(encode_video(vae, drawn["frames"]).to(torch.bfloat16))
            cells.append(drawn["cells"])
            audio.append(drawn["audio"].to(torch.float16))
            captions.append(drawn["caption"])
        tensors = {"latents": torch.stack(latents), "cells": torch.stack(cells), "audio": torch.stack(audio)}
        save_tensors(tensors, videos.cache / f"{kind}.safetensors", {"captions": json.dumps(captions)})


class Puppets:
    """A source (`talkingdit.data.sample.Source`) of clips cut from the cached videos.

    An item is one place of a clip in a video, so a video is drawn in proportion to the number of clips that can be cut
    from it; where the clip begins is then drawn anew. A clip begins the video (no history) or goes on, with enough
    video before it for its audio context, and with 19 latents of history, zeros before the video's start.

    Args:
        cache: folder that precompute() filled.
        clip_latents: latents of a clip for which the request does not say how many.
        audio_context: audio frames before a clip that goes on.
        name: of the source.

    Raises:
        ValueError: the cache is not there or no video is long enough.
    """

    cuts = True  # the request decides whether a clip begins its video

    def __init__(self, cache: Path, clip_latents: int, audio_context: int, name: str = "puppets") -> None:
        self.cache, self.clip_latents, self.audio_context, self.name = cache, clip_latents, audio_context, name
        if not (cache / "stamp.json").exists():
            raise ValueError(f"puppets: {cache} holds no complete set of drawn videos (stamp.json is missing)")
        self.fps = float(json.loads((cache / "stamp.json").read_text())["fps"])
        self._files: dict[str, Any] = {}
        self._videos: list[tuple[str, int, int]] = []  # file, row, latents
        self._captions: dict[str, list[str]] = {}
        for kind in FRAMES:
            file = self._file(kind)
            self._captions[kind] = json.loads(file.metadata()["captions"])
            count, self.channels, latents, self.height, self.width = file.get_slice("latents").get_shape()
            if latents > clip_latents:
                self._videos += [(kind, row, latents) for row in range(count)]
        if not self._videos:
            raise ValueError(f"puppets: no video in {cache} is longer than {clip_latents} latents")
        self._ends = np.cumsum([latents - clip_latents for _, _, latents in self._videos])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # every process opens them itself

    def _file(self, kind: str) -> Any:
        if kind not in self._files:
            self._files[kind] = safe_open(self.cache / f"{kind}.safetensors", "pt")
        return self._files[kind]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def video(self, index: int) -> tuple[str, int, int]:
        """The video of an item: file, row, number of latents."""
        return self._videos[int(np.searchsorted(self._ends, index, side="right"))]

    def group(self, index: int) -> str:
        """Name of the video of an item."""
        kind, row, _ = self.video(index)
        return f"{kind}/{row}"

    @property
    def _before(self) -> int:
        """Latents after the first whose audio must exist before a clip that goes on."""
        return -(-self.audio_context // 4)

    def shape(self, index: int) -> Shape:
        _, _, latents = self.video(index)
        frames = latents - 1 - self._before
        return Shape(frames, self.height, self.width, fps=self.fps, history=HISTORY)

    def sample(self, index: int, rng: np.random.Generator, clip: ClipRequest) -> Sample:
        """A clip; it goes on unless the request says that it begins the video.

        Raises:
            ValueError: the request does not fit the shape.
        """
        kind, row, latents = self.video(index)
        frames = clip.frames or self.clip_latents
        size = clip.height or self.height, clip.width or self.width
        if frames > latents - 1 - self._before or size != (self.height, self.width):
            raise ValueError(
                f"puppets: a clip of video {kind}/{row} has at most {latents - 1 - self._before} x {self.height} x "
                f"{self.width} latents, asked for {frames} x {size[0]} x {size[1]}"
            )
        first = clip.history is False
        start = 1 if first else int(rng.integers(1 + self._before, latents - frames + 1))
        at = 4 * (start - 1)

        def cut(name: str, axis: int, begin: int, end: int) -> Tensor:
            where = [slice(row, row + 1), *[slice(None)] * (axis - 1), slice(begin, end)]
            return self._file(kind).get_slice(name)[tuple(where)][0].float()

        history = None
        if not first:
            past = cut("latents", 2, max(0, start - HISTORY), start)
            history = torch.zeros(self.channels, HISTORY, self.height, self.width)
            history[:, HISTORY - past.shape[1] :] = past
        return Sample(
            key=f"{kind}/{row}@{start}",
            source=self.name,
            latents=cut("latents", 2, start, start + frames),
            audio=cut("audio", 3, at, at + 4 * frames),
            caption=self._captions[kind][row],
            reference=cut("latents", 2, 0, 1),
            history=history,
            audio_history=None if first else cut("audio", 3, at - self.audio_context, at),
            regions={"mouth": cut("cells", 1, start, start + frames)},
        )
