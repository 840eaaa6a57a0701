# SPDX-License-Identifier: Apache-2.0
"""What a Wan I2V video will be: its size, its length and its clips.

Frame 0 is the picture itself, which is shown. A clip of T latents has 1 + 4 (T - 1) frames, the first of them given:
the picture, or the last frame of the clip before, which is not shown again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT
from talkingdit.errors import UserError
from talkingdit.families.wan_i2v.options import Options, WanI2VOptions
from talkingdit.families.wan_s2v.outline import video_size
from talkingdit.media.framing import fit_image
from talkingdit.media.sound import SPEECH_RATE
from talkingdit.pipelines.guidance import Branch, Guidance, guidance_branches
from talkingdit.pipelines.inputs import Inputs, Outline
from talkingdit.pipelines.schedules import ALL_STEPS, Interval, read_interval
from talkingdit.pipelines.solvers import check_solver

if TYPE_CHECKING:
    from talkingdit.families.wan_i2v.checkpoint import WanI2VSettings


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How clips are sampled: what `Options` says, with the checkpoint's values where it says nothing.

    Args:
        steps, shift, solver: of the denoising, see `flow_solver`.
        guidance: strength of the prompt, see `talkingdit.pipelines.guidance`.
        audio_guidance: that of the voice, for models that hear.
        negative_prompt: what not to show.
        chunk_latents: latent frames generated at once.
        seed: of the first clip; later ones count on.
        step_cache: threshold of `talkingdit.pipelines.step_cache`; 0 computes every step.
        batched: all predictions in one forward pass; False takes less memory and more time.
        interval: shares of the steps that take both guidances, see `Interval`; in the others they are 1.

    Raises:
        ValueError: a value is impossible.
    """

    steps: int
    guidance: float
    audio_guidance: float
    shift: float
    solver: str
    negative_prompt: str
    chunk_latents: int
    seed: int = 0
    batched: bool = True
    step_cache: float = 0.0
    interval: tuple[float, float] = ALL_STEPS

    def __post_init__(self) -> None:
        check_solver(self.solver, self.steps, self.shift)
        guidance_branches(self.guidance, self.audio_guidance)
        Interval(1.0, *self.interval)

    @staticmethod
    def of(options: WanI2VOptions, settings: WanI2VSettings) -> Sampling:
        """The options, completed by the settings of the checkpoint.

        Raises:
            ValueError: a value is impossible.
        """

        def chosen(name: str) -> Any:
            value = getattr(options, name)
            return getattr(settings, name) if value is None else value

        guidance = chosen("guidance")
        return Sampling(
            steps=chosen("steps"),
            guidance=guidance,
            audio_guidance=chosen("audio_guidance") if hasattr(settings, "audio_guidance") else guidance,
            shift=chosen("shift"),
            solver=chosen("solver"),
            negative_prompt=chosen("negative_prompt"),
            chunk_latents=chosen("chunk_latents"),
            seed=options.seed,
            batched=not options.sequential,
            step_cache=options.step_cache,
            interval=read_interval(options.guidance_interval),
        )

    def branches(self, step: int) -> tuple[Branch, ...]:
        """The predictions of a step."""
        text, audio = (Interval(strength, *self.interval) for strength in (self.guidance, self.audio_guidance))
        return Guidance(self.steps, text, audio).branches(step)

    @property
    def predictions(self) -> int:
        """The most that a denoising step has."""
        return max(len(self.branches(step)) for step in range(self.steps))

    @property
    def negates(self) -> bool:
        """Does a step ask what the negative prompt would show?"""
        return any(not branch.text for step in range(self.steps) for branch in self.branches(step))


@dataclass(frozen=True)
class Details:
    """What the pipeline knows of a video besides its outline."""

    sampling: Sampling
    options: Any
    latents: int  # of the whole video, the given one in front among them


def latents_of_frames(frames: int) -> int:
    """Latents of a video of so many frames, of which the first one has a latent of its own."""
    return 1 + -(-(frames - 1) // FRAMES_PER_LATENT)


def outline(inputs: Inputs, settings: WanI2VSettings, options: Options) -> Outline:
    """What video will be made of these inputs, without any model.

    Raises:
        UserError: an option is impossible, or no size fits.
    """
    sampling = sampling_of(options, settings)
    clips = max(
        1, -(-(latents_of_frames(video_frames(inputs, settings.fps, options)) - 1) // (sampling.chunk_latents - 1))
    )
    silent = ("this model does not hear: the sound gives the video its length and lies under it.",)
    return outlined(inputs, settings, options, sampling, clips, silent)


def sampling_of(options: WanI2VOptions, settings: WanI2VSettings) -> Sampling:
    """`Sampling.of`, with a UserError for an impossible value."""
    try:
        return Sampling.of(options, settings)
    except ValueError as error:
        raise UserError(f"{error}.") from error


def video_frames(inputs: Inputs, fps: int, options: WanI2VOptions) -> int:
    """Frames of the video: as the sound lasts, or fewer."""
    frames = max(1, -(-len(inputs.sound) * fps // SPEECH_RATE))
    return frames if options.frames is None else min(frames, options.frames)


def outlined(
    inputs: Inputs,
    settings: WanI2VSettings,
    options: WanI2VOptions,
    sampling: Sampling,
    clips: int,
    warnings: tuple[str, ...] = (),
    **kept: Any,
) -> Outline:
    """An outline of so many clips.

    Args:
        warnings: of the family.
        kept: further settings that finished clips depend on.
    """
    height, width = size = video_size(inputs.image, settings, options)
    _, black = fit_image(inputs.image, size, options.cover)
    found = list(warnings)
    if black:
        found.append(f"{inputs.job.image}: {black} of the video's rows or columns are black; `--cover` avoids that.")
    if options.negative_prompt is not None and not sampling.negates:
        found.append("`--negative-prompt` has no effect at guidance 1.")
    if sampling.interval != ALL_STEPS and sampling.guidance == sampling.audio_guidance == 1:
        found.append("`--guidance-interval` has no effect without guidance.")
    if options.size is not None and options.max_area is not None:
        found.append("`--max-area` has no effect beside `--size`.")
    frames = video_frames(inputs, settings.fps, options)
    return Outline(
        size=size,
        fps=settings.fps,
        clips=clips,
        steps=sampling.steps,
        predictions=sampling.predictions,
        frames=frames,
        settings={"framing": options.cover, "length": frames, **_kept(sampling), **kept},
        warnings=tuple(found),
        when_too_large=f"clips of {sampling.chunk_latents} latents of {width} x {height}; try `--sequential`, a "
        "smaller `--max-area` or fewer `--chunk-latents`",
        details=Details(sampling, options, latents_of_frames(frames)),
    )


def _kept(sampling: Sampling) -> dict[str, Any]:
    """What of it finished clips depend on. What saves memory or time is left out."""
    values = {name.replace("_", " "): value for name, value in asdict(sampling).items() if name != "batched"}
    interval = values.pop("interval")
    return {**values, **({"guidance interval": list(interval)} if interval != ALL_STEPS else {})}
