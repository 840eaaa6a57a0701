# SPDX-License-Identifier: Apache-2.0
"""Wan-S2V (arXiv:2508.18621): an image, a voice and words to a video, clip by clip, as the official program does it.

A clip is n frames (officially 80), n / 4 latents, generated at once. Latent i of a clip hears the audio frames
4 i .. 4 i + 3, one per frame, and five before (the first repeated at the beginning of every clip). All clips see the
latent of the reference image. The first one has no history, and its latents are decoded behind that of the reference:
frames 1 .. n of the decoded n + 1, of which the first three, blurred, are dropped. Every later clip gets the last 73
frames before it, encoded again from floating point numbers, as 19 latents of history, and is decoded behind these.

Frame p of the video belongs to audio frame p; the first clip has none for the frames 0, 1 and 2 (`DROPPED`).

A clip hands on to the next, as its carry:

    history    [1, C, 19, H, W] latents of the last 73 frames, float32
    window     [1, 3, 73, 8 H, 8 W] these frames, where the next clip is too short to replace all
    colours    [2, 3] of the first clip, where later ones are matched
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from talkingdit.autoencoders.streaming import FRAMES_PER_LATENT, to_video
from talkingdit.distributed.layout import Parallel
from talkingdit.encoders.text import cut_warning
from talkingdit.families.wan_s2v import step_cache
from talkingdit.families.wan_s2v.conditions import WanConditions, WanInputs
from talkingdit.families.wan_s2v.outline import DROPPED, Details, Sampling
from talkingdit.media.colour import colours, match_colours
from talkingdit.media.framing import fit_image
from talkingdit.media.pose import PoseVideo
from talkingdit.pipelines.features import Features, encode_voice
from talkingdit.pipelines.long_video import Carry, ClipPipeline, GeneratedClip, StepDone
from talkingdit.pipelines.parallel import shared_autoencoder
from talkingdit.pipelines.solvers import flow_solver
from talkingdit.pipelines.step_cache import changes_of

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.checkpoint import WanS2VCheckpoint
    from talkingdit.pipelines.inputs import Frames, Inputs, Outline
    from talkingdit.pipelines.step_cache import Recorder

STARTING_FRAMES = 6  # frames of history that show the reference, where the video starts from it

PoseClips = Callable[[int], Tensor]  # of a clip's number: [1, 3, n, 8 H, 8 W] in -1..1


@dataclass(frozen=True)
class VideoConditions:
    """What all clips of a video have in common, made once."""

    sampling: Sampling
    text: Tensor  # [2, L, text_dim]: prompt and negative prompt
    reference: Tensor  # [1, C, 1, H, W] latent
    pixels: Tensor  # [1, 3, 1, 8 H, 8 W] the reference image in -1..1
    features: Features  # [layers, audio_dim, F] of the speech encoder, one column per frame
    audio_frames: int  # that the video lasts; F reaches to the end of its last clip
    pose: PoseClips | None = None

    @property
    def clips(self) -> int:
        return -(-self.audio_frames // self.sampling.clip_frames)


def open_pipeline(checkpoint: WanS2VCheckpoint, parallel: Parallel | None = None) -> WanS2VPipeline:
    """What makes the clips of videos with a checkpoint."""
    return WanS2VPipeline(checkpoint, parallel)


class WanS2VPipeline(ClipPipeline):
    """Generates clips with a Wan-S2V checkpoint. It keeps no state; several videos may be made at once.

    Args:
        checkpoint: from `load_checkpoint`.
        parallel: how several processes share the work. Each then has a pipeline and makes the same calls, and gets the
            same clips.
    """

    def __init__(self, checkpoint: WanS2VCheckpoint, parallel: Parallel | None = None):
        self.checkpoint = checkpoint
        self.settings = checkpoint.settings
        self.parallel = Parallel() if parallel is None else parallel
        self.recorder: Recorder | None = None  # of a calibration
        self._vae = shared_autoencoder(checkpoint.vae, self.parallel)

    def warnings(self, inputs: Inputs, outline: Outline) -> tuple[str, ...]:
        """Words that the text encoder has no room for, a pose without layers for it, and of the step cache."""
        details: Details = outline.details
        encoder, sampling = self.checkpoint.text_encoder, details.sampling
        found = cut_warning(encoder, inputs.job.prompt)
        if sampling.predictions > 1:
            found += cut_warning(encoder, sampling.negative_prompt, "the negative prompt")
        if details.options.pose is not None and self.checkpoint.transformer.cond_encoder is None:
            found += ("`--pose` has no effect: this checkpoint has no layers for a pose.",)
        return found + step_cache.warnings(sampling.step_cache, self.checkpoint.folder)

    def encode(self, inputs: Inputs, outline: Outline) -> VideoConditions:
        """Encode what all clips share, from the files of a job."""
        details: Details = outline.details
        frames = outline.clips * details.sampling.clip_frames
        image, _ = fit_image(inputs.image, outline.size, details.options.cover)
        encoder, team = self.checkpoint.audio_encoder, self.parallel.team
        features = encode_voice(encoder, inputs, frames, self.settings.fps, team)
        return self.conditions(
            image,
            inputs.job.prompt,
            details.sampling,
            features,
            audio_frames=details.audio_frames,
            pose=None if details.options.pose is None else _SharedPose(self, outline),
        )

    @torch.no_grad()
    def conditions(
        self,
        image: Frames,
        prompt: str,
        sampling: Sampling,
        features: Features,
        *,
        audio_frames: int | None = None,
        pose: PoseClips | None = None,
    ) -> VideoConditions:
        """Encode what all clips share.

        Args:
            image: [H, W, 3] uint8 RGB, the reference in the size of the video, sides multiples of 16.
            prompt: what to show.
            sampling: how to generate.
            features: [layers, audio_dim, F] of the speech encoder, one column per frame.
            audio_frames: audio frames that the video lasts, at most F; default F. F must reach to the end of the last
                clip.
            pose: gives the pose of each clip; None is no pose.

        Raises:
            ValueError: an image of another type or size, or features that do not reach far enough.
        """
        if (
            image.ndim != 3
            or image.shape[2] != 3
            or image.dtype != np.uint8
            or any(side % 16 or not side for side in image.shape[:2])
        ):
            raise ValueError(
                "generate: image must be uint8 [H, W, 3] with sides that are multiples of 16, "
                f"got {image.dtype} of shape {list(image.shape)}"
            )
        frames = features.shape[-1] if audio_frames is None else audio_frames
        whole = -(-frames // sampling.clip_frames) * sampling.clip_frames
        if frames <= sampling.dropped or len(features.shape) != 3 or features.shape[2] < whole:
            raise ValueError(
                f"generate: features must have shape [layers, dim, F] with F of at least {whole} for "
                f"{frames} > {sampling.dropped} frames, got {list(features.shape)}"
            )
        # One process runs the text encoder: it is the largest part next to the transformer, and may be on the host.
        words = [prompt, sampling.negative_prompt]
        text = self.parallel.team.broadcast(lambda: self.checkpoint.text_encoder.encode(words).features, self._device)
        pixels = to_video(image[None]).to(self._vae.device)
        return VideoConditions(sampling, text, self._vae.encode(pixels), pixels, features, frames, pose)

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
        """Clip `index`, see `ClipPipeline.clip`. No more frames are decoded than the sound lasts."""
        sampling, vae = conditions.sampling, self._vae
        frames = min(sampling.clip_frames, conditions.audio_frames - index * sampling.clip_frames)
        if index == 0:
            carry = self._beginning(conditions)
        assert carry is not None
        without_history = index == 0 and sampling.drop_first
        history = None if without_history else carry["history"]
        latents = self._denoise(conditions, index, history, progress)

        past = conditions.reference if history is None else history
        wanted = -(-frames // FRAMES_PER_LATENT)
        video = vae.decode_after(past.to(vae.device), latents[:, :, :wanted].to(vae.device))[:, :, :frames]
        video = video[:, :, DROPPED if without_history else 0 :]
        anchor = carry.get("colours")
        if sampling.match_colour:
            if anchor is None:
                anchor = colours(video)
            else:
                video = match_colours(video, anchor)
        return GeneratedClip(index, video, None if last else self._carry(carry, video, sampling, anchor))

    def remarks(self, conditions: VideoConditions, outline: Outline) -> tuple[str, ...]:
        """Whether the pose video was long enough."""
        pose = conditions.pose
        if not isinstance(pose, _SharedPose) or not 0 < pose.frames < conditions.audio_frames:
            return ()
        return (f"{pose.path}: ends after {pose.frames / outline.fps:.2f} s; the rest follows black frames.",)

    def _beginning(self, conditions: VideoConditions) -> Carry:
        """The past of the first clip: grey frames, and where it starts from the reference this at the end."""
        frames = self.settings.motion_frames
        window = conditions.pixels.new_zeros(1, 3, frames, *conditions.pixels.shape[3:])
        if conditions.sampling.start_from_reference:
            window[:, :, -STARTING_FRAMES:] = conditions.pixels
        if conditions.sampling.drop_first:
            return {"window": window}
        return {"history": self._vae.encode(window), "window": window}

    def _carry(self, before: Carry, video: Tensor, sampling: Sampling, anchor: Tensor | None) -> Carry:
        """What the next clip needs: the last frames, encoded again."""
        keep = self.settings.motion_frames
        window = video[:, :, -keep:]
        if window.shape[2] < keep:
            window = torch.cat([before["window"].to(window.device)[:, :, window.shape[2] :], window], dim=2)
        carry = {"history": self._vae.encode(window)}
        if sampling.clip_frames < keep:
            carry["window"] = window
        if anchor is not None:
            carry["colours"] = anchor
        return carry

    def _denoise(
        self,
        conditions: VideoConditions,
        index: int,
        history: Tensor | None,
        progress: StepDone | None,
    ) -> Tensor:
        """Latents [1, C, n / 4, H, W] of a clip, float32."""
        sampling, model, device = conditions.sampling, self.checkpoint.transformer, self._device
        parallel, size = self.parallel, sampling.clip_frames
        frames = size // FRAMES_PER_LATENT
        channels, _, height, width = conditions.reference.shape[1:]
        audio = conditions.features[..., index * size : (index + 1) * size][None].to(device)
        pose = None if conditions.pose is None else self._encode_pose(conditions.pose(index)).to(device)
        # Given everything, and the negative prompt with silence.
        branches = [(conditions.text[:1], audio), (conditions.text[1:], torch.zeros_like(audio))]

        def groups(count: int) -> list[tuple[Tensor, Tensor]]:
            """Text and sound of each forward pass of a step with so many predictions."""
            # Where there are too few for all processes, each makes all of them.
            own = list(parallel.own(branches[:count]) if count == sampling.predictions else branches[:count])
            if len(own) > 1 and sampling.batched:
                texts, sounds = zip(*own, strict=True)
                return [(torch.cat(texts), torch.cat(sounds))]
            return own

        def encode(text: Tensor, sound: Tensor) -> WanConditions:
            given = WanInputs(
                text,
                reference=_repeat(conditions.reference.to(device), text),
                history=None if history is None else _repeat(history.to(device), text),
                pose=None if pose is None else _repeat(pose, text),
                audio=sound,
                size=(frames, height, width),
            )
            return model.encode_conditions(given, context=parallel.context)

        counts = sampling.counts
        breaks = changes_of(counts)
        solver = flow_solver(sampling.solver, sampling.steps, sampling.shift, device)
        # One process draws, for devices may differ in how they do.
        shape = (channels, frames, height, width)
        x = parallel.team.broadcast(lambda: self._noise(shape, sampling.seed + index), device)
        steps = step_cache.cached_steps(
            model,
            solver.timesteps,
            len(groups(sampling.predictions)),
            sampling.step_cache,
            self.checkpoint.folder,
            self.recorder,
            breaks,
        )
        passes: list[tuple[int, WanConditions]] = []  # samples and conditions of each
        for step, timestep in enumerate(solver.timesteps):
            if step == 0 or step in breaks:
                passes = [(len(text), encode(text, sound)) for text, sound in groups(counts[step])]
            predictions = torch.cat(
                [
                    model(
                        x.expand(samples, *x.shape[1:]),
                        timestep.float().expand(samples),
                        condition,
                        context=parallel.context,
                        cache=cache,
                    )
                    for (samples, condition), cache in zip(passes, steps.begin(step, len(passes)), strict=True)
                ]
            )
            if counts[step] == sampling.predictions:
                predictions = parallel.exchange(predictions, sampling.predictions)
            velocity = predictions[:1].float()
            if counts[step] > 1:
                without = predictions[1:].float()
                velocity = without + sampling.guidance * (velocity - without)
            x = solver.step(velocity, timestep, x, return_dict=False)[0]
            parallel.team.raise_if_interrupted()
            if progress is not None:
                x = progress(step, timestep, x)
        steps.end()
        return x

    def _noise(self, shape: tuple[int, ...], seed: int) -> Tensor:
        """Noise [1, *shape] in float32, drawn on the device and in the precision of the model as officially."""
        generator = torch.Generator(self._device).manual_seed(seed)
        dtype = self.checkpoint.transformer.dtype
        if dtype not in (torch.float32, torch.float16, torch.float64):
            dtype = torch.bfloat16  # also of quantised models
        return torch.randn(shape, generator=generator, device=self._device, dtype=dtype)[None].float()

    def _encode_pose(self, pose: Tensor) -> Tensor:
        """[1, 3, n, H, W] to latents [1, C, n / 4, H / 8, W / 8]; the first frame stands alone in front."""
        video = torch.cat([pose[:, :, :1], pose], dim=2).to(self._vae.device)
        return self._vae.encode(video)[:, :, 1:]

    @property
    def _device(self) -> torch.device:
        """Where the transformer computes, also where its weights are loaded on demand."""
        return self.checkpoint.transformer.device


class _SharedPose:
    """The clips of a pose video, which rank 0 reads, on every process. It is read on where clips come in order."""

    def __init__(self, pipeline: WanS2VPipeline, outline: Outline):
        details: Details = outline.details
        assert details.options.pose is not None
        self.path = details.options.pose
        self._team = pipeline.parallel.team
        self._frames, self._size = details.sampling.clip_frames, outline.size
        self._video = (
            PoseVideo(self.path, float(outline.fps), details.options.official_timing) if self._team.rank == 0 else None
        )
        self._next = 0
        self._clips: Iterator[Tensor] = iter(())

    @property
    def frames(self) -> int:
        """Frames of the video to make that it has had a frame for, as rank 0 knows."""
        return 0 if self._video is None else self._video.frames

    def __call__(self, index: int) -> Tensor:
        return self._team.broadcast(lambda: self._read(index), "cpu")

    def _read(self, index: int) -> Tensor:
        assert self._video is not None
        if index == 0 or index != self._next:
            self._clips = self._video.clips(self._frames, self._size, index)
        self._next = index + 1
        return next(self._clips)


def _repeat(x: Tensor, like: Tensor) -> Tensor:
    """[1, ...] for every sample of `like`."""
    return x.expand(len(like), *x.shape[1:])
