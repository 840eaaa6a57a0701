# SPDX-License-Identifier: Apache-2.0
"""Wan-S2V (arXiv:2508.18621): a picture, a voice and words to a video, clip by clip, as the official program does it.

A clip is n pictures (officially 80), n / 4 latents, generated at once. Latent i of a clip hears the audio frames
4 i .. 4 i + 3, one per picture, and five before (the first repeated at the beginning of every clip). All clips see the
latent of the reference picture. The first one has no history, and its latents are decoded behind that of the
reference: pictures 1 .. n of the decoded n + 1, of which the first three, blurred, are dropped. Every later clip gets
the last 73 pictures before it, encoded again from floating point numbers, as 19 latents of history, and is decoded
behind these.

Picture p of the video belongs to audio frame p; the first clip has none for the frames 0, 1 and 2 (`DROPPED`).

Clips depend on what comes before them through a `Carry` alone, and each has its own seed: with the carry of a clip the
video can go on at any time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talkingdit.autoencoders.streaming import FRAMES_PER_LATENT, to_video
from talkingdit.distributed.layout import Parallel
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.media.colour import colours, match_colours
from talkingdit.pipelines.solvers import flow_solver

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.checkpoint import WanS2VCheckpoint, WanS2VSettings

Frames = NDArray[np.uint8]

DROPPED = 3  # pictures at the beginning of the first clip
STARTING_FRAMES = 6  # pictures of history that show the reference, where the video starts from it


@dataclass(frozen=True)
class S2VSampling:
    """How to generate; None takes what the checkpoint suggests.

    Args:
        steps, shift, solver: of the denoising, see `flow_solver`.
        guidance: strength g of prediction = u + g (c - u), where u has the negative prompt and no sound; 1 leaves u
            out.
        negative_prompt: what not to show.
        clip_frames: pictures per clip, a multiple of 4.
        seed: of the first clip; later ones count on.
        start_from_reference: the first clip moves on from the reference picture itself.
        match_colour: bring the colours of later clips back to those of the first.
        batched: both predictions in one forward pass; False takes less memory and more time.
    """

    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    solver: str | None = None
    negative_prompt: str | None = None
    clip_frames: int | None = None
    seed: int = 0
    start_from_reference: bool = False
    match_colour: bool = False
    batched: bool = True

    def filled(self, settings: WanS2VSettings) -> ResolvedSampling:
        """These settings with those of the checkpoint where nothing is said.

        Raises:
            ValueError: a value is impossible.
        """
        names = {"clip_frames": "infer_frames"}
        values = dataclasses.asdict(self)
        for name, value in values.items():
            if value is None:
                values[name] = getattr(settings, names.get(name, name))
        return ResolvedSampling(**values, drop_first=settings.drop_first_motion and not self.start_from_reference)


@dataclass(frozen=True)
class ResolvedSampling:
    """`S2VSampling` without gaps."""

    steps: int
    guidance: float
    shift: float
    solver: str
    negative_prompt: str
    clip_frames: int
    seed: int
    start_from_reference: bool
    match_colour: bool
    batched: bool
    drop_first: bool  # the first clip has no history and loses its first pictures

    def __post_init__(self) -> None:
        if self.clip_frames < FRAMES_PER_LATENT or self.clip_frames % FRAMES_PER_LATENT:
            raise ValueError(f"generate: a clip must have a multiple of 4 pictures, got {self.clip_frames}")
        if self.seed < 0:
            raise ValueError(f"generate: seed must be at least 0, got {self.seed}")
        if not 1 <= self.guidance < float("inf"):
            raise ValueError(f"generate: guidance must be a number of at least 1, got {self.guidance}")
        flow_solver(self.solver, self.steps, self.shift)

    @property
    def predictions(self) -> int:
        """Predictions per denoising step."""
        return 2 if self.guidance > 1 else 1

    @property
    def dropped(self) -> int:
        """Pictures that the beginning of the video lacks."""
        return DROPPED if self.drop_first else 0


@dataclass(frozen=True)
class VideoConditions:
    """What all clips of a video have in common, made once."""

    sampling: ResolvedSampling
    text: Tensor  # [2, L, text_dim]: prompt and negative prompt
    reference: Tensor  # [1, C, 1, H, W] latent
    pixels: Tensor  # [1, 3, 1, 8 H, 8 W] the reference picture in -1..1


@dataclass(frozen=True)
class Carry:
    """What a clip hands on to the next."""

    history: Tensor  # [1, C, 19, H, W] latents of the last 73 pictures, float32
    window: Tensor | None = None  # [1, 3, 73, 8 H, 8 W] these pictures, where the next clip is too short to replace all
    colours: Tensor | None = None  # [2, 3] of the first clip, where later ones are matched


@dataclass(frozen=True)
class GeneratedClip:
    """A finished clip."""

    index: int
    pictures: Tensor  # [1, 3, n, 8 H, 8 W] float32 in -1..1
    carry: Carry | None  # None after the last clip


class WanS2VPipeline:
    """Generates pictures with a Wan-S2V checkpoint. It keeps no state; several videos may run at once.

    Args:
        checkpoint: from `load_checkpoint`.
        parallel: how several processes share the work. Each then has a pipeline and makes the same calls, and gets the
            same clips.
    """

    def __init__(self, checkpoint: WanS2VCheckpoint, parallel: Parallel | None = None):
        self.checkpoint = checkpoint
        self.settings = checkpoint.settings
        self._parallel = Parallel() if parallel is None else parallel
        self._vae = self._parallel.autoencoder(checkpoint.vae)

    @torch.no_grad()
    def scene(self, picture: Frames, prompt: str = "", sampling: S2VSampling | None = None) -> VideoConditions:
        """Encode what all clips share.

        Args:
            picture: [H, W, 3] uint8 RGB, the reference in the size of the video, sides multiples of 16.
            prompt: what to show.
            sampling: how to generate.

        Raises:
            ValueError: a picture of another type or size, or impossible settings.
        """
        if (
            picture.ndim != 3
            or picture.shape[2] != 3
            or picture.dtype != np.uint8
            or any(side % 16 or not side for side in picture.shape[:2])
        ):
            raise ValueError(
                "generate: picture must be uint8 [H, W, 3] with sides that are multiples of 16, "
                f"got {picture.dtype} of shape {list(picture.shape)}"
            )
        filled = (S2VSampling() if sampling is None else sampling).filled(self.settings)
        # One process runs the text encoder: it is the largest part next to the transformer, and may be on the host.
        words = [prompt, filled.negative_prompt]
        text = self._parallel.team.share(lambda: self.checkpoint.text_encoder.encode(words).features, self._device)
        pixels = to_video(picture[None]).to(self._vae.device)
        return VideoConditions(filled, text, self._vae.encode(pixels), pixels)

    def clips(
        self,
        scene: VideoConditions,
        features: Tensor,
        frames: int,
        pose: Iterator[Tensor] | None = None,
        first: int = 0,
        carry: Carry | None = None,
        progress: Callable[[], None] | None = None,
    ) -> Iterator[GeneratedClip]:
        """The clips of a video, generated as they are asked for.

        Args:
            scene: from `scene`.
            features: [layers, audio_dim, F] of the speech encoder, one column per picture.
            frames: audio frames that the video lasts, at most F; F must reach to the end of the last clip.
            pose: one [1, 3, n, H, W] in -1..1 per clip, beginning with clip `first`; None is no pose.
            first: clip to begin with.
            carry: of the clip before `first`; None at the beginning.
            progress: called after every denoising step.

        Yields:
            Clips; their pictures belong to the audio frames from `dropped` on and end with `frames`.

        Raises:
            ValueError: features do not reach far enough, or a carry is missing.
        """
        size = scene.sampling.clip_frames
        count = -(-frames // size)
        if frames <= scene.sampling.dropped or features.dim() != 3 or features.shape[2] < count * size:
            raise ValueError(
                f"generate: features must have shape [layers, dim, F] with F of at least {count * size} for "
                f"{frames} > {scene.sampling.dropped} frames, got {list(features.shape)}"
            )
        if (carry is None) != (first == 0):
            raise ValueError(f"generate: clip {first} {'needs' if first else 'takes no'} carry")
        return self._clips(scene, features, frames, count, pose, first, carry, progress)

    def _clips(
        self,
        scene: VideoConditions,
        features: Tensor,
        frames: int,
        count: int,
        pose: Iterator[Tensor] | None,
        first: int,
        carry: Carry | None,
        progress: Callable[[], None] | None,
    ) -> Iterator[GeneratedClip]:
        size = scene.sampling.clip_frames
        for index in range(first, count):
            clip = self.clip(
                scene,
                index,
                features[..., index * size : (index + 1) * size],
                carry,
                None if pose is None else next(pose),
                min(size, frames - index * size),
                last=index == count - 1,
                progress=progress,
            )
            carry = clip.carry
            yield clip

    @torch.no_grad()
    def clip(
        self,
        scene: VideoConditions,
        index: int,
        audio: Tensor,
        carry: Carry | None = None,
        pose: Tensor | None = None,
        frames: int | None = None,
        last: bool = False,
        progress: Callable[[], None] | None = None,
    ) -> GeneratedClip:
        """One clip.

        Args:
            scene: from `scene`.
            index: its number in the video.
            audio: [layers, audio_dim, n] features of its n pictures.
            carry: of the clip before; None for the first.
            pose: [1, 3, n, H, W] in -1..1 or None.
            frames: audio frames of this clip that are wanted; no more than these are decoded.
            last: no carry for another clip is made.
            progress: called after every denoising step.
        """
        sampling, vae = scene.sampling, self._vae
        frames = sampling.clip_frames if frames is None else frames
        if index == 0:
            carry = self._beginning(scene)
        assert carry is not None
        without_history = index == 0 and sampling.drop_first
        latents = self._denoise(scene, index, audio, None if without_history else carry.history, pose, progress)

        past = scene.reference if without_history else carry.history
        wanted = -(-frames // FRAMES_PER_LATENT)
        pictures = vae.decode_after(past.to(vae.device), latents[:, :, :wanted].to(vae.device))[:, :, :frames]
        pictures = pictures[:, :, DROPPED if without_history else 0 :]
        anchor = carry.colours
        if sampling.match_colour:
            if anchor is None:
                anchor = colours(pictures)
            else:
                pictures = match_colours(pictures, anchor)
        return GeneratedClip(index, pictures, None if last else self._carry(carry, pictures, sampling, anchor))

    def _beginning(self, scene: VideoConditions) -> Carry:
        """The past of the first clip: grey pictures, and where it starts from the reference this at the end."""
        frames = self.settings.motion_frames
        window = scene.pixels.new_zeros(1, 3, frames, *scene.pixels.shape[3:])
        if scene.sampling.start_from_reference:
            window[:, :, -STARTING_FRAMES:] = scene.pixels
        if scene.sampling.drop_first:
            return Carry(scene.reference.new_zeros(0), window)
        return Carry(self._vae.encode(window), window)

    def _carry(self, before: Carry, pictures: Tensor, sampling: ResolvedSampling, anchor: Tensor | None) -> Carry:
        """What the next clip needs: the last pictures, encoded again."""
        keep = self.settings.motion_frames
        window = pictures[:, :, -keep:]
        if window.shape[2] < keep:
            assert before.window is not None
            window = torch.cat([before.window.to(window.device)[:, :, window.shape[2] :], window], dim=2)
        history = self._vae.encode(window)
        return Carry(history, window if sampling.clip_frames < keep else None, anchor)

    def _denoise(
        self,
        scene: VideoConditions,
        index: int,
        audio: Tensor,
        history: Tensor | None,
        pose: Tensor | None,
        progress: Callable[[], None] | None,
    ) -> Tensor:
        """Latents [1, C, n / 4, H, W] of a clip, float32."""
        sampling, model, device = scene.sampling, self.checkpoint.transformer, self._device
        frames = sampling.clip_frames // FRAMES_PER_LATENT
        channels, _, height, width = scene.reference.shape[1:]
        heard = audio[None].to(device)
        posed = None if pose is None else self._encode_pose(pose).to(device)
        # Given everything, and the negative prompt with silence.
        branches = [(scene.text[:1], heard), (scene.text[1:], torch.zeros_like(heard))][: sampling.predictions]
        branches = list(self._parallel.own(branches))
        if len(branches) > 1 and sampling.batched:
            texts, sounds = zip(*branches, strict=True)
            branches = [(torch.cat(texts), torch.cat(sounds))]
        conditions = [
            model.encode_conditions(
                WanInputs(
                    text,
                    reference=_repeat(scene.reference.to(device), text),
                    history=None if history is None else _repeat(history.to(device), text),
                    pose=None if posed is None else _repeat(posed, text),
                    audio=sound,
                    size=(frames, height, width),
                ),
                context=self._parallel.context,
            )
            for text, sound in branches
        ]
        solver = flow_solver(sampling.solver, sampling.steps, sampling.shift, device)
        # One process draws, for devices may differ in how they do.
        shape = (channels, frames, height, width)
        x = self._parallel.team.share(lambda: self._noise(shape, sampling.seed + index), device)
        for timestep in solver.timesteps:
            predictions = torch.cat(
                [
                    model(
                        _repeat(x, text),
                        timestep.float().expand(len(text)),
                        conditions=condition,
                        context=self._parallel.context,
                    )
                    for (text, _), condition in zip(branches, conditions, strict=True)
                ]
            )
            predictions = self._parallel.exchange(predictions, sampling.predictions)
            velocity = predictions[:1].float()
            if sampling.predictions > 1:
                without = predictions[1:].float()
                velocity = without + sampling.guidance * (velocity - without)
            x = solver.step(velocity, timestep, x, return_dict=False)[0]
            self._parallel.team.pulse()
            if progress is not None:
                progress()
        return x

    def _noise(self, shape: tuple[int, ...], seed: int) -> Tensor:
        """Noise [1, *shape] in float32, drawn on the device and in the precision of the model as officially."""
        generator = torch.Generator(self._device).manual_seed(seed)
        dtype = self.checkpoint.transformer.dtype
        if dtype not in (torch.float32, torch.float16, torch.float64):
            dtype = torch.bfloat16  # also of quantised models
        return torch.randn(shape, generator=generator, device=self._device, dtype=dtype)[None].float()

    def _encode_pose(self, pose: Tensor) -> Tensor:
        """[1, 3, n, H, W] to latents [1, C, n / 4, H / 8, W / 8]; the first picture stands alone in front."""
        video = torch.cat([pose[:, :, :1], pose], dim=2).to(self._vae.device)
        return self._vae.encode(video)[:, :, 1:]

    @property
    def _device(self) -> torch.device:
        """Where the transformer computes, also where its weights are loaded on demand."""
        return self.checkpoint.transformer.device


def _repeat(x: Tensor, like: Tensor) -> Tensor:
    """[1, ...] for every sample of `like`."""
    return x.expand(len(like), *x.shape[1:])
