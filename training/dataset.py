# SPDX-License-Identifier: Apache-2.0
"""Batches of puppet clips for the loop of one process."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from training.config import DataConfig, ModelConfig
from training.puppets import HISTORY


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
