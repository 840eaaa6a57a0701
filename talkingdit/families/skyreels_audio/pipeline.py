# SPDX-License-Identifier: Apache-2.0
"""A portrait that speaks, or a video whose mouth follows another voice, in windows that are fused in every step.

A clip is some windows (`outline.py`), denoised together by `talkingdit.pipelines.long_video.denoise`: bidirectional
latent fusion (section 2.4). The reference, which is the portrait or the first frame of the video, stands clean in the
first place of every window; what a window shares with the one before is blended from weight zero on, so that of later
windows it is never shown. Clips after the first are given their first latents, which the one before has made: put back
at the noise level of every step.

Of an edited video the model sees the part around the mouth with the mouth greyed out, in all steps or in the first
ones (hybrid inference, equation 4). What it makes is composed into the frames of the video at their own size.

A clip hands on to the next, as its carry, its last latents: as many as windows share and the decoder looks back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT
from talkingdit.autoencoders.streaming import to_frames, to_video
from talkingdit.autoencoders.tail import lookback
from talkingdit.encoders.text import cut_warning
from talkingdit.families.skyreels_audio.known import Given, given_of, masked_clip, read_frames
from talkingdit.families.skyreels_audio.outline import Details, Edit, Sampling, clip_span, frames_of
from talkingdit.families.wan_i2v.conditions import WanI2VConditions, WanI2VInputs
from talkingdit.families.wan_i2v.pipeline import WanI2VPipeline
from talkingdit.media.colour import ColourUnifier
from talkingdit.media.compose import compose
from talkingdit.media.framing import fit_image
from talkingdit.pipelines.features import encode_voice
from talkingdit.pipelines.finite import check_finite
from talkingdit.pipelines.guidance import Branch
from talkingdit.pipelines.long_video import Carry, GeneratedClip, OverlapBlend, StepDone, denoise, go_on_from

if TYPE_CHECKING:
    from talkingdit.distributed.layout import Parallel
    from talkingdit.families.wan_i2v.checkpoint import WanI2VCheckpoint
    from talkingdit.pipelines.features import Features
    from talkingdit.pipelines.inputs import Frames, Inputs, Outline
    from talkingdit.pipelines.plans import Ramp

RAMPS: dict[str, Ramp] = {"both": "linear", "one": "earlier", "none": "earlier"}


@dataclass(frozen=True)
class VideoConditions:
    """What all clips of a video have in common, made once."""

    details: Details
    frames: int  # that the video lasts
    text: Tensor  # [2, L, text_dim]: prompt and negative prompt
    first: Tensor  # [1, C, 1, H, W] latent of the reference
    pixels: Tensor  # [1, 3, 1, 8 H, 8 W] the reference in -1..1
    image: Tensor | None  # [1, L, image_dim] its features
    features: Features  # [layers, audio_dim, F] of the voice, a column per frame

    @property
    def sampling(self) -> Sampling:
        return self.details.sampling


@dataclass
class _Clip:
    """A clip while it is made: what its windows are given, and what was encoded of it for the steps to come."""

    conditions: VideoConditions
    first: int  # its first latent in the video
    audio: Tensor  # [layers, audio_dim, 4 n] of its latents
    given: Given | None  # of an edited video
    sigmas: list[float]
    encoded: dict[Any, WanI2VConditions] = field(default_factory=dict)
    shared: dict[Any, WanI2VConditions] = field(default_factory=dict)  # of any window, for text and picture


def open_pipeline(checkpoint: WanI2VCheckpoint, parallel: Parallel | None = None) -> SkyReelsAudioPipeline:
    """What makes the clips of videos with a checkpoint."""
    return SkyReelsAudioPipeline(checkpoint, parallel)


def noise_levels(steps: int, shift: float) -> list[float]:
    """Noise levels from 1 to 0, steps + 1 of them: s' = shift s / (1 + (shift - 1) s) of evenly spaced s."""
    even = np.linspace(1.0, 0.0, steps + 1)
    return [float(level) for level in shift * even / (1 + (shift - 1) * even)]


