# SPDX-License-Identifier: Apache-2.0
"""Portrait, voice and words to a video of any length, clip by clip in constant memory.

Time runs as in training. Picture 0 is the portrait itself and is not part of the output; latent 0 holds it. Latent
k >= 1 holds pictures 4 k - 3 .. 4 k, so that output picture i is spoken by audio frame i and latent k hears audio
frames 4 (k - 1) .. 4 (k - 1) + 3: sound and picture start together.

A clip is `clip_latents` latents, generated at once by flow matching: x_s = (1 - s) x_0 + s noise, the model predicts
noise - x_0 at timestep 1000 s, Euler steps lead from s = 1 to 0. The portrait's latent is the reference of every clip.
The first clip has no history; later ones get the latents just before them, which the model packs (Wan-S2V,
arXiv:2508.18621; FramePack, arXiv:2504.12626). History stays latent: decoding and encoding it again would drift.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talkingdit.autoencoders.streaming import FRAMES_PER_LATENT, to_frames, to_video
from talkingdit.distributed.layout import Parallel
from talkingdit.encoders.log_mel import SpeechFeatures
from talkingdit.families.puppet.checkpoint import PuppetCheckpoint
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.media.files import SPEECH_RATE
from talkingdit.pipelines.guidance import Branch, guidance_branches, guided_step

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Sampling:
    """How to generate; None takes what the checkpoint suggests."""

    text_guidance: float | None = None
    audio_guidance: float | None = None
    steps: int | None = None
    seed: int = 0
    batched: bool = True  # guidance branches in one forward pass; False takes less memory and more time

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"generate: steps must be at least 1, got {self.steps}")
        if self.seed < 0:
            raise ValueError(f"generate: seed must be at least 0, got {self.seed}")


def schedule(steps: int, shift: float) -> list[float]:
    """Noise levels from 1 to 0, steps + 1 of them: s' = shift s / (1 + (shift - 1) s) of evenly spaced s.

    Those of diffusers' `FlowMatchEulerDiscreteScheduler` of this shift.
    """
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1].tolist())
    return [float(sigma) for sigma in scheduler.sigmas]


def clip_noise(shape: tuple[int, ...], seed: int, clip: int) -> Tensor:
    """The noise that a clip starts from, float32; each clip has its own generator, so any one can be made again."""
    state = int(np.random.SeedSequence([seed, clip]).generate_state(1, np.uint64)[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(state & (2**63 - 1)))


def fit_portrait(image: Frames, size: int) -> tuple[Frames, bool]:
    """Cut the middle square out of an image and resize it.

    Args:
        image: [H, W, 3] uint8 RGB.
        size: side of the result in pixels.

    Returns:
        [size, size, 3] uint8, and whether something was cut off.
    """
    import cv2

    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = np.ascontiguousarray(image[top : top + side, left : left + side])
    if side != size:
        how = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
        square = cv2.resize(square, (size, size), interpolation=how).astype(np.uint8, copy=False)
    return square, height != width


class PuppetPipeline:
    """Generates pictures with a checkpoint. It keeps no state between or within videos; several may run at once.

    Args:
        checkpoint: from `load_checkpoint`.
        parallel: how several processes share the work. Each then has a pipeline and makes the same calls, and gets the
            same pictures.
    """

    def __init__(self, checkpoint: PuppetCheckpoint, parallel: Parallel | None = None):
        self.checkpoint = checkpoint
        self.settings = checkpoint.settings
        self._parallel = Parallel() if parallel is None else parallel

    @property
    def clip_frames(self) -> int:
        """Pictures per clip."""
        return self.settings.clip_latents * FRAMES_PER_LATENT

    def clips(self, frames: int) -> int:
        """Clips that a video of so many pictures takes."""
        return -(-frames // self.clip_frames)

    def features(self, waveform: NDArray[np.float32]) -> tuple[Tensor, int]:
        """Audio features of a voice, and how many pictures it lasts.

        Args:
            waveform: [n] samples at 16 kHz, mono, after `normalise_loudness`.

        Returns:
            [layers, audio_dim, F] with silence to the end of the last clip, and ceil(seconds * fps) <= F.
        """
        frames = -(-len(waveform) * self.settings.fps // SPEECH_RATE)
        speech = SpeechFeatures(fps=self.settings.fps)
        return speech(waveform, self.clips(frames) * self.clip_frames), frames

    def generate(
        self,
        portrait: Frames,
        features: Tensor,
        prompt: str = "",
        sampling: Sampling | None = None,
        progress: Callable[[], None] | None = None,
        frames: int | None = None,
    ) -> Iterator[Frames]:
        """Pictures of the portrait speaking, one array per clip.

        Args:
            portrait: [size, size, 3] uint8 RGB, `size` of the checkpoint's settings.
            features: [layers, audio_dim, F] audio features, one column per picture; what they lack to whole clips goes
                on like the last one.
            prompt: what to show, in words.
            sampling: guidance, steps and seed.
            progress: called after every denoising step of every clip.
            frames: pictures to make, where that is fewer than F.

        Yields:
            [n, size, size, 3] uint8; `frames` or F pictures altogether. Clips are generated as they are asked for.

        Raises:
            ValueError: portrait or features of another shape or type; raised at the call, before the first clip.
        """
        size, model = self.settings.size, self.checkpoint.transformer.config
        if portrait.shape != (size, size, 3) or portrait.dtype != np.uint8:
            raise ValueError(
                f"generate: portrait must be uint8 of shape [{size}, {size}, 3], got {portrait.dtype} of shape "
                f"{list(portrait.shape)}"
            )
        if features.dim() != 3 or features.shape[:2] != (model.audio_layers, model.audio_dim) or not features.shape[2]:
            raise ValueError(
                f"generate: features must have shape [{model.audio_layers}, {model.audio_dim}, F >= 1], got "
                f"{list(features.shape)}"
            )
        frames = features.shape[2] if frames is None else frames
        if not 1 <= frames <= features.shape[2]:
            raise ValueError(f"generate: frames must be 1 to {features.shape[2]}, as the features are, got {frames}")
        sampling = Sampling() if sampling is None else sampling
        sigmas = schedule(sampling.steps or self.settings.steps, self.settings.shift)
        return self._generate(portrait, features, frames, prompt, sampling, sigmas, progress)

    def branches(self, sampling: Sampling) -> tuple[Branch, ...]:
        """The predictions that every denoising step takes."""
        suggested = self.settings
        return guidance_branches(
            suggested.text_guidance if sampling.text_guidance is None else sampling.text_guidance,
            suggested.audio_guidance if sampling.audio_guidance is None else sampling.audio_guidance,
        )

    @torch.no_grad()
    def _generate(
        self,
        portrait: Frames,
        features: Tensor,
        frames: int,
        prompt: str,
        sampling: Sampling,
        sigmas: list[float],
        progress: Callable[[], None] | None,
    ) -> Iterator[Frames]:
        model, vae = self.checkpoint.transformer, self._parallel.autoencoder(self.checkpoint.vae)
        device = next(model.parameters()).device
        keep = model.config.motion_frames[1]
        everything = self.branches(sampling)
        weights = [branch.weight for branch in everything]
        own = tuple(self._parallel.own(everything))
        groups: list[tuple[Branch, ...]] = [own] if sampling.batched else [(branch,) for branch in own]
        reference = vae.encode(to_video(portrait[None]).to(device))
        decode = vae.stream()
        decode(reference)  # picture 0 is the portrait itself: decoded for the caches, not shown
        texts = [self._text(prompt, branches) for branches in groups]
        history = reference
        for clip in range(self.clips(frames)):
            first, last = clip * self.clip_frames, (clip + 1) * self.clip_frames
            heard = features[..., first:last].to(device)
            heard = torch.cat([heard, heard[..., -1:].expand(-1, -1, last - first - heard.shape[2])], dim=2)
            before = features[..., max(0, first - self.settings.audio_history) : first].to(device)
            conditions = [
                model.encode_conditions(
                    WanInputs(
                        text,
                        reference=_repeat(reference, branches),
                        history=_repeat(history, branches) if clip else None,
                        audio=_given(heard, branches),
                        audio_history=_given(before, branches) if clip else None,
                    ),
                    context=self._parallel.context,
                )
                for text, branches in zip(texts, groups, strict=True)
            ]
            shape = (1, reference.shape[1], self.settings.clip_latents, *reference.shape[3:])
            x = clip_noise(shape, sampling.seed, clip).to(device)
            for sigma, following in itertools.pairwise(sigmas):
                velocities = [
                    model(
                        _repeat(x, branches),
                        torch.full((len(branches),), 1000.0 * sigma, device=device),
                        conditions=condition,
                        context=self._parallel.context,
                    )
                    for condition, branches in zip(conditions, groups, strict=True)
                ]
                predictions = self._parallel.exchange(torch.cat(velocities), len(everything))
                x = guided_step(x, predictions, weights, following - sigma)
                self._parallel.team.pulse()
                if progress is not None:
                    progress()
            history = torch.cat([history, x], dim=2)[:, :, -keep:]
            yield to_frames(decode(x))[: frames - first]

    def _text(self, prompt: str, branches: tuple[Branch, ...]) -> Tensor:
        """Text features [branches, L, text_dim]: the prompt, or the empty prompt where a branch is denied it."""
        encoder = self.checkpoint.text_encoder
        return encoder.encode([prompt if branch.text else "" for branch in branches]).features


def _repeat(x: Tensor, branches: tuple[Branch, ...]) -> Tensor:
    """[1, C, T, H, W] for every branch."""
    return x.expand(len(branches), -1, -1, -1, -1)


def _given(features: Tensor, branches: tuple[Branch, ...]) -> Tensor:
    """Audio features [branches, layers, dim, n]: the voice, or zeros where a branch is denied it."""
    heard = torch.tensor([float(branch.audio) for branch in branches], device=features.device)
    return features[None].float() * heard.view(-1, 1, 1, 1)
