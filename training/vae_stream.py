# SPDX-License-Identifier: Apache-2.0
"""Second stage of the autoencoder: its decoder learns streams of any length, the encoder stays as it is.

`python -m training.vae_stream --vae runs/vae/vae --out runs/vae/long`

The first stage sees at most 65 frames, but generation decodes without end through causal caches, where small errors
could add up. Here videos of up to 161 frames are decoded in windows with the caches carried over (truncated
back-propagation through time). Latents do not change, so a transformer can be trained on them at the same time.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, unpatchify
from torch import Tensor
from tqdm import tqdm

from talkingdit.atomic import write_whole
from talkingdit.autoencoders.streaming import FRAMES_PER_LATENT
from talkingdit.checkpoints.saving import save_model
from talkingdit.nn.bfloat16 import bfloat16_products
from training.vae import Mouths, reconstruction_loss, sample_clip

WINDOW = 4  # latents decoded between two steps of the optimiser


@dataclass
class StreamConfig:
    vae: Path = Path("runs/vae/vae")
    out: Path = Path("runs/vae/long")
    voices: Path = Path("data/voices")
    minutes: float = 36.0
    size: int = 96
    streams: int = 2  # videos decoded side by side, at different places
    learning_rate: float = 5e-4
    latent_noise: float = 0.2  # of the normalised latents' spread: generated latents are never exact
    edge_weight: float = 0.5
    mean_weight: float = 1.0
    mouth_weight: float = 16.0
    face_weight: float = 2.0
    ema: float = 0.995
    seed: int = 1
    threads: int = 1


class DecodingStream:
    """One video being decoded: its latents, its frames, and the decoder's caches up to where it is."""

    def __init__(self, vae: AutoencoderKLWan, rng: np.random.Generator, config: StreamConfig, mouths: Mouths) -> None:
        frames = 1 + FRAMES_PER_LATENT * int(rng.integers(8, 41))
        drawn, box = sample_clip(rng, frames, config.size, mouths)
        self.video = torch.from_numpy(drawn).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad(), bfloat16_products():
            self.latents = vae.encode(self.video).latent_dist.mode().float()
        spread = torch.tensor(vae.config["latents_std"]).view(1, -1, 1, 1, 1)
        self.latents = self.latents + config.latent_noise * rng.random() * spread * torch.randn_like(self.latents)
        weight = torch.ones(1, 1, 1, config.size, config.size)
        weight[..., int(0.25 * config.size) : int(0.72 * config.size), :] = config.face_weight
        x0, y0, x1, y1 = (box * config.size).astype(int)
        weight[..., y0:y1, x0:x1] = config.mouth_weight
        self.weight = weight / weight.mean()
        self.caches: list[Any] = [None] * sum(isinstance(m, WanCausalConv3d) for m in vae.decoder.modules())
        self.place = 0

    @property
    def ended(self) -> bool:
        return self.place >= self.latents.shape[2]

    def decode(self, vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
        """The next window's output and target, [1, 3, f, S, S]; gradients reach back to the window's beginning."""
        self.caches = [cache.detach() if isinstance(cache, Tensor) else cache for cache in self.caches]
        end = min(self.place + WINDOW, self.latents.shape[2])
        frames = []
        with bfloat16_products():
            hidden = vae.post_quant_conv(self.latents[:, :, self.place : end])
            for i in range(end - self.place):
                part = hidden[:, :, i : i + 1]
                first = self.place + i == 0
                frames.append(vae.decoder(part, feat_cache=self.caches, feat_idx=[0], first_chunk=first))
        output = unpatchify(torch.cat(frames, 2), patch_size=vae.config["patch_size"]).float()
        start = 0 if self.place == 0 else FRAMES_PER_LATENT * (self.place - 1) + 1
        target = self.video[:, :, start : start + output.shape[2]]
        self.place = end
        return output, target


def main(config: StreamConfig) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    mouths = Mouths.read(config.voices)
    vae = AutoencoderKLWan.from_pretrained(config.vae).train()
    averaged = AutoencoderKLWan.from_pretrained(config.vae).requires_grad_(False)
    vae.requires_grad_(False)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    kept = [*averaged.decoder.parameters(), *averaged.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    streams: list[DecodingStream | None] = [None] * config.streams
    bar = tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed} {postfix}")
    step, running = 0, None
    started = time.monotonic()
    while (share := (time.monotonic() - started) / (60 * config.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share))
        loss = torch.zeros(())
        for i, stream in enumerate(streams):
            current = DecodingStream(vae, rng, config, mouths) if stream is None or stream.ended else stream
            streams[i] = current
            output, target = current.decode(vae)
            error = reconstruction_loss(output, target, current.weight, config.edge_weight, config.mean_weight)
            loss = loss + error / config.streams
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        keep = min(config.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(kept, [p.detach() for p in trained], 1 - keep)
        step += 1
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.n = round(100 * share, 1)
        bar.set_postfix(step=step, loss=f"{running:.4f}")
    bar.close()
    save_model(averaged, config.out)
    record = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()} | {"steps": step}
    write_whole(config.out / "training.json", json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main(tyro.cli(StreamConfig))
