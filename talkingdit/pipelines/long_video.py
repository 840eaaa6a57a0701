# SPDX-License-Identifier: Apache-2.0
"""The one engine of long videos: latents of any length are denoised as a plan says, window by window.

    denoise           all frames at the end
    denoise_parts     frames as they become final, also for a video whose length nobody knows yet
    generate_clips    the same for models that make a whole clip themselves and hand on what the next one needs
    generate_denoised likewise, with the frames of a clip still to be decoded

Plans are in `plans.py`, one step of windows in `window_step.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from talkingdit.distributed.team import ALONE, Team
from talkingdit.pipelines.chunks import blend_chunks, lay_over
from talkingdit.pipelines.finite import check_finite
from talkingdit.pipelines.plans import ChunkPrefix, ClipPrefix, OverlapBlend, Plan, ShiftFusion, Stage
from talkingdit.pipelines.window_step import Coefficients, Predict, StageStep, WindowSampler

if TYPE_CHECKING:
    from pathlib import Path

    from talkingdit.distributed.layout import Parallel
    from talkingdit.pipelines.inputs import Inputs, Outline

__all__ = [
    "Carry",
    "ChunkPrefix",
    "ClipPipeline",
    "ClipPrefix",
    "DenoisedClip",
    "FinalFrames",
    "GeneratedClip",
    "OverlapBlend",
    "ShiftFusion",
    "StepDone",
    "blend_chunks",
    "denoise",
    "denoise_parts",
    "generate_clips",
    "generate_denoised",
    "go_on_from",
]

Carry = Mapping[str, Tensor]  # what a clip or a stage hands on to the next


class StepDone(Protocol):
    """Told by a pipeline after every denoising step of a clip."""

    def __call__(self, step: int = -1, timestep: float | Tensor = 0.0, latents: Tensor | None = None) -> Any:
        """What is told may be left out.

        Args:
            step: of this clip, or where a video is denoised as a whole of it; counted from 0.
            timestep: that the model saw, 1000 to 0.
            latents: after the step, [1, C, n, H, W].

        Returns:
            The latents to go on from: those that were given, or others of their shape in their place.
        """


def go_on_from(latents: Tensor, others: Tensor) -> None:
    """Put others in the place of the latents of `denoise`, which are written over."""
    if others.data_ptr() != latents.data_ptr():
        latents.copy_(others)


Noise = Callable[[int, int], Tensor]  # first and last frame (not included) -> [C, n, H, W]
AfterStep = Callable[[int, int, Tensor], None]  # stage, step, its latents after it


@dataclass(frozen=True)
class FinalFrames:
    """Frames that have become final.

    Attributes:
        stage: whose end made them final, counted from 0.
        first: their first latent frame.
        latents: [C, n, H, W]; n may be 0.
        carry: what `denoise_parts` needs to go on after this stage in another process; None after the last one.
    """

    stage: int
    first: int
    latents: Tensor
    carry: Carry | None = field(default=None, repr=False)


def denoise(
    latents: Tensor,
    sigmas: Tensor | Sequence[float],
    plan: Plan,
    predict: Predict,
    coefficients: Coefficients,
    *,
    batch: int = 1,
    computed: Callable[[int], bool] | None = None,
    rescale: float | Callable[[int], float] = 0.0,
    device: torch.device | str | None = None,
    team: Team = ALONE,
    in_place: bool = False,
    begin: int = 0,
    after: AfterStep | None = None,
) -> Tensor:
    """Denoise a video of any length as a plan says.

    In each step i every window of the plan is cut from the latents and shown to `predict`; with w = coefficients(i),
    window x and its predictions p_k,

        x <- x + (sigmas[i + 1] - sigmas[i]) sum_k w_k p_k

    and all windows are fused, in one pass over the latents (`ops.fused_window_step`). No window is stored but for its
    predictions until the frames that it covers are fused, and no weights but one number per frame of each window.

    Args:
        latents: [C, L, H, W] noise; float32, float64, bfloat16 or float16. Not changed unless `in_place`. They may
            lie in host memory, or in a file that is mapped into memory, while the model is elsewhere (`device`),
            which then never holds more than a batch.
        sigmas: S + 1 noise levels, from the highest to the last.
        plan: `ShiftFusion`, `OverlapBlend`, `ChunkPrefix`, `ClipPrefix`, or any `plans.Plan`.
        predict: called as ``predict(window [C, f, H, W], frames [f], step)``, in the order of the windows, and gives
            one to four predictions [C, f, H, W] of the velocity, a list of tensors (a single tensor is one prediction)
            of any floating-point type. `frames` are the frames of the video under the window's slots, int64 on the
            host, already modulo L. With ``batch > 1`` it is called with windows [n, C, f, H, W] and frames [n, f], n
            from 1 to batch, and gives predictions [n, C, f, H, W].
        coefficients: ``coefficients(step)`` gives K numbers for K predictions, w above: `pipelines.guidance` has the
            forms of the papers. K + 1 numbers (a, b_1, ..., b_K) are instead the whole update of a linear sampler, a
            x + sum_k b_k p_k.
        batch: windows that the model sees at once.
        computed: which steps ask the model. In the others every frame takes its last predictions, those of the later
            window where two had it (the step cache of HunyuanVideo-Avatar). None asks it in every step.
        rescale: gives the guided velocity of every window so much of the spread of its first prediction, 0 to 1
            (`guidance.rescale_factors`); a number, or one for each step.
        device: where the model is; None: where the latents are.
        team: processes that share the windows of every step. All call this with the same arguments and get the same
            result.
        in_place: the result may take the place of the noise, so that there is no second tensor of its size; for
            contiguous latents.
        begin: step that the latents are at, to go on after an interruption; for plans with one stage.
        after: called with the number of the stage, the step and the stage's latents [C, n, H, W] after it, which the
            next step writes over.

    Returns:
        [C, L, H, W] in the dtype of `latents`, on their device.

    Raises:
        TypeError, ValueError: arguments do not fit, or what `predict` or `coefficients` gives does not.
    """
    if latents.dim() != 4:
        raise ValueError(f"denoise: latents must be [C, L, H, W], got shape {tuple(latents.shape)}")
    sampler = WindowSampler(
        sigmas,
        predict,
        coefficients,
        batch=batch,
        computed=computed,
        rescale=rescale,
        device=device,
        team=team,
    )

    def noise(first: int, last: int) -> Tensor:
        here = latents[:, first:last]
        whole = here.shape[1] == latents.shape[1]
        return (
            here if in_place and whole and here.is_contiguous() else here.clone(memory_format=torch.contiguous_format)
        )

    parts = denoise_parts(noise, sampler, plan, latents.shape[1], begin=begin, after=after)
    found = [part.latents for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def denoise_parts(
    noise: Noise,
    sampler: WindowSampler,
    plan: Plan,
    length: int | None,
    *,
    first: int = 0,
    carry: Carry | None = None,
    begin: int = 0,
    after: AfterStep | None = None,
    ended: Callable[[int], int | None] | None = None,
) -> Iterator[FinalFrames]:
    """The frames of a video as they become final; for every part that is asked for, one stage is computed.

    Args:
        noise: called as ``noise(first, last)``, gives the noise of these frames, contiguous [C, n, H, W], which is
            written over.
        sampler: noise levels, model and guidance, see :func:`denoise`.
        plan: how the video is cut.
        length: latent frames L; None where it is not known, for plans whose stages end before the video does.
        first: stage to begin with.
        carry: of the part of the stage before; None at the beginning.
        begin: step that the noise is at in the first stage; the stage before must be the same.
        after: see :func:`denoise`.
        ended: asked before every stage of a video of unknown length with the first frame of the stage; gives the
            length as soon as it is known, else None.

    Raises:
        TypeError, ValueError: see :func:`denoise`; a carry is missing, or there is one at the beginning.
    """
    if (carry is None) != (first == 0):
        raise ValueError(f"denoise: stage {first} {'needs' if first else 'takes no'} carry")
    tail = None if carry is None else carry["tail"]
    for index, stage in _stages(plan, length, ended):
        if index < first:
            continue
        x = _denoise_stage(noise, sampler, plan, stage, index, tail, begin if index == first else 0, after)
        tail = x[:, stage.final - stage.first :]
        over = stage.final == stage.last
        yield FinalFrames(
            index, stage.first, x[:, : stage.final - stage.first], None if over else {"tail": tail.clone()}
        )


def _stages(plan: Plan, length: int | None, ended: Callable[[int], int | None] | None) -> Iterator[tuple[int, Stage]]:
    """Stages with their numbers; once the length of an endless video is known, the rest are those of that length."""
    index = 0
    for stage in plan.stages(length):
        known = ended(stage.first) if length is None and ended is not None else None
        if known is not None:
            break
        yield index, stage
        index += 1
    else:
        return
    yield from ((number, stage) for number, stage in enumerate(plan.stages(known)) if number >= index)


def _denoise_stage(
    noise: Noise,
    sampler: WindowSampler,
    plan: Plan,
    stage: Stage,
    index: int,
    tail: Tensor | None,
    begin: int,
    after: AfterStep | None,
) -> Tensor:
    """All steps of one stage -> its latents [C, n, H, W], blended over what was there."""
    if not 0 <= begin <= sampler.steps:
        raise ValueError(f"denoise: begin must be 0 to {sampler.steps}, got {begin}")
    x = noise(stage.first, stage.last)
    given = None if tail is None else tail[:, : stage.given]
    step = StageStep(sampler, plan, x, stage.first)
    for i in range(begin, sampler.steps):
        if given is not None and (stage.hold or i == 0):
            x[:, : stage.given] = given
        step.run(i)
        if after is not None:
            after(index, i, x)
    if tail is not None:
        if stage.hold:
            x[:, : stage.given] = tail[:, : stage.given]
        overlap = min(len(stage.blend), x.shape[1])
        curve = torch.tensor(stage.blend[:overlap], dtype=torch.float64)
        x[:, :overlap] = lay_over(tail[:, :overlap], x[:, :overlap], curve)
    return x


# ---- Models that make whole clips ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GeneratedClip:
    """A finished clip."""

    index: int
    frames: Tensor  # [1, 3, n, H, W] float32 in -1..1, or uint8
    carry: Carry | None  # None after the last clip


@dataclass(frozen=True)
class DenoisedClip:
    """A clip whose frames may still have to be decoded.

    Attributes:
        index: its number.
        pieces: its frames [1, 3, n, H, W], in order, decoded as they are asked for; those of the clip before first.
        carry: None after the last clip.
    """

    index: int
    pieces: Iterator[Tensor]
    carry: Carry | None

    def whole(self) -> GeneratedClip:
        """The clip with all its frames."""
        pieces = list(self.pieces)
        return GeneratedClip(self.index, pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2), self.carry)


class ClipPipeline(Protocol):
    """What makes the clips of a video; a family's pipeline. It keeps no state: several videos may be made at once.

    Attributes:
        checkpoint: its models.
        parallel: how processes share the work.
        decodes_later: no clip needs the frames of those before it, and there is `denoised`, which takes what `clip`
            takes and gives a `DenoisedClip`. Another thread may decode it while the next one is denoised, after it has
            called `get_ready_to_decode` while the first one was.
    """

    checkpoint: Any
    parallel: Parallel
    decodes_later: bool = False

    def warnings(self, inputs: Inputs, outline: Outline) -> tuple[str, ...]:
        """What is done differently from what may be expected, as the models tell: sentences."""
        return ()

    def remarks(self, conditions: Any, outline: Outline) -> tuple[str, ...]:
        """The same, as is known after the last clip."""
        return ()

    def encode(self, inputs: Inputs, outline: Outline) -> Any:
        """The conditions that all clips share."""

    def get_ready_to_decode(self, conditions: Any, index: int, carry: Carry | None) -> None:
        """Do what can be done for the frames of clip `index` before it is denoised: nothing, unless a family says."""
        return

    def clip(
        self,
        conditions: Any,
        index: int,
        carry: Carry | None,
        *,
        last: bool = False,
        progress: StepDone | None = None,
    ) -> GeneratedClip:
        """Clip `index`, which goes on from the carry of the one before; None at the beginning.

        Args:
            last: no other clip follows, so no carry is made.
            progress: called after every denoising step.
        """


def generate_clips(
    pipeline: ClipPipeline,
    conditions: Any,
    count: int | Callable[[int], int],
    first: int = 0,
    carry: Carry | None = None,
    progress: StepDone | None = None,
) -> Iterator[GeneratedClip]:
    """The clips of a video from `first` on, generated as they are asked for.

    Args:
        pipeline: of a family.
        conditions: from its `encode`.
        count: clips of the whole video; or called with the number of the next clip, as often as there is one, for their
            number as far as it is known by then, where a voice is still being spoken.
        first: clip to begin with.
        carry: of the clip before `first`; None at the beginning.
        progress: called after every denoising step.

    Raises:
        ValueError: a carry is missing, or there is one at the beginning.
        UserError: the models make NaN or infinity.
    """
    return (clip.whole() for clip in generate_denoised(pipeline, conditions, count, first, carry, progress))


def generate_denoised(
    pipeline: ClipPipeline,
    conditions: Any,
    count: int | Callable[[int], int],
    first: int = 0,
    carry: Carry | None = None,
    progress: StepDone | None = None,
) -> Iterator[DenoisedClip]:
    """As `generate_clips`, but the frames of a clip are decoded where they are asked for, if the pipeline can wait."""
    if (carry is None) != (first == 0):
        raise ValueError(f"generate: clip {first} {'needs' if first else 'takes no'} carry")
    return _generated(pipeline, conditions, count, first, carry, progress)


def _generated(
    pipeline: Any,
    conditions: Any,
    count: int | Callable[[int], int],
    first: int,
    carry: Carry | None,
    progress: StepDone | None,
) -> Iterator[DenoisedClip]:
    index, folder = first, pipeline.checkpoint.folder

    def done(step: int = -1, timestep: float | Tensor = 0.0, latents: Tensor | None = None) -> Tensor | None:
        # After every step, so that hours are not spent on what is lost.
        if latents is not None:
            check_finite(latents, "latents", f"clip {index + 1} after step {step + 1}", folder)
        return latents if progress is None else progress(step, timestep, latents)

    while index < (total := count(index) if callable(count) else count):
        given: Any = {"last": index == total - 1, "progress": done}
        if getattr(pipeline, "decodes_later", False):
            clip = pipeline.denoised(conditions, index, carry, **given)
            pieces = clip.pieces
        else:
            clip = pipeline.clip(conditions, index, carry, **given)
            pieces = iter([clip.frames])
        carry = clip.carry
        yield DenoisedClip(index, _checked(pieces, index, folder), carry)
        index += 1


def _checked(pieces: Iterator[Tensor], index: int, folder: Path) -> Iterator[Tensor]:
    """The frames of a clip, looked at before they are told: an autoencoder's weights may be what is no number."""
    for piece in pieces:
        check_finite(piece, "frames", f"clip {index + 1}", folder)
        yield piece
