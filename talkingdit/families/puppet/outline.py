# SPDX-License-Identifier: Apache-2.0
"""What a video of a drawn character will be: as long as its sound, a frame for every audio frame."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from talkingdit.encoders.speech import pieces
from talkingdit.errors import UserError
from talkingdit.families.puppet.options import Options
from talkingdit.media.files import SPEECH_RATE
from talkingdit.pipelines.guidance import Branch, guidance_branches
from talkingdit.pipelines.inputs import Inputs, Outline

if TYPE_CHECKING:
    from talkingdit.families.puppet.checkpoint import PuppetSettings

FRAMES_PER_LATENT = 4


@dataclass(frozen=True)
class Sampling:
    """How clips are sampled: what `Options` says, with the checkpoint's values where it says nothing.

    Args:
        steps, shift: of the denoising.
        text_guidance, audio_guidance: see `talkingdit.pipelines.guidance`.
        seed: each clip has noise of its own, which follows from the seed and its number.
        step_cache: threshold of `talkingdit.pipelines.step_cache`; 0 computes every step.
        batched: guidance branches in one forward pass; False takes less memory and more time.
        keep_clothes: lay the portrait's over the generated ones.

    Raises:
        ValueError: a strength is negative or not finite.
    """

    steps: int
    shift: float
    text_guidance: float
    audio_guidance: float
    seed: int = 0
    batched: bool = True
    step_cache: float = 0.0
    keep_clothes: bool = True

    @staticmethod
    def of(options: Options, settings: PuppetSettings) -> Sampling:
        """The options, completed by the settings of the checkpoint."""

        def chosen(name: str) -> Any:
            value = getattr(options, name)
            return getattr(settings, name) if value is None else value

        return Sampling(
            steps=chosen("steps"),
            shift=settings.shift,
            text_guidance=chosen("text_guidance"),
            audio_guidance=chosen("audio_guidance"),
            seed=options.seed,
            batched=not options.sequential,
            step_cache=options.step_cache,
            keep_clothes=not options.generated_clothes,
        )

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The predictions that every denoising step takes."""
        return guidance_branches(self.text_guidance, self.audio_guidance)


@dataclass(frozen=True)
class Details:
    """What the pipeline knows of a video besides its outline."""

    sampling: Sampling


def _idle(prompt: str, options: Options, sampling: Sampling) -> list[str]:
    """What was asked for and has no effect."""
    found = []
    if prompt and not sampling.text_guidance:
        found.append("`--prompt` has no effect at text guidance 0.")
    if not prompt and options.text_guidance is not None:
        found.append("`--text-guidance` has no effect without `--prompt`.")
    if options.sequential and len(sampling.branches) == 1:
        found.append("`--sequential` has no effect: this guidance takes one prediction.")
    return found


def clip_frames(settings: PuppetSettings) -> int:
    """Frames per clip."""
    return settings.clip_latents * FRAMES_PER_LATENT


def outline(inputs: Inputs, settings: PuppetSettings, options: Options) -> Outline:
    """What video will be made of these inputs, without any model.

    Raises:
        UserError: an option is impossible, or there is no sound to speak of.
    """
    from talkingdit.encoders.log_mel import loudness_gain

    if not inputs.job.spoken:
        loudness_gain(pieces(inputs.sound))  # there is something to hear
    try:
        sampling = Sampling.of(options, settings)
        predictions = len(sampling.branches)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    frames = -(-len(inputs.sound) * settings.fps // SPEECH_RATE)
    height, width = inputs.image.shape[:2]
    warnings = []
    if height != width:
        warnings.append(f"{inputs.job.image} is {width} x {height} pixels; only its middle square is used.")
    warnings += _idle(inputs.job.prompt, options, sampling)
    values = asdict(sampling)
    values.pop("batched")
    if sampling.keep_clothes:
        values.pop("keep_clothes")
    if not sampling.step_cache:
        values.pop("step_cache")
    return Outline(
        size=(settings.size, settings.size),
        fps=settings.fps,
        clips=-(-frames // clip_frames(settings)),
        steps=sampling.steps,
        predictions=predictions,
        frames=frames,
        clip_frames=clip_frames(settings),
        settings={name.replace("_", " "): value for name, value in values.items()},
        warnings=tuple(warnings),
        details=Details(sampling),
    )
