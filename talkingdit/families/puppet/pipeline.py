# SPDX-License-Identifier: Apache-2.0
"""Portrait, voice and words to a video of a drawn character, clip by clip in constant memory.

Time runs as in training. Frame 0 is the portrait itself and is not part of the output; latent 0 holds it. Latent
k >= 1 holds frames 4 k - 3 .. 4 k, so that output frame i is spoken by audio frame i and latent k hears audio
frames 4 (k - 1) .. 4 (k - 1) + 3: sound and video start together.

A clip is `clip_latents` latents, generated at once by flow matching: x_s = (1 - s) x_0 + s noise, the model predicts
noise - x_0 at timestep 1000 s, Euler steps lead from s = 1 to 0. The portrait's latent is the reference of every clip.
The first clip has no history; later ones get the latents just before them, which the model packs (Wan-S2V,
arXiv:2508.18621; FramePack, arXiv:2504.12626). History stays latent: decoding and encoding it again would drift.

What is shown has the portrait's clothes laid over the generated ones (`clothes`), which no carry does.

A clip hands on to the next, as its carry, the last latents: as many as the model packs and the decoder looks back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT
from talkingdit.autoencoders.streaming import to_frames, to_video
from talkingdit.autoencoders.strips import ClipDecoder
from talkingdit.autoencoders.tail import lookback
from talkingdit.distributed.layout import Parallel
from talkingdit.encoders.log_mel import SpeechFeatures
from talkingdit.encoders.text import cut_warning
from talkingdit.families.puppet.clothes import keep_clothes
from talkingdit.families.puppet.options import Options
from talkingdit.families.puppet.outline import Details, Sampling, clip_frames
from talkingdit.families.wan_s2v import step_cache
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.media.files import SPEECH_RATE
from talkingdit.media.framing import fit_portrait
from talkingdit.pipelines.aside import half_of_the_threads
from talkingdit.pipelines.features import Features, encode_voice
from talkingdit.pipelines.guidance import Branch, guided_step
from talkingdit.pipelines.inputs import Frames, Inputs, Outline
from talkingdit.pipelines.long_video import (
    Carry,
    ClipPipeline,
    DenoisedClip,
    GeneratedClip,
    StepDone,
    generate_clips,
)
from talkingdit.pipelines.parallel import shared_autoencoder

if TYPE_CHECKING:
    from talkingdit.families.puppet.checkpoint import PuppetCheckpoint
    from talkingdit.pipelines.step_cache import Recorder


def schedule(steps: int, shift: float) -> list[float]:
    """Noise levels from 1 to 0, steps + 1 of them: s' = shift s / (1 + (shift - 1) s) of evenly spaced s.

    Those of diffusers' `FlowMatchEulerDiscreteScheduler` of this shift, to the last bit.
    """
    evenly = np.linspace(1.0, 0.0, steps + 1).astype(np.float32)
    return [float(sigma) for sigma in shift * evenly / (1 + (shift - 1) * evenly)]


def clip_noise(shape: tuple[int, ...], seed: int, clip: int) -> Tensor:
    """The noise that a clip starts from, float32; each clip has its own generator, so any one can be made again."""
    state = int(np.random.SeedSequence([seed, clip]).generate_state(1, np.uint64)[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(state & (2**63 - 1)))


@dataclass(frozen=True)
class VideoConditions:
    """What all clips of a video have in common, made once."""

    sampling: Sampling
    sigmas: list[float]  # noise levels, from 1 to 0
    reference: Tensor  # [1, C, 1, H, W] latent of the portrait
    features: Features  # [layers, audio_dim, F], one column per frame
    groups: tuple[tuple[Branch, ...], ...]  # the predictions of this process, those of one forward pass together
    texts: tuple[Tensor, ...]  # [branches, L, text_dim] of each group
    frames: int  # that the video lasts
    decoder: ClipDecoder
    finish: Callable[[Tensor], Tensor]  # what is done to frames [1, 3, n, size, size] in the end

    @property
    def weights(self) -> list[float]:
        """Of the predictions of all processes."""
        return [branch.weight for branch in self.sampling.branches]


def open_pipeline(checkpoint: PuppetCheckpoint, parallel: Parallel | None = None) -> PuppetPipeline:
    """What makes the clips of videos with a checkpoint."""
    return PuppetPipeline(checkpoint, parallel)


class PuppetPipeline(ClipPipeline):
    """Generates clips with a checkpoint. It keeps no state between or within videos; several may be made at once.

    Args:
        checkpoint: from `load_checkpoint`.
        parallel: how several processes share the work. Each then has a pipeline and makes the same calls, and gets the
            same clips.
    """

    decodes_later = True

    def __init__(self, checkpoint: PuppetCheckpoint, parallel: Parallel | None = None):
        self.checkpoint = checkpoint
        self.settings = checkpoint.settings
        self.parallel = Parallel() if parallel is None else parallel
        self.recorder: Recorder | None = None  # of a calibration
        self._vae = shared_autoencoder(checkpoint.vae, self.parallel)

    def warnings(self, inputs: Inputs, outline: Outline) -> tuple[str, ...]:
        """Words of the prompt that the model does not know, those that it has no room for, and of the step cache."""
        encoder, prompt = self.checkpoint.text_encoder, inputs.job.prompt
        unknown = encoder.unknown_words(prompt)
        words = (f"the prompt has words that this model does not know: {', '.join(unknown)}.",) if unknown else ()
        cache = step_cache.warnings(outline.details.sampling.step_cache, self.checkpoint.folder)
        return (*words, *cut_warning(encoder, prompt), *cache)

    def encode(self, inputs: Inputs, outline: Outline) -> VideoConditions:
        """Encode what all clips share, from the files of a job."""
        details: Details = outline.details
        portrait, _ = fit_portrait(inputs.image, self.settings.size)
        speech, frames = SpeechFeatures(fps=self.settings.fps), outline.clips * self.clip_frames
        features = encode_voice(speech, inputs, frames, self.settings.fps, self.parallel.team)
        return self.conditions(portrait, features, inputs.job.prompt, details.sampling, frames=outline.frames)

    @property
    def clip_frames(self) -> int:
        """Frames per clip."""
        return clip_frames(self.settings)

    def features(self, waveform: NDArray[np.float32]) -> tuple[Tensor, int]:
        """Audio features of a voice, and how many frames it lasts.

        Args:
            waveform: [n] samples at 16 kHz, mono, after `normalise_loudness`.

        Returns:
            [layers, audio_dim, F] with silence to the end of the last clip, and ceil(seconds * fps) <= F.
        """
        frames = -(-len(waveform) * self.settings.fps // SPEECH_RATE)
        whole = -(-frames // self.clip_frames) * self.clip_frames
        return SpeechFeatures(fps=self.settings.fps)(waveform, whole), frames

    @torch.no_grad()
    def conditions(
        self,
        portrait: Frames,
        features: Features,
        prompt: str = "",
        sampling: Sampling | None = None,
        *,
        frames: int | None = None,
    ) -> VideoConditions:
        """Encode what all clips share.

        Args:
            portrait: [size, size, 3] uint8 RGB, `size` of the checkpoint's settings.
            features: [layers, audio_dim, F] audio features, one column per frame; what they lack to whole clips goes
                on like the last one.
            prompt: what to show, in words.
            sampling: guidance, steps and seed.
            frames: that the video lasts, where that is fewer than F.

        Raises:
            ValueError: portrait or features of another shape or type.
        """
        size, model = self.settings.size, self.checkpoint.transformer.config
        if portrait.shape != (size, size, 3) or portrait.dtype != np.uint8:
            raise ValueError(
                f"generate: portrait must be uint8 of shape [{size}, {size}, 3], got {portrait.dtype} of shape "
                f"{list(portrait.shape)}"
            )
        if (
            len(features.shape) != 3
            or features.shape[:2] != (model.audio_layers, model.audio_dim)
            or not features.shape[2]
        ):
            raise ValueError(
                f"generate: features must have shape [{model.audio_layers}, {model.audio_dim}, F >= 1], got "
                f"{list(features.shape)}"
            )
        frames = features.shape[2] if frames is None else frames
        if not 1 <= frames <= features.shape[2]:
            raise ValueError(f"generate: frames must be 1 to {features.shape[2]}, as the features are, got {frames}")
        sampling = Sampling.of(Options(), self.settings) if sampling is None else sampling
        own = tuple(self.parallel.own(sampling.branches))
        groups = (own,) if sampling.batched else tuple((branch,) for branch in own)
        picture = to_video(portrait[None]).to(self._device)
        with half_of_the_threads():
            reference = self._vae.encode(picture)
        return VideoConditions(
            sampling=sampling,
            sigmas=schedule(sampling.steps, sampling.shift),
            reference=reference,
            features=features,
            groups=groups,
            texts=tuple(self._text(prompt, branches) for branches in groups),
            frames=frames,
            decoder=ClipDecoder(self._vae.stream()),
            finish=keep_clothes(picture) if sampling.keep_clothes else _as_it_is,
        )

    def generate(
        self,
        portrait: Frames,
        features: Tensor,
        prompt: str = "",
        options: Options | None = None,
        progress: Callable[[], None] | None = None,
        frames: int | None = None,
    ) -> Iterator[Frames]:
        """Frames of the portrait speaking, one array per clip.

        Args:
            portrait, features, prompt, frames: see `conditions`.
            options: guidance, steps and seed.
            progress: called after every denoising step of every clip.

        Yields:
            [n, size, size, 3] uint8; `frames` or F frames altogether. Clips are generated as they are asked for.

        Raises:
            ValueError: portrait or features of another shape or type; raised at the call, before the first clip.
        """
        sampling = Sampling.of(Options() if options is None else options, self.settings)
        conditions = self.conditions(portrait, features, prompt, sampling, frames=frames)
        count = -(-conditions.frames // self.clip_frames)
        clips = generate_clips(self, conditions, count, progress=_counted(progress))
        return (to_frames(clip.frames) for clip in clips)

    def clip(
        self,
        conditions: VideoConditions,
        index: int,
        carry: Carry | None = None,
        *,
        last: bool = False,
        progress: StepDone | None = None,
    ) -> GeneratedClip:
        """Clip `index`, see `ClipPipeline.clip`."""
        return self.denoised(conditions, index, carry, last=last, progress=progress).whole()

    @torch.no_grad()
    def denoised(
        self,
        conditions: VideoConditions,
        index: int,
        carry: Carry | None = None,
        *,
        last: bool = False,
        progress: StepDone | None = None,
    ) -> DenoisedClip:
        """Clip `index`, whose frames are still to be decoded, see `ClipPipeline`."""
        past = self._past(conditions, carry)
        with half_of_the_threads():
            encoded = self._encode(conditions, index, past)
            x = self._denoise(conditions, index, encoded, progress)
        kept = None if last else {"latents": torch.cat([past, x], dim=2)[:, :, -self._kept :]}
        return DenoisedClip(index, self._decoded(conditions, index, past, x), kept)

    @torch.no_grad()
    def get_ready_to_decode(self, conditions: VideoConditions, index: int, carry: Carry | None) -> None:
        """Go through the latents before the clip, see `ClipPipeline`."""
        with half_of_the_threads():
            conditions.decoder.get_ready(index, self._past(conditions, carry))

    def _past(self, conditions: VideoConditions, carry: Carry | None) -> Tensor:
        """The latents before a clip: at the beginning the portrait itself, which is decoded and not shown."""
        return conditions.reference if carry is None else carry["latents"].to(self._device)

    @torch.no_grad()
    def _decoded(self, conditions: VideoConditions, index: int, past: Tensor, x: Tensor) -> Iterator[Tensor]:
        """The frames of a clip's latents x, those of one latent after the other."""
        frames = min(self.clip_frames, conditions.frames - index * self.clip_frames)
        with half_of_the_threads():
            stream = conditions.decoder.behind(index, past)
        for number, latent in enumerate(x[:, :, : -(-frames // FRAMES_PER_LATENT)].split(1, dim=2)):
            left = frames - FRAMES_PER_LATENT * number
            with half_of_the_threads():
                shown = conditions.finish(stream(latent)[:, :, :left])
            yield shown

    def _encode(self, conditions: VideoConditions, index: int, past: Tensor) -> list[Any]:
        """What the model needs to know for a clip, for each group of predictions."""
        model, size, features = self.checkpoint.transformer, self.clip_frames, conditions.features
        first, last = index * size, (index + 1) * size
        audio = features[..., first:last].to(self._device)
        audio = torch.cat([audio, audio[..., -1:].expand(-1, -1, size - audio.shape[2])], dim=2)
        before = features[..., max(0, first - self.settings.audio_history) : first].to(self._device) if index else None
        history = past[:, :, -model.config.motion_frames[1] :]
        return [
            model.encode_conditions(
                WanInputs(
                    text,
                    reference=_repeat(conditions.reference, branches),
                    history=_repeat(history, branches) if index else None,
                    audio=_given(audio, branches),
                    audio_history=None if before is None else _given(before, branches),
                ),
                context=self.parallel.context,
            )
            for text, branches in zip(conditions.texts, conditions.groups, strict=True)
        ]

    def _denoise(
        self, conditions: VideoConditions, index: int, encoded: list[Any], progress: StepDone | None
    ) -> Tensor:
        """Latents [1, C, clip_latents, H, W] of a clip, float32."""
        model, parallel, sigmas = self.checkpoint.transformer, self.parallel, conditions.sigmas
        reference, weights = conditions.reference, conditions.weights
        shape = (1, reference.shape[1], self.settings.clip_latents, *reference.shape[3:])
        x = clip_noise(shape, conditions.sampling.seed, index).to(self._device)
        timesteps = 1000.0 * torch.tensor(sigmas[:-1], device=self._device)
        threshold, folder = conditions.sampling.step_cache, self.checkpoint.folder
        steps = step_cache.cached_steps(model, timesteps, len(encoded), threshold, folder, self.recorder)
        for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            velocities = [
                model(
                    _repeat(x, branches),
                    torch.full((len(branches),), 1000.0 * sigma, device=self._device),
                    condition,
                    context=parallel.context,
                    cache=cache,
                )
                for condition, branches, cache in zip(encoded, conditions.groups, steps.begin(step), strict=True)
            ]
            predictions = parallel.exchange(torch.cat(velocities), len(weights))
            x = guided_step(x, predictions, weights, following - sigma)
            parallel.team.raise_if_interrupted()
            if progress is not None:
                x = progress(step, 1000.0 * sigma, x)
        steps.end()
        return x

    def _text(self, prompt: str, branches: tuple[Branch, ...]) -> Tensor:
        """Text features [branches, L, text_dim]: the prompt, or the empty prompt where a branch is denied it."""
        encoder = self.checkpoint.text_encoder
        return encoder.encode([prompt if branch.text else "" for branch in branches]).features

    @property
    def _kept(self) -> int:
        """Latents that a clip hands on."""
        return max(self.checkpoint.transformer.config.motion_frames[1], lookback(self.checkpoint.vae))

    @property
    def _device(self) -> torch.device:
        """Where the transformer computes, also where its weights are loaded on demand."""
        return self.checkpoint.transformer.device


def _as_it_is(video: Tensor) -> Tensor:
    return video


def _repeat(x: Tensor, branches: tuple[Branch, ...]) -> Tensor:
    """[1, C, T, H, W] for every branch."""
    return x.expand(len(branches), -1, -1, -1, -1)


def _given(features: Tensor, branches: tuple[Branch, ...]) -> Tensor:
    """Audio features [branches, layers, dim, n]: the voice, or zeros where a branch is denied it."""
    present = torch.tensor([float(branch.audio) for branch in branches], device=features.device)
    return features[None].float() * present.view(-1, 1, 1, 1)


def _counted(progress: Callable[[], None] | None) -> StepDone | None:
    """Who only counts steps goes on from the latents that there are."""
    if progress is None:
        return None

    def count(step: int = -1, timestep: float | Tensor = 0.0, latents: Tensor | None = None) -> Tensor | None:
        progress()
        return latents

    return count
