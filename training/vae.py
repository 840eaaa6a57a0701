# SPDX-License-Identifier: Apache-2.0
"""Train the tiny video autoencoder of the puppet world: `python -m training.vae --out runs/vae`.

The network is diffusers' AutoencoderKLWan (4x8x8 compression, 16 channels) in a tiny configuration: 2x2 pixel patches
in and out, so that the widest layers work at half the resolution. Clips are rendered on the fly, seen once each; their
mouths follow recorded voices in half of them and move at random in the others.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor
from tqdm import tqdm

from talkingdit import families
from talkingdit.atomic import whole_file, write_whole
from talkingdit.checkpoints.saving import save_model
from talkingdit.nn.bfloat16 import bfloat16_products
from talkingdit.puppets.render import mouth_boxes, render
from talkingdit.puppets.visemes import Visemes
from talkingdit.puppets.world import Motion, Scene

# (clips, frames) of a batch, in turn: short ones for variety, long ones so that the causal caches see many chunks.
CROPPED_SHAPES = ((4, 9), (2, 33))
WHOLE_SHAPES = ((2, 9), (1, 33), (2, 9), (1, 65))
CROP = 64  # pixels; convolutions learn the same from a crop, at less than half the cost
CROPPED_SHARE = 0.6  # of the run


@dataclass
class VaeConfig:
    out: Path = Path("runs/vae")
    voices: Path = Path("data/voices")
    start: Path | None = None  # folder of an autoencoder to go on from, with a new schedule
    minutes: float = 110.0  # wall-clock budget; the learning rate follows the elapsed share of it
    size: int = 96
    base_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 3, 5)
    learning_rate: float = 2e-3
    kl_weight: float = 1e-4
    edge_weight: float = 0.5
    mean_weight: float = 2.0
    mouth_weight: float = 20.0
    face_weight: float = 2.0
    ema: float = 0.998
    seed: int = 0
    threads: int = 2
    save_every: int = 500


def make_vae(config: VaeConfig) -> AutoencoderKLWan:
    z = 16
    return AutoencoderKLWan(
        base_dim=config.base_dim,
        dim_mult=list(config.dim_mult),
        z_dim=z,
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        latents_mean=[0.0] * z,
        latents_std=[1.0] * z,
    )


def random_openings(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Mouth openings and widths [2, F] drawn anew in most frames and held in some, covering 0..1 evenly.

    They are rougher than speech on purpose: from smooth ones the autoencoder learns to keep every other frame and to
    interpolate the rest, which speech does not forgive at 16 frames a second.
    """
    drawn = rng.random((2, frames)).astype(np.float32)
    hold = rng.random((2, frames)) < 0.2
    for i in range(1, frames):
        drawn[:, i] = np.where(hold[:, i], drawn[:, i - 1], drawn[:, i])
    drawn[0] = np.clip(1.3 * drawn[0] - 0.15, 0, 1)
    if rng.random() < 0.15:
        drawn[0] = 0
    return drawn


class Mouths:
    """Openings and widths for drawn clips: stretches of recorded voices in half of them, random in the others."""

    def __init__(self, spoken: Sequence[Visemes]) -> None:
        self.spoken = [np.stack([v.opening, v.width]) for v in spoken]
        self.lengths = np.array([curve.shape[1] for curve in self.spoken], np.float64)

    @staticmethod
    def read(voices: Path, fps: int = 16) -> Mouths:
        """Those of the training voices in a folder that `training.voices` made."""
        return Mouths(families.get("puppet").part("drawn").read_visemes(voices, "train", fps))

    def draw(self, rng: np.random.Generator, frames: int) -> np.ndarray:
        """Openings and widths [2, frames]."""
        room = np.maximum(self.lengths - frames, 0)
        if rng.random() < 0.5 or not room.any():
            return random_openings(rng, frames)
        curve = self.spoken[int(rng.choice(len(room), p=room / room.sum()))]
        start = int(rng.integers(curve.shape[1] - frames + 1))
        return curve[:, start : start + frames]


def sample_clip(rng: np.random.Generator, frames: int, size: int, mouths: Mouths) -> tuple[np.ndarray, np.ndarray]:
    """A training clip: frames [F, size, size, 3] uint8 and mouth box [4] in frame sizes (union over the clip)."""
    scene = Scene.random(rng, "train")
    motion = [Motion.random(rng, frames)]
    opening, width = mouths.draw(rng, frames)
    box = mouth_boxes(scene, motion)[0]
    union = np.concatenate([box[:, :2].min(0), box[:, 2:].max(0)])
    return render(scene, opening[None], width[None], motion, size), union


