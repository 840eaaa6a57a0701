# SPDX-License-Identifier: Apache-2.0
"""While training goes on, held-out characters speak with held-out voices; the probe says how well.

Every rank generates the same videos in step with the others, because parameters are gathered from all of them; rank 0
looks at the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from talkingdit.autoencoders.wan import load_vae
from talkingdit.families.puppet.checkpoint import PuppetCheckpoint, PuppetSettings
from talkingdit.families.puppet.drawn import read_voices
from talkingdit.families.puppet.options import Options
from talkingdit.families.puppet.pipeline import PuppetPipeline
from talkingdit.families.puppet.text import PromptEncoder
from talkingdit.families.training import TrainRun
from talkingdit.families.wan_s2v.model import WanS2VModel
from talkingdit.puppets.probe import probe
from talkingdit.puppets.render import Image, render
from talkingdit.puppets.world import Motion, Scene


@dataclass(frozen=True)
class ValidationCase:
    """A held-out character and what it says."""

    scene: Scene
    portrait: Image
    features: Tensor  # [layers, audio_dim, F]
    opening: np.ndarray  # [F], of the mouth in truth


class PuppetValidator:
    """Generates the same few scenes each time: a fixed seed, held-out characters, one held-out voice each."""

    def __init__(self, run: TrainRun) -> None:
        self._run = run
        self._vae = load_vae(Path(run.data["shipped_vae"] or run.data["vae"]))
        rng = np.random.default_rng(run.seed + 77)
        folder, fps, seconds = run.data["voices"], run.data["fps"], run.validation.seconds
        frames = int(seconds * fps)
        long_enough = [voice for voice in read_voices(folder, "held_out", fps) if len(voice.opening) >= frames]
        if len(long_enough) < 1:
            raise ValueError(f"validation: no held-out voice in {folder} lasts {seconds} s")
        self.cases: list[ValidationCase] = []
        for _ in range(run.validation.clips):
            voice = long_enough[rng.integers(len(long_enough))]
            start = int(rng.integers(len(voice.opening) - frames + 1))
            scene = Scene.random(rng, "held_out")
            shut = np.zeros((1, 1), np.float32)
            portrait = render(scene, shut, shut + 0.5, [Motion.still(1)], run.data["size"])[0]
            span = slice(start, start + frames)
            self.cases.append(ValidationCase(scene, portrait, voice.features[..., span], voice.opening[span]))

    @torch.no_grad()
    def run(
        self, transformer: WanS2VModel, text_encoder: PromptEncoder, step: int, show: Callable[[str, Tensor], None]
    ) -> dict[str, float]:
        """Generate and measure; shows frames of the last video.

        Returns:
            sync_r (correlation of the mouth with the truth, mean over videos), sync_slope, identity (share of frames);
            nothing on other ranks than 0.
        """
        settings = PuppetSettings.of_run(self._run)
        pipeline = PuppetPipeline(PuppetCheckpoint(transformer, self._vae, text_encoder, settings, self._run.out))
        truth, measured, identity = [], [], []
        video: Image = np.zeros((0, 1, 1, 3), np.uint8)
        for case in self.cases:
            clips = pipeline.generate(case.portrait, case.features, case.scene.caption(), Options(seed=0))
            video = np.concatenate(list(clips))
            if dist.get_rank() == 0:
                reading = probe(video)
                truth.append(case.opening)
                measured.append(reading.opening[0])
                identity.append(reading.identity_share(0, case.scene.characters[0]))
        if not truth:
            return {}
        show("frames", torch.from_numpy(video[:: max(1, len(video) // 8)]).permute(0, 3, 1, 2))
        each = [float(np.corrcoef(t, m)[0, 1]) for t, m in zip(truth, measured, strict=True)]
        return {
            "sync_r": float(np.mean(each)),
            "sync_slope": float(np.polyfit(np.concatenate(truth), np.concatenate(measured), 1)[0]),
            "identity": float(np.mean(identity)),
        }
