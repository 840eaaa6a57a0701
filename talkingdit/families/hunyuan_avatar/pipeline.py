# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo-Avatar (arXiv:2505.20156): a picture, voices and words to a video, in windows fused in every step.

All latents of a video are denoised together by time-aware position shift fusion (section 3.5, Algorithm 1): every step
sees windows of 33 latents side by side, which have moved on by 10 since the last step and wrap around the end of the
video. Steps are put into stages, whose latents are kept, so that an interrupted job goes on; then the video is decoded
part by part.

A stage or part hands on to the next, as its carry:

    latents    [1, C, N, h, w] of the whole video, float32; after the last stage those that are shown
    tail       what decoding needs of the part before
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from talkingdit.autoencoders.codec import codec
from talkingdit.autoencoders.latents import FRAMES_PER_LATENT
from talkingdit.distributed.layout import Parallel
from talkingdit.encoders.text import cut_warning
from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.conditions import AvatarInputs
from talkingdit.families.hunyuan_avatar.guidance import GuidanceView
from talkingdit.families.hunyuan_avatar.options import RELEASED
from talkingdit.families.hunyuan_avatar.outline import Details
from talkingdit.families.hunyuan_avatar.prepare import encode
from talkingdit.families.hunyuan_avatar.step_cache import (
    BACKBONE,
    Changes,
    FrameCache,
    TeaSteps,
    computes,
    fitted_for,
)
from talkingdit.families.hunyuan_avatar.windows import VideoConditions
from talkingdit.pipelines.long_video import (
    Carry,
    ClipPipeline,
    GeneratedClip,
    ShiftFusion,
    StepDone,
    denoise,
    go_on_from,
)
from talkingdit.pipelines.step_cache import borrowed

if TYPE_CHECKING:
    from collections.abc import Callable

    from talkingdit.families.hunyuan_avatar.checkpoint import HunyuanAvatarCheckpoint
    from talkingdit.pipelines.inputs import Inputs, Outline
    from talkingdit.pipelines.step_cache import Recorder


def open_pipeline(checkpoint: HunyuanAvatarCheckpoint, parallel: Parallel | None = None) -> HunyuanAvatarPipeline:
    """What makes videos with a checkpoint."""
    return HunyuanAvatarPipeline(checkpoint, parallel)


def noise_levels(steps: int, shift: float) -> Tensor:
    """The steps + 1 noise levels of the released schedule, from 1 to 0."""
    level = torch.linspace(1, 0, steps + 1)
    return shift * level / (1 + (shift - 1) * level)


