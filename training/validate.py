# SPDX-License-Identifier: Apache-2.0
"""While training goes on, held-out characters speak with held-out voices; the probe says how well.

Every rank generates the same videos in step with the others, because parameters are gathered from all of them; rank 0
looks at the result.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from talkingdit.families.puppet.checkpoint import PuppetCheckpoint
from talkingdit.families.puppet.pipeline import PuppetPipeline, Sampling
from talkingdit.puppets.probe import probe
from talkingdit.puppets.render import Image, render
from talkingdit.puppets.world import Motion, Scene
from training.build import pipeline_settings
from training.config import Config
from training.metrics import Writer
from training.networks import Networks
from training.parallel import ProcessMesh
from training.puppets import read_voices


class Validator(Protocol):
    """Measures networks while they train."""

    def run(self, networks: Networks, writer: Writer | None, step: int) -> dict[str, float]:
        """Generate with the networks as they are, on all ranks; rank 0 logs and returns what it measured."""


def validator_for(config: Config, layout: ProcessMesh) -> Validator | None:
    """The validation that a configuration asks for, None for none. Every rank must call this."""
    if config.sample.every <= 0:
        return None
    if config.model.text_encoder == "prompt":
        return PuppetValidator(config)
    if config.sample.cases is not None:
        from training.validate_s2v import WanS2VValidator

        return WanS2VValidator(config, layout)
    return None


class PuppetValidator:
    """Generates the same few scenes each time: a fixed seed, held-out characters, one held-out voice each."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.vae = AutoencoderKLWan.from_pretrained(config.data.shipped_vae or config.data.vae).eval()
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

    @torch.no_grad()
    def run(self, networks: Networks, writer: Writer | None, step: int) -> dict[str, float]:
        """Generate and measure with the networks as they are; logs numbers and the last video where there is a writer.

        Returns:
            sync_r (correlation of the mouth with the truth, mean over videos), sync_slope, identity (share of frames);
            nothing on other ranks than 0.
        """
        assert networks.text_encoder is not None
        checkpoint = PuppetCheckpoint(
            transformer=networks.transformer,
            vae=self.vae,
            text_encoder=networks.text_encoder,
            settings=pipeline_settings(self.config),
            folder=self.config.run.out,
        )
        pipeline = PuppetPipeline(checkpoint)
        truth, measured, identity = [], [], []
        video: Image = np.zeros((0, 1, 1, 3), np.uint8)
        for scene, portrait, features, opening in self.cases:
            video = np.concatenate(list(pipeline.generate(portrait, features, scene.caption(), Sampling(seed=0))))
            if dist.get_rank() == 0:
                reading = probe(video)
                truth.append(opening)
                measured.append(reading.opening[0])
                identity.append(reading.identity_share(0, scene.characters[0]))
        if not truth:
            return {}
        each = [float(np.corrcoef(t, m)[0, 1]) for t, m in zip(truth, measured, strict=True)]
        results = {
            "sync_r": float(np.mean(each)),
            "sync_slope": float(np.polyfit(np.concatenate(truth), np.concatenate(measured), 1)[0]),
            "identity": float(np.mean(identity)),
        }
        if writer is not None:
            writer.scalars({f"validation/{name}": value for name, value in results.items()}, step)
            frames = torch.from_numpy(video[:: max(1, len(video) // 8)]).permute(0, 3, 1, 2)
            writer.frames("validation/frames", frames, step)
        return results