class SkyReelsAudioPipeline(WanI2VPipeline):
    """Generates clips with a checkpoint. It keeps no state; several videos may be made at once.

    Args:
        checkpoint: from `load_checkpoint`.
        parallel: how several processes share the work. Each then has a pipeline and makes the same calls, and gets the
            same clips.
    """

    def warnings(self, inputs: Inputs, outline: Outline) -> tuple[str, ...]:
        """Words that the text encoder has no room for."""
        encoder, sampling = self.checkpoint.text_encoder, outline.details.sampling
        found = cut_warning(encoder, inputs.job.prompt)
        if any(not branch.text for branch in sampling.branches):
            found += cut_warning(encoder, sampling.negative_prompt, "the negative prompt")
        return found

    def encode(self, inputs: Inputs, outline: Outline) -> VideoConditions:  # type: ignore[override]
        """Encode what all clips share, from the files of a job."""
        details: Details = outline.details
        edit, team = details.edit, self.parallel.team
        if edit is None:
            image, _ = fit_image(inputs.image, outline.size, details.options.cover)
        else:
            image = team.broadcast(lambda: torch.from_numpy(read_frames(edit, 0, 1)[0][0]), "cpu").numpy()
        frames = FRAMES_PER_LATENT * (details.latents - 1) + 1
        encoder = self.checkpoint.audio_encoder.at(float(details.rate))
        features = encode_voice(encoder, inputs, frames, float(details.rate), team)
        return self.video_conditions(image, inputs.job.prompt, details, features, outline.frames)

    @torch.no_grad()
    def video_conditions(
        self, image: Frames, prompt: str, details: Details, features: Features, frames: int
    ) -> VideoConditions:
        """Encode what all clips share.

        Args:
            image: [H, W, 3] uint8 RGB, the reference as the model sees it, sides multiples of 16.
            prompt: what to show.
            details: of the video.
            features: [layers, audio_dim, F] of the voice, a column per frame up to the last latent's.
            frames: that the video lasts.

        Raises:
            ValueError: features that do not reach so far.
        """
        wanted = FRAMES_PER_LATENT * (details.latents - 1) + 1
        if len(features.shape) != 3 or features.shape[2] < wanted:
            raise ValueError(
                f"generate: features must have shape [layers, dim, F >= {wanted}], got {list(features.shape)}"
            )
        checkpoint, team = self.checkpoint, self.parallel.team
        words = [prompt, details.sampling.negative_prompt]
        text = team.broadcast(lambda: checkpoint.text_encoder.encode(words).features, self.device)
        pixels = to_video(image[None]).to(self._vae.device)
        pictures = checkpoint.image_encoder
        return VideoConditions(
            details=details,
            frames=frames,
            text=text,
            first=self._vae.encode(pixels).to(self.device),
            pixels=pixels,
            image=None if pictures is None else pictures.features(image[None]).to(self.device),
            features=features,
        )

    @torch.no_grad()
    def clip(  # type: ignore[override]
        self,
        conditions: VideoConditions,
        index: int,
        carry: Carry | None = None,
        *,
        last: bool = False,
        progress: StepDone | None = None,
    ) -> GeneratedClip:
        """Clip `index`, see `ClipPipeline.clip`."""
        sampling, details = conditions.sampling, conditions.details
        first, end = clip_span(sampling, index, details.latents)
        past = None if carry is None else carry["latents"]
        x = self._denoise(conditions, index, first, end, past, progress)
        given = 0 if past is None else sampling.overlap
        new = x[:, :, given:]
        if past is None:
            video = self._vae.stream()(new.to(self._vae.device))
        else:
            video = self._vae.decode_after(past.to(self._vae.device), new.to(self._vae.device))
        begin, stop = frames_of(first + given, end)
        video = video[:, :, : min(stop, conditions.frames) - begin]
        colours: dict[str, Tensor] = {}
        if details.edit is not None and self.parallel.team.rank == 0:
            check_finite(video, "frames", f"clip {index + 1}", self.checkpoint.folder)  # bytes no longer tell
            video = self.composed(details.edit, video, begin)
        elif details.edit is None and sampling.match_colour:
            before = {} if carry is None else carry
            unify = ColourUnifier(before.get("colours"), reached=before.get("correction"))
            video = unify(video)
            assert unify.wanted is not None
            assert unify.reached is not None
            colours = {"colours": unify.wanted, "correction": unify.reached}
        kept = None
        if not last:
            keep = max(sampling.overlap, lookback(self.checkpoint.vae))
            latents = x if past is None else torch.cat([past.to(x), new], dim=2)
            kept = {"latents": latents[:, :, -keep:], **colours}
        return GeneratedClip(index, video, kept)

    def composed(self, edit: Edit, video: Tensor, begin: int) -> Tensor:
        """Frames [1, 3, n, h, w] from number `begin` on, composed into those of the video: uint8 [1, 3, n, H, W]."""
        made, found = to_frames(video), []
        for number, frame in enumerate(edit.video.read(begin, len(made))):
            # The first frame of the video is what the others go on from: it stays as it is.
            mask = edit.region.masks(begin + number, 1)[0]
            found.append(compose(frame, made[number], mask, edit.crop) if begin + number else frame)
        return torch.from_numpy(np.stack(found)).permute(3, 0, 1, 2)[None]

    def _denoise(
        self,
        conditions: VideoConditions,
        index: int,
        first: int,
        end: int,
        past: Tensor | None,
        progress: StepDone | None,
    ) -> Tensor:
        """Latents [1, C, end - first, H, W] of a clip, float32."""
        sampling, team, length = conditions.sampling, self.parallel.team, end - first
        channels, _, height, width = conditions.first.shape[1:]
        clip = _Clip(
            conditions,
            first,
            _columns(conditions.features, first, end),
            self._given(conditions.details.edit, first, end),
            noise_levels(sampling.steps, sampling.shift),
        )
        shape = (channels, length, height, width)
        noise = team.broadcast(lambda: self.noise(shape, sampling.seed + index), self.device)[0]
        known = conditions.first[0] if past is None else past[0, :, -sampling.overlap :].to(noise)
        if past is None and not self.settings.held:
            known = known[:, :0]
        front = noise[:, : known.shape[1]].clone()

        def after(stage: int, step: int, x: Tensor) -> None:
            x[:, : known.shape[1]] = torch.lerp(known.to(x), front, clip.sigmas[step + 1])
            team.raise_if_interrupted()
            if progress is not None:
                go_on_from(x, progress(step, 1000.0 * clip.sigmas[step], x[None])[0])

        none = sampling.fusion == "none"
        plan = OverlapBlend(
            sampling.window, 1 if none else sampling.overlap, RAMPS[sampling.fusion], blend_from=0, tail="full"
        )
        x = denoise(
            noise,
            clip.sigmas,
            plan,
            lambda window, frames, step: self._predict(clip, window, frames, step),
            sampling.strengths.coefficients,
            rescale=sampling.rescale_guidance,
            in_place=True,
            after=after,
        )
        return x[None]

    def _predict(self, clip: _Clip, window: Tensor, frames: Tensor, step: int) -> list[Tensor]:
        """The velocities [C, f, H, W] of a window, one for each prediction that the step needs."""
        sampling, parallel = clip.conditions.sampling, self.parallel
        branches = sampling.strengths.branches(step)
        split = len(branches) == len(sampling.branches)  # else too few for all processes: each makes all of them
        own: Sequence[Branch] = tuple(parallel.own(branches)) if split else branches
        x, timestep = window[None].to(self.device), torch.full((1, window.shape[1]), 1000 * clip.sigmas[step])
        if self.settings.held:
            x = x.clone()
            x[:, :, :1] = clip.conditions.first
            timestep[:, 0] = 0
        timestep = timestep.to(self.device)
        groups = [tuple(own)] if sampling.batched else [(branch,) for branch in own]
        video = clip.given is not None and step < sampling.video_steps
        found = torch.cat(
            [
                self.checkpoint.transformer(
                    x.expand(len(group), *x.shape[1:]),
                    (timestep if self.settings.held else timestep[:, 0]).expand(
                        len(group), *timestep.shape[1 : 1 + self.settings.held]
                    ),
                    self._encoded(clip, frames, group, video),
                    context=parallel.context,
                )
                for group in groups
            ]
        )
        if split:
            found = parallel.exchange(found, len(branches))
        return list(found.float())

    def _encoded(self, clip: _Clip, frames: Tensor, branches: tuple[Branch, ...], video: bool) -> WanI2VConditions:
        """Conditions of a window for some predictions, made once. What is the same for all windows is held once."""
        kinds = tuple((branch.text, branch.audio) for branch in branches)
        begin, end = int(frames[0]), int(frames[-1]) + 1
        key = (begin, end, kinds, video)
        if key not in clip.encoded:
            made = self.checkpoint.transformer.encode_conditions(
                self._inputs(clip, frames, kinds, video),
                precompute=kinds not in clip.shared,
                context=self.parallel.context,
            )
            like = clip.shared.setdefault(kinds, made)
            clip.encoded[key] = dataclasses.replace(
                made, text=like.text, image=like.image, text_kv=like.text_kv, image_kv=like.image_kv
            )
        return clip.encoded[key]

    def _inputs(self, clip: _Clip, frames: Tensor, kinds: Sequence[tuple[bool, bool]], video: bool) -> WanI2VInputs:
        conditions, model, count = clip.conditions, self.checkpoint.transformer, len(kinds)
        if video and clip.given is not None:
            channels = model.config.in_dim - 2 * model.config.out_dim
            condition = clip.given.condition(frames, conditions.first, channels)
        else:
            condition = self.known_condition(conditions.first, conditions.pixels, len(frames))
        begin, end = FRAMES_PER_LATENT * int(frames[0]), FRAMES_PER_LATENT * (int(frames[-1]) + 1)
        audio = clip.audio[..., begin:end].to(self.device)
        return WanI2VInputs(
            torch.stack([conditions.text[0 if text else 1] for text, _ in kinds]),
            condition=condition.to(self.device).expand(count, *condition.shape[1:]),
            image=None if conditions.image is None else conditions.image.expand(count, *conditions.image.shape[1:]),
            audio=torch.stack([audio if hears else torch.zeros_like(audio) for _, hears in kinds]),
        )

    def _given(self, edit: Edit | None, first: int, end: int) -> Given | None:
        """What is given of a clip of an edited video; rank 0 reads its files."""
        if edit is None:
            return None
        team, read = self.parallel.team, None

        def pixels() -> Tensor:
            nonlocal read
            read = masked_clip(edit, first, end)
            return read[0]

        def made() -> Tensor:
            assert read is not None
            return read[1]

        shown = team.broadcast(pixels, "cpu")
        given = given_of(shown, team.broadcast(made, "cpu"), self._vae)
        return Given(given.latents.to(self.device), given.made.to(self.device))


def _columns(features: Features, first: int, end: int) -> Tensor:
    """Columns [layers, audio_dim, 4 n] of latents first .. end - 1; that of the first frame stands four times."""
    begin, stop = frames_of(first, end)
    columns = features[..., begin:stop]
    if first == 0:
        columns = torch.cat([columns[..., :1].expand(-1, -1, FRAMES_PER_LATENT - 1), columns], dim=-1)
    return columns.float()