class HunyuanAvatarPipeline(ClipPipeline):
    """Generates videos with a HunyuanVideo-Avatar checkpoint. It keeps no state but for a calibration; several may be
    made at once.

    Args:
        checkpoint: from `load_checkpoint`.
        parallel: how several processes share the work. Each then has a pipeline and makes the same calls, and gets the
            same latents.
    """

    def __init__(self, checkpoint: HunyuanAvatarCheckpoint, parallel: Parallel | None = None):
        self.checkpoint = checkpoint
        self.settings = checkpoint.settings
        self.parallel = Parallel() if parallel is None else parallel
        self.codec = codec(checkpoint.vae)
        self.recorder: Recorder | None = None  # of a calibration
        self._changes: Changes | None = None  # of its video, from stage to stage

    def warnings(self, inputs: Inputs, outline: Outline) -> tuple[str, ...]:
        """Words that the text encoder has no room for.

        Raises:
            UserError: emotions are asked for, and the model has no module for them; or a step cache, and there are no
                coefficients for it.
        """
        details: Details = outline.details
        config: Any = self.checkpoint.transformer.config
        if details.emotions and not config.emotion:
            raise UserError(
                f"{self.checkpoint.folder}: this checkpoint has no emotion module (the released model has none); leave "
                "`--emotion` out."
            )
        found: tuple[str, ...] = ()
        if details.options.step_cache and details.options.step_cache != RELEASED:
            fitted_for(config, self.checkpoint.folder)
            found += borrowed(self.checkpoint.folder, BACKBONE)
        if details.options.text_features is not None:
            return found
        encoder: Any = self.checkpoint.text_encoder
        found += cut_warning(encoder, details.prompt)
        if details.guidance.predictions > 1:
            found += cut_warning(encoder, details.negative_prompt, "the negative prompt")
        return found

    def encode(self, inputs: Inputs, outline: Outline) -> VideoConditions:
        """Encode what all windows share."""
        return encode(self.checkpoint, self.codec, inputs, outline, self.parallel)

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
        """A stage of the denoising, which shows no frames, or a part of the decoded video."""
        stages, length = conditions.details.stages, conditions.details.length
        if index < len(stages):
            begin = stages[index - 1] if index else 0
            start = self._noise(conditions) if carry is None else carry["latents"]
            latents = self._denoise(conditions, start.to(self._device), begin, stages[index], progress)
            if index + 1 == len(stages):
                latents = latents[:, :, : length.kept].clone()
            return GeneratedClip(index, latents.new_zeros(1, 3, 0, 1, 1), {"latents": latents})
        assert carry is not None
        return self._decode(conditions, index, carry, last)

    def _denoise(
        self,
        conditions: VideoConditions,
        latents: Tensor,
        begin: int,
        end: int,
        progress: StepDone | None,
    ) -> Tensor:
        """The steps `begin` .. `end` - 1 of a video's latents [1, C, N, h, w]."""
        guidance, settings, parallel = conditions.details.guidance, self.settings, self.parallel
        model, fps = self.checkpoint.transformer, settings.fps
        sigmas = noise_levels(guidance.steps, settings.shift)
        options = conditions.details.options
        changes = guidance.changes
        # By prediction. A stage begins without, so that it is the same after an interruption.
        caches: dict[int, FrameCache] = {}

        def predict(window: Tensor, frames: Tensor, step: int) -> list[Tensor]:
            views = guidance.views(step)
            # Where there are too few for all processes, each makes all of them.
            split = len(views) == guidance.predictions
            own = list(parallel.own(views) if split else views)
            found = []
            for number, some in enumerate([[view] for view in own] if options.sequential else [own]):
                given = conditions.arguments(frames, some, guidance.mask_at(step), fps)
                x = window[None].expand(len(some), *window.shape)
                timestep = (1000.0 * sigmas[step]).expand(len(some)).to(x.device)
                cache = None
                if options.step_cache == RELEASED:
                    cache = caches.setdefault(number, FrameCache())
                    cache.at(frames.tolist(), step in changes or computes(step, guidance.steps))
                found.append(model(x, timestep, context=parallel.context, cache=cache, **given))
            predictions = torch.cat(found).float()
            return list(parallel.exchange(predictions, len(views)) if split else predictions)

        inputs = self._step_inputs(conditions, sigmas)
        tea = self._tea(conditions, inputs, latents[0], begin, end)
        if self.recorder is not None and begin == 0:
            self._changes = Changes(inputs, self.recorder, latents[0])

        def after(stage: int, step: int, x: Tensor) -> None:
            parallel.team.raise_if_interrupted()
            if self._changes is not None:
                self._changes.after(x, step, float(sigmas[step + 1] - sigmas[step]))
            if progress is not None:
                go_on_from(x, progress(step, 1000.0 * sigmas[step], x[None])[0])
            if tea is not None:
                tea.after(x)

        # The released rule, for windows of any size: modulo the window, and none where one covers the video.
        shift = settings.shift_offset if settings.window < latents.shape[2] else 0
        plan = ShiftFusion(settings.window, settings.window, shift, cycle=settings.window)
        done = denoise(
            latents[0], sigmas[: end + 1], plan, predict, guidance.coefficients, begin=begin, after=after,
            computed=None if tea is None else tea.computed,
        )  # fmt: skip
        return done[None]

    def _step_inputs(self, conditions: VideoConditions, sigmas: Tensor) -> Callable[[Tensor, int], Tensor]:
        """What TeaCache looks at: the modulated input of a step, of latents [C, L, h, w] as many as of a window."""
        given: list[AvatarInputs] = []

        def inputs(latents: Tensor, step: int) -> Tensor:
            length = latents.shape[1]
            frames = torch.linspace(0, length - 1, min(length, self.settings.window)).long()
            if not given:
                said = conditions.arguments(frames, [GuidanceView(text=True, audio=True)], 1.0, self.settings.fps)
                given.append(AvatarInputs(**said))
            x = latents[None, :, frames.to(latents.device)].to(self._device)
            found: Tensor = self.checkpoint.transformer.step_input(
                x, (1000.0 * sigmas[step])[None].to(x.device), *given
            )
            return found

        return inputs

    def _tea(
        self,
        conditions: VideoConditions,
        inputs: Callable[[Tensor, int], Tensor],
        latents: Tensor,
        begin: int,
        end: int,
    ) -> TeaSteps | None:
        """Decides which steps of a stage are computed, on rank 0 for all; None computes all."""
        options, guidance = conditions.details.options, conditions.details.guidance
        if not options.step_cache or options.step_cache == RELEASED:
            return None
        return TeaSteps(
            inputs,
            latents,
            float(options.step_cache),
            fitted_for(self.checkpoint.transformer.config, self.checkpoint.folder),
            begin=begin,
            end=end,
            steps=guidance.steps,
            breaks=guidance.changes,
            decide=self.parallel.team.on_rank_0,
        )

    def _decode(self, conditions: VideoConditions, index: int, carry: Carry, last: bool) -> GeneratedClip:
        """A part of the video, behind the stages; what the autoencoder decodes at once is divided among the parts."""
        details = conditions.details
        latents, tail = carry["latents"], carry.get("tail")
        pieces = self.codec.parts(latents.shape[2])
        parts = details.parts
        number = index - len(details.stages)
        first, end = (len(pieces) * at // parts for at in (number, number + 1))
        team = self.parallel.team
        frames = []
        if team.rank == 0:
            for piece in range(first, end):
                shown, tail = self.codec.decode(latents, piece, tail)
                before = max(0, FRAMES_PER_LATENT * pieces[piece][0] - FRAMES_PER_LATENT + 1)
                frames.append(shown[:, :, : max(0, details.length.frames - before)].cpu())
        video = torch.cat(frames, dim=2) if frames else torch.zeros(1, 3, 0, 1, 1)
        if last:
            return GeneratedClip(index, video, None)
        return GeneratedClip(index, video, {"latents": latents} | ({} if tail is None else {"tail": tail}))

    def _noise(self, conditions: VideoConditions) -> Tensor:
        """Noise [1, C, N, h, w], float32, which one process draws, in the precision of the model as officially."""
        channels, _, rows, columns = conditions.reference.shape[1:]
        dtype = self.checkpoint.transformer.dtype
        if dtype not in (torch.float32, torch.float16, torch.float64):
            dtype = torch.bfloat16  # also of quantised models

        def drawn() -> Tensor:
            generator = torch.Generator(self._device).manual_seed(conditions.details.options.seed)
            shape = (1, channels, conditions.latents, rows, columns)
            return torch.randn(shape, generator=generator, device=self._device, dtype=dtype).float()

        return self.parallel.team.broadcast(drawn, self._device)

    @property
    def _device(self) -> torch.device:
        """Where the transformer computes, also where its weights are loaded on demand."""
        return self.checkpoint.transformer.device
