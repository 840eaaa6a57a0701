# SPDX-License-Identifier: Apache-2.0
"""A picture and words to a video with Wan I2V, clip by clip; families on it change what a clip knows and goes on from.

Latent 0 of a clip is that of its first frame, which is given: by a mask of ones and its latents in the channels behind
the noisy ones. In the place of unknown frames stand the latents of grey ones encoded behind it, as the official program
has it, or zeros (`WanI2VSettings.unknown`). The first clip begins with the picture, each later one with the last frame
of the one before, decoded and encoded again.

A clip hands on to the next, as its carry, that frame: [1, 3, 1, 8 H, 8 W] in -1..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT
from talkingdit.autoencoders.streaming import to_video
from talkingdit.distributed.layout import Parallel
from talkingdit.encoders.text import cut_warning
from talkingdit.families.wan_i2v.conditions import ExtraTokens, WanI2VConditions, WanI2VInputs
from talkingdit.families.wan_i2v.outline import Details, Sampling
from talkingdit.families.wan_s2v import step_cache
from talkingdit.media.framing import fit_image
from talkingdit.pipelines.guidance import Branch
from talkingdit.pipelines.long_video import Carry, ClipPipeline, GeneratedClip, StepDone
from talkingdit.pipelines.parallel import shared_autoencoder
from talkingdit.pipelines.solvers import flow_solver
from talkingdit.pipelines.step_cache import changes_of

if TYPE_CHECKING:
    from talkingdit.families.wan_i2v.checkpoint import WanI2VCheckpoint
    from talkingdit.pipelines.features import Features
    from talkingdit.pipelines.inputs import Frames, Inputs, Outline
    from talkingdit.pipelines.step_cache import Recorder


@dataclass(frozen=True)
class VideoConditions:
    """What all clips of a video have in common, made once."""

    sampling: Sampling
    text: Tensor  # [2, L, text_dim]: prompt and negative prompt
    first: Tensor  # [1, C, 1, H, W] latent of the picture
    pixels: Tensor  # [1, 3, 1, 8 H, 8 W] the picture in -1..1
    image: Tensor | None  # [1, L, image_dim] its features
    frames: int  # that the video lasts
    latents: int  # of the video
    features: Features | None = None  # [layers, audio_dim, F] of a voice, for models that hear
    extra: tuple[ExtraTokens, ...] = ()  # beside every clip


@dataclass(frozen=True)
class ClipInputs:
    """What one clip of T latents is made from, with a batch of one.

    Args:
        index: of the clip; its noise follows from it.
        condition: [1, in_dim - out_dim, T, H, W].
        held: [1, C, n, H, W] latents in front that stay as they are, shown at timestep 0.
        audio: features for the model's `encode_audio`; a branch without audio gets zeros.
    """

    index: int
    condition: Tensor
    held: Tensor | None = None
    audio: Tensor | None = None


def open_pipeline(checkpoint: WanI2VCheckpoint, parallel: Parallel | None = None) -> WanI2VPipeline:
    """What makes the clips of videos with a checkpoint."""
    return WanI2VPipeline(checkpoint, parallel)


class WanI2VPipeline(ClipPipeline):
    """Generates clips with a checkpoint. It keeps no state; several videos may be made at once.

    Args:
        checkpoint: from `load_checkpoint`.
        parallel: how several processes share the work. Each then has a pipeline and makes the same calls, and gets the
            same clips.
    """

    def __init__(self, checkpoint: WanI2VCheckpoint, parallel: Parallel | None = None):
        self.checkpoint = checkpoint
        self.settings = checkpoint.settings
        self.parallel = Parallel() if parallel is None else parallel
        self.recorder: Recorder | None = None  # of a calibration
        self._vae = shared_autoencoder(checkpoint.vae, self.parallel)

    def warnings(self, inputs: Inputs, outline: Outline) -> tuple[str, ...]:
        """Words that the text encoder has no room for, and of the step cache."""
        details: Details = outline.details
        encoder, sampling = self.checkpoint.text_encoder, details.sampling
        found = cut_warning(encoder, inputs.job.prompt)
        if sampling.negates:
            found += cut_warning(encoder, sampling.negative_prompt, "the negative prompt")
        return found + step_cache.warnings(sampling.step_cache, self.checkpoint.folder)

    def encode(self, inputs: Inputs, outline: Outline) -> VideoConditions:
        """Encode what all clips share, from the files of a job."""
        details: Details = outline.details
        image, _ = fit_image(inputs.image, outline.size, details.options.cover)
        return self.conditions(
            image, inputs.job.prompt, details.sampling, frames=outline.frames, latents=details.latents
        )

    @torch.no_grad()
    def conditions(
        self, image: Frames, prompt: str, sampling: Sampling, *, frames: int, latents: int, **more: Any
    ) -> VideoConditions:
        """Encode what all clips share.

        Args:
            image: [H, W, 3] uint8 RGB, the picture in the size of the video, sides multiples of 16.
            prompt: what to show.
            sampling: how to generate.
            frames, latents: of the video.
            more: other fields of `VideoConditions`.

        Raises:
            ValueError: an image of another type or size.
        """
        if (
            image.ndim != 3
            or image.shape[2] != 3
            or str(image.dtype) != "uint8"
            or any(n % 16 for n in image.shape[:2])
        ):
            raise ValueError(
                "generate: image must be uint8 [H, W, 3] with sides that are multiples of 16, "
                f"got {image.dtype} of shape {list(image.shape)}"
            )
        checkpoint, team = self.checkpoint, self.parallel.team
        # One process runs the text encoder: it is the largest part next to the transformer, and may be on the host.
        words = [prompt, sampling.negative_prompt]
        text = team.broadcast(lambda: checkpoint.text_encoder.encode(words).features, self.device)
        pixels = to_video(image[None]).to(self._vae.device)
        pictures = checkpoint.image_encoder
        return VideoConditions(
            sampling=sampling,
            text=text,
            first=self._vae.encode(pixels),
            pixels=pixels,
            image=None if pictures is None else pictures.features(image[None]).to(self.device),
            frames=frames,
            latents=latents,
            **more,
        )

    @torch.no_grad()
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
        size = conditions.sampling.chunk_latents
        pixels = conditions.pixels if carry is None else carry["frame"].to(self._vae.device)
        first = conditions.first if carry is None else self._vae.encode(pixels)
        condition = self.known_condition(first, pixels, size)
        clip = ClipInputs(index, condition, held=first if self.settings.held else None)
        x = self.denoise(conditions, clip, size, progress)
        remaining = conditions.frames - index * FRAMES_PER_LATENT * (size - 1)  # the first frame of the clip among them
        wanted = 1 + -(-(remaining - 1) // FRAMES_PER_LATENT)
        video = self._vae.stream()(x[:, :, :wanted].to(self._vae.device))
        shown = video[:, :, :remaining][:, :, min(index, 1) :]
        return GeneratedClip(index, shown, None if last else {"frame": video[:, :, -1:]})

    def known_condition(self, known: Tensor, pixels: Tensor | None, frames: int) -> Tensor:
        """Channels behind those of the noisy latents: the mask of what is known, and its latents.

        Args:
            known: [1, C, n, H, W] latents in front of a clip.
            pixels: [1, 3, 1 + 4 (n - 1), 8 H, 8 W] these frames, for checkpoints that want grey ones behind them.
            frames: latent frames of the clip.

        Returns:
            [1, in_dim - out_dim, frames, H, W].
        """
        model = self.checkpoint.transformer
        count = known.shape[2]
        known = known.to(self.device)
        if self.settings.unknown == "grey" and pixels is not None and frames > count:
            grey = pixels.new_zeros(1, 3, FRAMES_PER_LATENT * (frames - count), *pixels.shape[3:])
            filled = self._vae.encode(torch.cat([pixels, grey], dim=2)).to(self.device)
        else:
            filled = F.pad(known, (0, 0, 0, 0, 0, frames - count))
        condition = model.known(filled)[:, model.config.out_dim :].clone()
        channels = condition.shape[1] - known.shape[1]  # of the mask
        condition[:, :channels, count:] = 0
        return condition

    def denoise(
        self,
        conditions: VideoConditions,
        clip: ClipInputs,
        frames: int,
        progress: StepDone | None = None,
    ) -> Tensor:
        """Latents [1, C, frames, H, W] of a clip, float32."""
        sampling, model, parallel, device = conditions.sampling, self.checkpoint.transformer, self.parallel, self.device
        needed = [sampling.branches(step) for step in range(sampling.steps)]
        most = sampling.predictions
        breaks = changes_of(needed)

        def groups(branches: tuple[Branch, ...]) -> list[tuple[Branch, ...]]:
            """The predictions of each forward pass of a step."""
            # Where there are too few for all processes, each makes all of them.
            own = tuple(parallel.own(branches)) if len(branches) == most else branches
            return [own] if sampling.batched else [(branch,) for branch in own]

        solver = flow_solver(sampling.solver, sampling.steps, sampling.shift, device)
        channels, _, height, width = conditions.first.shape[1:]
        # One process draws, for devices may differ in how they do.
        shape = (channels, frames, height, width)
        x = parallel.team.broadcast(lambda: self.noise(shape, sampling.seed + clip.index), device)
        held = None if clip.held is None else clip.held.to(device)
        given = 0 if held is None else held.shape[2]
        steps = step_cache.cached_steps(
            model,
            solver.timesteps,
            max(len(groups(branches)) for branches in needed),
            sampling.step_cache,
            self.checkpoint.folder,
            self.recorder,
            breaks,
        )
        passes: list[tuple[int, WanI2VConditions]] = []  # samples and conditions of each
        for step, timestep in enumerate(solver.timesteps):
            branches = needed[step]
            if step == 0 or step in breaks:
                passes = [
                    (
                        len(group),
                        model.encode_conditions(self.inputs(conditions, clip, group), context=parallel.context),
                    )
                    for group in groups(branches)
                ]
            if held is not None:
                x[:, :, :given] = held
            times = timestep.float().expand(1, frames).clone()
            times[:, :given] = 0
            predictions = torch.cat(
                [
                    model(
                        x.expand(samples, *x.shape[1:]),
                        (times if given else times[:, 0]).expand(samples, *times.shape[1 : 1 + bool(given)]),
                        condition,
                        context=parallel.context,
                        cache=cache,
                    )
                    for (samples, condition), cache in zip(passes, steps.begin(step, len(passes)), strict=True)
                ]
            )
            if len(branches) == most:
                predictions = parallel.exchange(predictions, most)
            velocity = sum(b.weight * p for b, p in zip(branches, predictions.float().split(1), strict=True))
            x = solver.step(velocity, timestep, x, return_dict=False)[0]
            parallel.team.raise_if_interrupted()
            if progress is not None:
                x = progress(step, timestep, x)
        steps.end()
        if held is not None:
            x[:, :, :given] = held
        return x

    def inputs(self, conditions: VideoConditions, clip: ClipInputs, branches: Sequence[Branch]) -> WanI2VInputs:
        """What the model is given for the predictions of one forward pass."""

        def repeated(x: Tensor) -> Tensor:
            return x.to(self.device).expand(len(branches), *x.shape[1:])

        audio = None
        if clip.audio is not None:
            present = torch.tensor([float(branch.audio) for branch in branches], device=self.device)
            audio = repeated(clip.audio).float() * present.view(-1, *[1] * (clip.audio.dim() - 1))
        return WanI2VInputs(
            torch.stack([conditions.text[0 if branch.text else 1] for branch in branches]),
            condition=repeated(clip.condition),
            image=None if conditions.image is None else repeated(conditions.image),
            extra=tuple(ExtraTokens(repeated(extra.latents), extra.times) for extra in conditions.extra),
            audio=audio,
        )

    def noise(self, shape: tuple[int, ...], seed: int) -> Tensor:
        """Noise [1, *shape] in float32, drawn on the device as officially."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)[None]

    @property
    def device(self) -> torch.device:
        """Where the transformer computes, also where its weights are loaded on demand."""
        return self.checkpoint.transformer.device
