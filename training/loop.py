# SPDX-License-Identifier: Apache-2.0
"""The training loop of one process: flow matching, dropout of conditions, EMA, exact resume, sync measured."""

from __future__ import annotations

import copy
import math
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from talkingdit.models.presets import preset
from talkingdit.models.text import PromptEncoder
from talkingdit.models.wan import WanS2VModel
from training import state_file
from training.config import Config, at, write_json
from training.dataset import PuppetClips
from training.export import export
from training.losses import add_noise, sample_sigmas, velocity_loss
from training.networks import Networks
from training.validate import Validator


def build_optimizers(networks: Networks, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks and audio injectors, AdamW for everything else (all, if `muon_lr` is 0)."""
    o = config.optim
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in networks.named_parameters():
        inner = ".blocks." in name or ".injector." in name
        (matrices if o.muon_lr > 0 and inner and parameter.ndim == 2 else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=o.lr, betas=(0.9, 0.98), weight_decay=o.weight_decay, fused=True)
    ]
    if matrices:
        muon = torch.optim.Muon(
            matrices, lr=o.muon_lr, weight_decay=o.weight_decay, ns_steps=4, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


class Trainer:
    """State of a run. `run()` trains to the end of the schedule, from wherever the last checkpoint left it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        torch.manual_seed(config.run.seed)
        settings = preset(config.model.preset)
        self.networks = Networks(WanS2VModel(**settings), PromptEncoder(settings["text_dim"], settings["text_len"]))
        self.averaged = copy.deepcopy(self.networks).requires_grad_(False).eval()
        self.optimizers = build_optimizers(self.networks, config)
        self.clips = PuppetClips(config.data, config.model)
        self.vae = AutoencoderKLWan.from_pretrained(config.data.shipped_vae or config.data.vae).eval()
        self.validator = Validator(config, self.vae)
        self.rng = np.random.default_rng(config.run.seed)
        self.step, self.elapsed = 0, 0.0
        self.file = config.run.out / "checkpoint.pt"
        config.run.out.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            self._resume()

    def _resume(self) -> None:
        state = state_file.load(self.file)
        self.networks.load_state_dict(state["networks"])
        self.averaged.load_state_dict(state["averaged"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng = state_file.restore_generator(state["rng"])
        self.step, self.elapsed = state["step"], state["elapsed"]

    def save(self) -> None:
        state = {
            "networks": self.networks.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": state_file.generator_state(self.rng),
            "step": self.step,
            "elapsed": self.elapsed,
        }
        state_file.save(self.file, state)
        write_json(self.config, self.config.run.out / "config.json")

    def progress(self) -> float:
        """Share of the schedule that is done, 0..1: of the time budget if there is one, of the steps otherwise."""
        if self.config.run.minutes > 0:
            return min(1.0, self.elapsed / (60 * self.config.run.minutes))
        return min(1.0, self.step / self.config.run.steps)

    def learning_rate_factor(self) -> float:
        warmup = min(1.0, (self.step + 1) / max(1, self.config.optim.warmup_steps))
        return warmup * max(0.01, 0.5 * (1 + math.cos(math.pi * self.progress())))

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Loss of every sample [B] and whether it heard the audio [B], with conditions dropped independently."""
        o, c, rng, done = self.config.objective, self.config.conditions, self.rng, self.progress()
        clean: Tensor = batch["latents"]
        size = len(clean)
        captions = ["" if rng.random() < at(c.drop_text, done) else caption for caption in batch["captions"]]
        hears = torch.from_numpy(rng.random(size) >= at(c.drop_audio, done))
        gate = hears.float().view(-1, 1, 1, 1)
        context = batch["audio_history"]
        history = batch["history"]
        if history is not None and rng.random() < at(c.drop_history, done):
            history = None
        if history is not None:
            level = torch.from_numpy(rng.random(size).astype(np.float32)) * at(c.history_noise, done)
            history = history + level.view(-1, 1, 1, 1, 1) * torch.randn_like(history)
        sigma = sample_sigmas(size, o.shift)
        noise = torch.randn_like(clean)
        mouth = torch.where(batch["mouth"], at(o.regions.get("mouth", 1.0), done), 1.0)
        weight = mouth / mouth.mean(dim=(1, 2, 3, 4), keepdim=True)
        precise = self.config.parallel.precision == "fp32"
        encoder = self.networks.text_encoder
        assert encoder is not None
        with nullcontext() if precise else torch.autocast("cpu", torch.bfloat16):
            velocity = self.networks.transformer(
                add_noise(clean, noise, sigma),
                1000 * sigma,
                encoder.encode(captions).features,
                reference=batch["reference"],
                drop_reference=bool(rng.random() < at(c.drop_reference, done)),
                history=history,
                audio=batch["audio"] * gate,
                audio_history=None if context is None else context * gate,
            )
        return velocity_loss(velocity, clean, noise, weight), hears

    def train_step(self) -> dict[str, float]:
        first = bool(self.rng.random() < at(self.config.conditions.first_clip, self.progress()))
        size = self.config.batch.count * self.config.batch.size
        losses, hears = self.loss(self.clips.batch(self.rng, size, first))
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.networks.parameters(), self.config.optim.clip_norm)
        factor = self.learning_rate_factor()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        keep = min(self.config.optim.ema, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(
            list(self.averaged.parameters()), [p.detach() for p in self.networks.parameters()], 1 - keep
        )
        self.step += 1
        logs = {"loss": losses.mean().item(), "gradient_norm": norm.item(), "lr_factor": factor}
        logs["loss_first_clip" if first else "loss_later_clip"] = logs["loss"]
        for name, chosen in (("loss_with_audio", hears), ("loss_without_audio", ~hears)):
            if chosen.any():
                logs[name] = losses[chosen].mean().item()
        return logs

    def run(self) -> None:
        run = self.config.run
        writer = SummaryWriter(str(run.out / "tensorboard"), purge_step=self.step)
        bar = tqdm(total=100, initial=round(100 * self.progress(), 1), bar_format="{l_bar}{bar}| {elapsed} {postfix}")
        mean_loss = None
        text_encoder = self.averaged.text_encoder
        assert text_encoder is not None
        started = time.monotonic()
        while self.progress() < 1:
            logs = self.train_step()
            now = time.monotonic()
            self.elapsed, started = self.elapsed + now - started, now
            mean_loss = logs["loss"] if mean_loss is None else 0.98 * mean_loss + 0.02 * logs["loss"]
            for name, value in logs.items():
                writer.add_scalar(name, value, self.step)
            bar.n = round(100 * self.progress(), 1)
            bar.set_postfix(step=self.step, loss=f"{mean_loss:.4f}", **self.validator.latest)
            if self.step % self.config.sample.every == 0:
                self.validator.run(self.averaged.transformer, text_encoder, writer, self.step)
            if self.step % self.config.checkpoint.every == 0:
                self.save()
        self.save()
        self.validator.run(self.averaged.transformer, text_encoder, writer, self.step)
        export(self.averaged.transformer, text_encoder, self.vae, self.config, run.out / "model")
        bar.close()
        writer.close()
