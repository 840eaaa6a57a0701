# SPDX-License-Identifier: Apache-2.0
"""What a Wan-S2V video will be: its size, its length, and which frame is seen while which sound is heard.

Frame p of the video is shown while audio frame p sounds. The first clip has no frames for the first three audio frames
(see `pipeline.py`). The official program shows its fourth frame while the first audio frame sounds, 3/16 s early, and
so on to the end. Here its first frame stays for these three audio frames ("hold"), or the sound begins with it ("cut");
`official_timing` is early on purpose, for comparisons.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.options import Options
from talkingdit.media.files import SPEECH_RATE
from talkingdit.media.framing import fit_image, output_size
from talkingdit.media.pose import PoseVideo
from talkingdit.pipelines.inputs import Inputs, Outline
from talkingdit.pipelines.schedules import ALL_STEPS, Interval, read_interval
from talkingdit.pipelines.solvers import check_solver

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.checkpoint import WanS2VSettings
    from talkingdit.media.framing import Frames

FRAMES_PER_LATENT = 4
DROPPED = 3  # frames at the beginning of the first clip
WAV2VEC_WINDOW, WAV2VEC_HOP = 400, 320  # samples per feature of the speech encoder


@dataclass(frozen=True)
class Sampling:
    """How clips are sampled: what `Options` says, with the checkpoint's values where it says nothing.

    Args:
        steps, shift, solver: of the denoising, see `flow_solver`.
        guidance: strength g of prediction = u + g (c - u), where u has the negative prompt and no sound; 1 leaves u
            out.
        negative_prompt: what not to show.
        clip_frames: frames per clip, a multiple of 4.
        seed: of the first clip; later ones count on.
        start_from_reference: the first clip moves on from the reference image itself.
        match_colour: bring the colours of later clips back to those of the first.
        step_cache: threshold of `talkingdit.pipelines.step_cache`; 0 computes every step.
        batched: both predictions in one forward pass; False takes less memory and more time.
        drop_first: the first clip has no history and loses its first frames.
        interval: shares of the steps that take the guidance, see `Interval`; in the others it is 1.

    Raises:
        ValueError: a value is impossible.
    """

    steps: int
    guidance: float
    shift: float
    solver: str
    negative_prompt: str
    clip_frames: int
    seed: int = 0
    start_from_reference: bool = False
    match_colour: bool = False
    batched: bool = True
    drop_first: bool = True
    step_cache: float = 0.0
    interval: tuple[float, float] = ALL_STEPS

    def __post_init__(self) -> None:
        if self.clip_frames < FRAMES_PER_LATENT or self.clip_frames % FRAMES_PER_LATENT:
            raise ValueError(f"generate: a clip must have a multiple of 4 frames, got {self.clip_frames}")
        if self.seed < 0:
            raise ValueError(f"generate: seed must be at least 0, got {self.seed}")
        if not 1 <= self.guidance < float("inf"):
            raise ValueError(f"generate: guidance must be a number of at least 1, got {self.guidance}")
        check_solver(self.solver, self.steps, self.shift)

    @staticmethod
    def of(options: Options, settings: WanS2VSettings) -> Sampling:
        """The options, completed by the settings of the checkpoint.

        Raises:
            ValueError: a value is impossible.
        """

        def chosen(name: str, setting: str = "") -> Any:
            value = getattr(options, name)
            return getattr(settings, setting or name) if value is None else value

        return Sampling(
            steps=chosen("steps"),
            guidance=chosen("guidance"),
            shift=chosen("shift"),
            solver=chosen("solver"),
            negative_prompt=chosen("negative_prompt"),
            clip_frames=chosen("clip_frames", "infer_frames"),
            seed=options.seed,
            start_from_reference=options.start_from_reference,
            match_colour=options.match_colour,
            batched=not options.sequential,
            step_cache=options.step_cache,
            drop_first=settings.drop_first_motion and not options.start_from_reference,
            interval=read_interval(options.guidance_interval),
        )

    def strength(self, step: int) -> float:
        """Strength of the guidance in a step."""
        return Interval(self.guidance, *self.interval)(step, self.steps)

    @property
    def counts(self) -> list[int]:
        """Predictions of every denoising step."""
        return [2 if self.strength(step) > 1 else 1 for step in range(self.steps)]

    @property
    def predictions(self) -> int:
        """The most that a denoising step has."""
        return max(self.counts)

    @property
    def dropped(self) -> int:
        """Frames that the beginning of the video lacks."""
        return DROPPED if self.drop_first else 0


@dataclass(frozen=True)
class VideoLength:
    """How long a video is.

    Args:
        audio_frames: that clips are made for.
        frames: of the video.
        repeated_frames: frames at its beginning that repeat the first one.
        skipped_frames: audio frames that its sound leaves out at the beginning.
    """

    audio_frames: int
    frames: int
    repeated_frames: int = 0
    skipped_frames: int = 0


class SizeSettings(Protocol):
    """What settings of a checkpoint say about sizes."""

    @property
    def size_multiple(self) -> int: ...

    @property
    def max_area(self) -> int: ...


class SizeOptions(Protocol):
    """What options say about them."""

    @property
    def size(self) -> tuple[int, int] | None: ...

    @property
    def max_area(self) -> int | None: ...


def video_length(samples: int, fps: int, clip_frames: int, dropped: int, options: Options) -> VideoLength:
    """How long the video of a voice is.

    Args:
        samples: of the voice at 16 kHz.
        fps: frames per second.
        clip_frames: frames per clip.
        dropped: frames that the beginning lacks.
    """
    frames = max(-(-samples * fps // SPEECH_RATE), dropped + 1)
    if options.frames is not None:
        frames = min(frames, max(options.frames, dropped + 1))
    if options.clips is not None:
        frames = min(frames, options.clips * clip_frames)
    if not options.official_timing:
        if options.opening == "cut":
            return VideoLength(frames, frames - dropped, skipped_frames=dropped)
        return VideoLength(frames, frames, repeated_frames=dropped)
    # Officially clips go to the end of the features, and the file ends with the shorter of frames and sound.
    features = int(((samples - WAV2VEC_WINDOW) // WAV2VEC_HOP + 1) / 50 * 30)
    made = int(features / (clip_frames * 30 / fps)) + 1
    made = (made if options.clips is None else min(made, options.clips)) * clip_frames
    shown = min(frames, made - dropped)
    return VideoLength(shown + dropped, shown)


def video_size(image: Frames, settings: SizeSettings, options: SizeOptions) -> tuple[int, int]:
    """Height and width of the video.

    Raises:
        UserError: the size asked for has sides that are not multiples of those of the checkpoint, or no size fits.
    """
    multiple = settings.size_multiple
    if options.size is None:
        area = settings.max_area if options.max_area is None else options.max_area
        return output_size(image.shape[0], image.shape[1], area, multiple)
    height, width = options.size
    if height % multiple or width % multiple or min(options.size) < multiple:
        near = " x ".join(str(max(multiple, round(side / multiple) * multiple)) for side in (width, height))
        raise UserError(f"size: sides must be multiples of {multiple}, got {width} x {height}; the nearest is {near}.")
    return height, width


@dataclass(frozen=True)
class Details:
    """What the pipeline knows of a video besides its outline."""

    sampling: Sampling
    audio_frames: int  # that clips are made for
    options: Options


def outline(inputs: Inputs, settings: WanS2VSettings, options: Options) -> Outline:
    """What video will be made of these inputs, without any model.

    Raises:
        UserError: an option is impossible, no size fits, or the pose video is not one.
    """
    try:
        sampling = Sampling.of(options, settings)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    height, width = size = video_size(inputs.image, settings, options)
    if options.pose is not None:
        PoseVideo(options.pose, settings.fps, options.official_timing)  # opens it
    length = video_length(len(inputs.sound), settings.fps, sampling.clip_frames, sampling.dropped, options)
    _, black = fit_image(inputs.image, size, options.cover)
    warnings = []
    if black:
        warnings.append(f"{inputs.job.image}: {black} of the video's rows or columns are black; `--cover` avoids that.")
    clips = -(-length.audio_frames // sampling.clip_frames)
    return Outline(
        size=size,
        fps=settings.fps,
        clips=clips,
        steps=sampling.steps,
        predictions=sampling.predictions,
        frames=length.frames,
        clip_frames=sampling.clip_frames,
        repeated_frames=length.repeated_frames,
        skipped_frames=length.skipped_frames,
        settings=_kept_settings(sampling, length, options),
        warnings=(*warnings, *_idle(options, sampling, clips)),
        when_too_large=f"clips of {sampling.clip_frames} frames of {width} x {height}; try `--sequential`, a smaller "
        "`--max-area` or fewer `--clip-frames`",
        details=Details(sampling, length.audio_frames, options),
    )


def _idle(options: Options, sampling: Sampling, clips: int) -> list[str]:
    """What was asked for and has no effect."""
    found = []
    if sampling.predictions == 1:
        if options.negative_prompt is not None:
            found.append("`--negative-prompt` has no effect at guidance 1.")
        if options.sequential:
            found.append("`--sequential` has no effect at guidance 1, which takes one prediction.")
    if sampling.guidance == 1 and sampling.interval != ALL_STEPS:
        found.append("`--guidance-interval` has no effect at guidance 1.")
    if options.size is not None and options.max_area is not None:
        found.append("`--max-area` has no effect beside `--size`.")
    if options.opening != "hold" and options.official_timing:
        found.append("`--opening` has no effect with `--official-timing`.")
    elif options.opening != "hold" and not sampling.dropped:
        found.append("`--opening` has no effect: the first clip drops no frames.")
    if options.match_colour and clips == 1:
        found.append("`--match-colour` has no effect on a video of one clip.")
    return found


def _kept_settings(sampling: Sampling, length: VideoLength, options: Options) -> dict[str, Any]:
    """What finished clips depend on. What saves memory or time is left out."""
    pose = None
    if options.pose is not None:
        pose = hashlib.sha256(options.pose.read_bytes()).hexdigest()[:32] + f" {options.official_timing}"
    names = {
        "negative_prompt": "negative prompt",
        "clip_frames": "number of clip frames",
        "steps": "number of steps",
        "guidance": "guidance",
        "shift": "shift",
        "solver": "solver",
        "seed": "seed",
        "drop_first": "beginning",
        "match_colour": "colour matching",
    }
    values = asdict(sampling)
    return {
        **({"step cache": sampling.step_cache} if sampling.step_cache else {}),
        **({"guidance interval": list(sampling.interval)} if sampling.interval != ALL_STEPS else {}),
        "pose": pose,
        "framing": options.cover,
        "length": length.audio_frames,
        **{said: values[name] for name, said in names.items()},
    }
