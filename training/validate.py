# SPDX-License-Identifier: Apache-2.0
"""While training goes on, held-out characters speak with held-out voices; the probe says how well."""

from __future__ import annotations

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch.utils.tensorboard import SummaryWriter

from talkingdit.models.checkpoints import Checkpoint, PipelineSettings
from talkingdit.models.text import PromptEncoder
from talkingdit.models.wan import WanS2VModel
from talkingdit.pipelines.generate import Sampling, TalkingPipeline
from talkingdit.puppets.probe import probe
from talkingdit.puppets.render import Image, render
from talkingdit.puppets.world import Motion, Scene
from training.config import Config
from training.puppets import read_voices


def pipeline_settings(config: Config) -> PipelineSettings:
    """What a model trained with this configuration tells those who generate with it."""
    return PipelineSettings(
        fps=config.data.fps,
        size=config.data.size,
        clip_latents=config.model.clip_latents,
        audio_history=config.model.audio_context,
        shift=config.objective.shift,
        steps=config.sample.steps,
        text_guidance=config.sample.text_guidance,
        audio_guidance=config.sample.audio_guidance,
    )


class Validator:
    """Generates the same few scenes each time: a fixed seed, held-out characters, one held-out voice each."""

    def __init__(self, config: Config, vae: AutoencoderKLWan) -> None:
        self.config, self.vae = config, vae
        self.latest: dict[str, str] = {}
        rng = np.random.default_rng(config.run.seed + 77)
        voices = read_voices(config.data.voices, "held_out", config.data.fps)
        frames = int(config.sample.seconds * config.data.fps)
        long_enough = [voice for voice in voices if len(voice.opening) >= frames]
        if len(long_enough) < 1:
            raise ValueError(f"validation: no held-out voice in {config.data.voices} lasts {config.sample.seconds} s")
        self.cases = []
        for _ in range(config.sample.clips):
            voice = long_enough[rng.integers(len(long_enough))]
            start = int(rng.integers(len(voice.opening) - frames + 1))
            scene = Scene.random(rng, "held_out")
            shut = np.zeros((1, 1), np.float32)
            portrait = render(scene, shut, shut + 0.5, [Motion.still(1)], config.data.size)[0]
            span = slice(start, start + frames)
            self.cases.append((scene, portrait, voice.features[..., span], voice.opening[span]))

    def run(
        self, transformer: WanS2VModel, text_encoder: PromptEncoder, writer: SummaryWriter, step: int
    ) -> dict[str, float]:
        """Generate and measure with the given (averaged) networks; logs numbers and the last video."""
        checkpoint = Checkpoint(
            transformer=transformer,
            vae=self.vae,
            text_encoder=text_encoder,
            settings=pipeline_settings(self.config),
            folder=self.config.run.out,
        )
        pipeline = TalkingPipeline(checkpoint)
        truth, measured, identity = [], [], []
        video: Image = np.zeros((0, 1, 1, 3), np.uint8)
        for scene, portrait, features, opening in self.cases:
            with torch.autocast("cpu", torch.bfloat16):
                video = np.concatenate(list(pipeline.generate(portrait, features, scene.caption(), Sampling(seed=0))))
            reading = probe(video)
            truth.append(opening)
            measured.append(reading.opening[0])
            identity.append(reading.identity_share(0, scene.characters[0]))
        each = [float(np.corrcoef(t, m)[0, 1]) for t, m in zip(truth, measured, strict=True)]
        results = {
            "sync_r": float(np.mean(each)),
            "sync_slope": float(np.polyfit(np.concatenate(truth), np.concatenate(measured), 1)[0]),
            "identity": float(np.mean(identity)),
        }
        for name, value in results.items():
            writer.add_scalar(f"validation/{name}", value, step)
        frames = torch.from_numpy(video).permute(0, 3, 1, 2)[None]
        writer.add_images("validation/frames", frames[0, :: max(1, len(video) // 8)], step)
        self.latest = {"r": f"{results['sync_r']:.2f}", "slope": f"{results['sync_slope']:.2f}"}
        return results