def batches(
    config: VaeConfig, mouths: Mouths, seed: int, progress: Callable[[], float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches: video [B, 3, T, S, S] in -1..1 and pixel weights [B, 1, 1, S, S], mean one.

    Crops of 64 pixels on the grid of latents for the first part of the run (`progress` 0..1), whole frames after it.
    """
    rng = np.random.default_rng(seed)
    index = 0
    while True:
        cropped = progress() < CROPPED_SHARE
        shapes = CROPPED_SHAPES if cropped else WHOLE_SHAPES
        clips, frames = shapes[index % len(shapes)]
        index += 1
        drawn = [sample_clip(rng, frames, config.size, mouths) for _ in range(clips)]
        video = torch.from_numpy(np.stack([d[0] for d in drawn])).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        weight = torch.ones(clips, 1, 1, config.size, config.size)
        for i, (_, box) in enumerate(drawn):
            weight[i, ..., int(0.25 * config.size) : int(0.72 * config.size), :] = config.face_weight
            x0, y0, x1, y1 = (box * config.size).astype(int)
            weight[i, ..., y0:y1, x0:x1] = config.mouth_weight
        if cropped:
            spare = (config.size - CROP) // 8
            x, y = 8 * int(rng.integers(1, max(2, spare))), 8 * int(rng.integers(spare + 1))
            video, weight = (part[..., y : y + CROP, x : x + CROP] for part in (video, weight))
        yield video, weight / weight.mean(dim=(-1, -2), keepdim=True)


def differences(x: Tensor) -> Iterator[Tensor]:
    """Differences of neighbours in height, width and time: outlines, and what moves."""
    yield x[..., 1:, :] - x[..., :-1, :]
    yield x[..., 1:] - x[..., :-1]
    if x.shape[2] > 1:
        yield x[:, :, 1:] - x[:, :, :-1]


def reconstruction_loss(
    output: Tensor, target: Tensor, weight: Tensor, edge_weight: float, mean_weight: float
) -> Tensor:
    """Weighted L1 on pixels, on their differences in space and time, and on the means of 8x8 pixels.

    The differences keep outlines and motion sharp. The means keep colours and the area of an open mouth right, which
    an L1 loss alone leaves biased where it cannot resolve them.

    Args:
        output, target: [B, 3, T, H, W], H and W multiples of 8.
        weight: [B, 1, 1, H, W], of mean one.
    """
    error = output - target
    loss = (weight * error.abs()).mean()
    for difference, w in zip(differences(error), (weight[..., 1:, :], weight[..., 1:], weight), strict=False):
        loss = loss + 0.5 * edge_weight * (w * difference.abs()).mean()
    means = F.avg_pool3d(error, (1, 8, 8))
    return loss + mean_weight * (F.avg_pool3d(weight, (1, 8, 8)) * means.abs()).mean()


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKLWan, config: VaeConfig, mouths: Mouths, clips: int = 24
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every latent channel over rendered clips of 33 frames."""
    rng = np.random.default_rng(10_000 + config.seed)
    means = []
    for _ in range(clips):
        frames = sample_clip(rng, 33, config.size, mouths)[0]
        video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        means.append(vae.encode(video).latent_dist.mode())
    latents = torch.cat(means)
    return latents.mean(dim=(0, 2, 3, 4)).tolist(), latents.std(dim=(0, 2, 3, 4)).tolist()


def main(config: VaeConfig) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    config.out.mkdir(parents=True, exist_ok=True)
    mouths = Mouths.read(config.voices)
    vae = make_vae(config)
    if config.start is not None:
        vae.load_state_dict(AutoencoderKLWan.from_pretrained(config.start).state_dict())
    averaged = make_vae(config)
    averaged.load_state_dict(vae.state_dict())
    averaged.requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    step, elapsed = 0, 0.0
    state_file = config.out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]

    def save() -> None:
        state = {
            "vae": vae.state_dict(),
            "averaged": averaged.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "elapsed": elapsed,
        }
        with whole_file(state_file) as temporary:
            torch.save(state, temporary)

    bar = tqdm(total=100, unit="%", initial=0, bar_format="{l_bar}{bar}| {elapsed} {postfix}")

    def progress() -> float:
        return elapsed / (60 * config.minutes)

    running = None
    started = time.monotonic()
    for video, weight in batches(config, mouths, config.seed + 1 + step, progress):
        share = progress()
        if share >= 1:
            break
        warmup = min(1.0, (step + 1) / 200)
        decay = 1.0 if share < 0.4 else 0.5 * (1 + math.cos(math.pi * (share - 0.4) / 0.6))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warmup * max(decay, 0.005)
        with bfloat16_products():
            posterior = vae.encode(video).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        reconstruction = reconstruction_loss(output, video, weight, config.edge_weight, config.mean_weight)
        loss = reconstruction + config.kl_weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        keep = min(config.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(averaged.parameters()), [p.detach() for p in vae.parameters()], 1 - keep)
        step += 1
        now = time.monotonic()
        elapsed, started = elapsed + now - started, now
        running = reconstruction.item() if running is None else 0.98 * running + 0.02 * reconstruction.item()
        bar.n = round(100 * share, 1)
        bar.set_postfix(step=step, loss=f"{running:.4f}", kl=f"{kl.item():.2f}", std=f"{posterior.std.mean():.3f}")
        if step % config.save_every == 0:
            save()
    save()
    mean, std = latent_statistics(averaged, config, mouths)
    averaged.register_to_config(latents_mean=mean, latents_std=std)
    save_model(averaged, config.out / "vae")
    record = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    record |= {"steps": step, "seconds": elapsed}
    write_whole(config.out / "vae" / "training.json", json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main(tyro.cli(VaeConfig))
