# SPDX-License-Identifier: Apache-2.0
"""Gloria (arXiv:2603.29931): picture, anchors, voice and words to a long video, chunk by chunk (section 4.3).

Latent 0 of the video is its first frame, the picture, which stays clean. Every chunk but the first begins with the last
four latents of the one before it, clean at all steps, and is blended over these linearly at the end (section 7.2). As
the prefix is clean, both sides of the blend are the same up to rounding: it says what happens, and costs nothing.
All anchors stand beside every chunk.

Latent k >= 1 shows the frames 4 k - 3 .. 4 k and hears the speech features of these frames; latent 0, one frame, hears
that of its own four times.

A chunk hands on to the next, as its carry:

    tail       [C, 4, H, W] latents that the next one begins with
    past       [1, C, n, H, W] those before them that the decoder still looks at
    attention  [anchors, latents so far] where a figure was asked for; all that the last one hands on

Of a voice that is still being spoken the length is asked for anew by every chunk. A chunk that is not the last is the
same whatever it is; before the last one the voice has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from talkingdit.autoencoders.streaming import to_video
from talkingdit.autoencoders.strips import ClipDecoder
from talkingdit.autoencoders.tail import lookback
from talkingdit.distributed.layout import Parallel
from talkingdit.families.gloria.attention import AnchorAttention, draw_figure
from talkingdit.families.gloria.audio import WINDOW
from talkingdit.families.gloria.outline import AnchorImage, Details
from talkingdit.families.wan_i2v.conditions import ExtraTokens
from talkingdit.families.wan_i2v.outline import latents_of_frames, video_frames
from talkingdit.families.wan_i2v.pipeline import ClipInputs, VideoConditions, WanI2VPipeline
from talkingdit.media.framing import fit_image
from talkingdit.pipelines.aside import half_of_the_threads
from talkingdit.pipelines.chunks import lay_over
from talkingdit.pipelines.features import Features, encode_voice
from talkingdit.pipelines.long_video import Carry, DenoisedClip, GeneratedClip, StepDone
from talkingdit.pipelines.plans import ChunkPrefix, Stage

if TYPE_CHECKING:
    from pathlib import Path

    from talkingdit.families.wan_i2v.checkpoint import WanI2VCheckpoint
    from talkingdit.pipelines.inputs import Inputs, Outline


@dataclass(frozen=True, kw_only=True)
class GloriaConditions(VideoConditions):
    """What all chunks of a video have in common, made once."""

    plan: ChunkPrefix
    anchors: tuple[str, ...]  # names, in the order of `extra`
    decoder: ClipDecoder
    figure: Path | None = None
    frames_so_far: Callable[[], int] | None = None  # of a voice that is being spoken: `frames` as far as is known

    def so_far(self) -> GloriaConditions:
        """With the length of the video as far as it is known by now."""
        if self.frames_so_far is None:
            return self
        frames = self.frames_so_far()
        return replace(self, frames=frames, latents=latents_of_frames(frames))


def open_pipeline(checkpoint: WanI2VCheckpoint, parallel: Parallel | None = None) -> GloriaPipeline:
    """What makes the chunks of videos with a checkpoint."""
    return GloriaPipeline(checkpoint, parallel)


class GloriaPipeline(WanI2VPipeline):
    """Generates chunks with a checkpoint. It keeps no state; several videos may be made at once."""

    decodes_later = True

    def warnings(self, inputs: Inputs, outline: Outline) -> tuple[str, ...]:
        """As of Wan I2V; and where no figure can be made."""
        details: Details = outline.details
        found = super().warnings(inputs, outline)
        if details.options.attention_figure is not None and self.parallel.context is not None:
            found += (
                "`--attention-figure` has no effect where processes share the sequence: none of them has all keys.",
            )
        elif details.options.attention_figure is not None and not details.anchors:
            found += ("`--attention-figure` has no effect without anchors.",)
        return found

    @half_of_the_threads()
    def encode(self, inputs: Inputs, outline: Outline) -> GloriaConditions:
        """Encode what all chunks share, from the files of a job."""
        details: Details = outline.details
        image, _ = fit_image(inputs.image, outline.size, details.options.cover)
        frames = 1 + WINDOW * (details.latents - 1)
        fps, team = self.settings.fps, self.parallel.team
        features = encode_voice(self.checkpoint.audio_encoder, inputs, frames, fps, team)
        conditions = self.video(image, inputs.job.prompt, details, features, frames=outline.frames)
        if not inputs.job.spoken:
            return conditions

        def frames_so_far() -> int:
            return team.on_rank_0(lambda: video_frames(inputs, fps, details.options))

        return replace(conditions, frames_so_far=frames_so_far)

    @half_of_the_threads()
    @torch.no_grad()
    def video(self, image: Any, prompt: str, details: Details, features: Features, *, frames: int) -> GloriaConditions:
        """Encode what all chunks share.

        Args:
            image: [H, W, 3] uint8 RGB, the first frame, sides multiples of 16.
            prompt: what to show.
            details: of the outline, with the anchors.
            features: [layers, audio_dim, F] of the speech encoder, one column per frame.
            frames: that the video lasts.
        """
        plain = self.conditions(image, prompt, details.sampling, frames=frames, latents=details.latents)
        return GloriaConditions(
            **{**vars(plain), "features": features, "extra": self.anchor_tokens(details.anchors)},
            plan=details.plan,
            anchors=tuple(anchor.name for anchor in details.anchors),
            decoder=ClipDecoder(self._vae.stream()),
            figure=details.options.attention_figure,
        )

    def anchor_tokens(self, anchors: tuple[AnchorImage, ...]) -> tuple[ExtraTokens, ...]:
        """Anchors as the model takes them: each encoded alone, at its place in time."""
        return tuple(
            ExtraTokens(
                self._vae.encode(to_video(anchor.image[None]).to(self._vae.device)).to(self.device),
                [self.checkpoint.transformer.anchor_time(anchor.type, anchor.kind)],
            )
            for anchor in anchors
        )

    def clip(  # type: ignore[override]
        self,
        conditions: GloriaConditions,
        index: int,
        carry: Carry | None = None,
        *,
        last: bool = False,
        progress: StepDone | None = None,
    ) -> GeneratedClip:
        """Chunk `index`, see `ClipPipeline.clip`."""
        return self.denoised(conditions, index, carry, last=last, progress=progress).whole()

    @half_of_the_threads()
    @torch.no_grad()
    def denoised(
        self,
        conditions: GloriaConditions,
        index: int,
        carry: Carry | None = None,
        *,
        last: bool = False,
        progress: StepDone | None = None,
    ) -> DenoisedClip:
        """Chunk `index`, whose frames are still to be decoded, see `ClipPipeline`."""
        conditions = conditions.so_far()
        stage = _stage(conditions, index)
        given = conditions.first if carry is None else carry["tail"][None].to(self.device)
        length = stage.last - stage.first
        known = given[:, :, :length]
        clip = ClipInputs(index, self.known_condition(known, None, length), known, self.chunk_audio(conditions, stage))
        watches = conditions.figure is not None and conditions.anchors and self.parallel.context is None
        watched = AnchorAttention(self.checkpoint.transformer, conditions) if watches else None
        if watched is None:
            x = self.denoise(conditions, clip, length, progress)
        else:
            with watched:
                x = self.denoise(conditions, clip, length, progress)
        if carry is not None:
            curve = torch.tensor(stage.blend[:length], dtype=torch.float64)
            overlap = len(curve)
            x = torch.cat([lay_over(known[0, :, :overlap], x[0, :, :overlap], curve)[None], x[:, :, overlap:]], dim=2)
        count = stage.final - stage.first
        final = x[:, :, :count]
        past = (conditions.first[:, :, :0] if carry is None else carry["past"]).to(self.device)
        shown = self._decoded(conditions, index, past, final)
        seen = None
        if watched is not None and watched.weights is not None:
            seen = _joined(carry, watched.weights[:, :count])
        if last:
            if conditions.figure is not None and self.parallel.team.rank == 0:
                draw_figure(conditions.figure, seen, conditions.anchors, self.settings.fps)
            return DenoisedClip(index, shown, None if seen is None else {"attention": seen})
        looked = torch.cat([past, final], dim=2)[:, :, -lookback(self.checkpoint.vae) :]
        handed = {"tail": x[0, :, count:], "past": looked}
        return DenoisedClip(index, shown, handed if seen is None else {**handed, "attention": seen})

    def write_beside(self, outline: Outline, carry: Carry | None) -> None:
        """Draw the figure from what an earlier run has kept, which may have drawn it under another name."""
        details: Details = outline.details
        if details.options.attention_figure is not None and carry is not None and self.parallel.team.rank == 0:
            names = tuple(anchor.name for anchor in details.anchors)
            draw_figure(details.options.attention_figure, carry.get("attention"), names, self.settings.fps)

    @torch.no_grad()
    def _decoded(self, conditions: GloriaConditions, index: int, past: Tensor, latents: Tensor) -> Iterator[Tensor]:
        """The frames of a chunk's latents, those of one latent after the other."""
        first, device = _stage(conditions, index).first, self._vae.device
        with half_of_the_threads():
            stream = conditions.decoder.behind(index, past.to(device))
        for number, latent in enumerate(latents.split(1, dim=2), first):
            with half_of_the_threads():
                shown = stream(latent.to(device))[:, :, : conditions.frames - _frames_before(number)]
            yield shown

    def chunk_audio(self, conditions: GloriaConditions, stage: Stage) -> Tensor:
        """Features [1, layers, audio_dim, 4 T] of a chunk: latent 0 of the video hears its one frame four times."""
        features = conditions.features
        assert features is not None
        first, last = (WINDOW * latent - WINDOW + 1 for latent in (stage.first, stage.last))
        columns = features[..., max(first, 0) : last]
        missing = last - max(first, 0) - columns.shape[-1]  # behind the end of the voice
        if missing:
            columns = torch.cat([columns, columns[..., -1:].expand(-1, -1, missing)], dim=-1)
        if first < 0:
            columns = torch.cat([columns[..., :1].expand(-1, -1, -first), columns], dim=-1)
        return columns[None]


def _stage(conditions: GloriaConditions, index: int) -> Stage:
    """Of the plan of the video."""
    plan, length = conditions.plan, conditions.latents
    return next(stage for i, stage in enumerate(plan.stages(length)) if i == index)


def _frames_before(latents: int) -> int:
    """Frames of the video that lie in its first latents."""
    return max(0, 1 + WINDOW * (latents - 1))


def _joined(carry: Carry | None, weights: Tensor) -> Tensor:
    """Attention so far [anchors, latents], with that of a chunk behind."""
    return weights if carry is None else torch.cat([carry["attention"].to(weights.device), weights], dim=1)
