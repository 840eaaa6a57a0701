# SPDX-License-Identifier: Apache-2.0
"""The whole job with a Wan-S2V checkpoint, files in and files out, which goes on where an earlier run stopped.

Picture p of the video is shown while audio frame p sounds. The first clip has no pictures for the first three audio
frames (see `pipeline.py`). The official program shows its fourth picture while the first audio frame
sounds, 3/16 s early, and so on to the end. Here its first picture stays for these three frames ("hold"), or the sound
begins with it ("cut"); `official_timing` is early on purpose, for comparisons.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talkingdit.autoencoders.streaming import to_frames
from talkingdit.distributed.layout import Parallel
from talkingdit.distributed.team import Team
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.pipeline import Frames, ResolvedSampling, S2VSampling, VideoConditions, WanS2VPipeline
from talkingdit.media.files import SPEECH_RATE, VideoWriter, read_track
from talkingdit.media.framing import PoseVideo, fit_picture, output_size
from talkingdit.media.sheet import preview_sheet, sample_frames
from talkingdit.pipelines.job import SHEET_PICTURES, Inputs, Result
from talkingdit.pipelines.resume import ClipStore, SharedClipStore

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.checkpoint import WanS2VCheckpoint, WanS2VSettings

OPENINGS = ("hold", "cut")
WAV2VEC_WINDOW, WAV2VEC_HOP = 400, 320  # samples per feature of the speech encoder


@dataclass(frozen=True)
class S2VOptions:
    """What else a person may say about the video.

    Args:
        size: height and width; None chooses by the picture and `max_area`.
        max_area: most pixels; None is that of the checkpoint.
        cover: cut more of the picture off rather than fill up with black.
        pose: a video that shows how to move.
        frames: pictures to make at most; None is as many as the voice lasts.
        clips: clips to make at most.
        opening: "hold" or "cut", see above.
        official_timing: sound 3/16 s late, and pose videos by whole pictures, as the official program has it.
    """

    size: tuple[int, int] | None = None
    max_area: int | None = None
    cover: bool = False
    pose: Path | None = None
    frames: int | None = None
    clips: int | None = None
    opening: str = "hold"
    official_timing: bool = False

    def __post_init__(self) -> None:
        if self.opening not in OPENINGS:
            raise ValueError(f"generate: opening must be one of {', '.join(OPENINGS)}, got {self.opening!r}")
        for name in ("frames", "clips", "max_area"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"generate: {name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Length:
    """How long a video is.

    Args:
        heard: audio frames that clips are made for.
        shown: pictures of the video.
        lead: pictures at its beginning that repeat the first one.
        skip: audio frames that its sound leaves out at the beginning.
    """

    heard: int
    shown: int
    lead: int = 0
    skip: int = 0


def video_length(samples: int, fps: int, clip_frames: int, dropped: int, options: S2VOptions) -> Length:
    """How long the video of a voice is.

    Args:
        samples: of the voice at 16 kHz.
        fps: pictures per second.
        clip_frames: pictures per clip.
        dropped: pictures that the beginning lacks.
    """
    frames = max(-(-samples * fps // SPEECH_RATE), dropped + 1)
    if options.frames is not None:
        frames = min(frames, max(options.frames, dropped + 1))
    if options.clips is not None:
        frames = min(frames, options.clips * clip_frames)
    if not options.official_timing:
        if options.opening == "cut":
            return Length(frames, frames - dropped, skip=dropped)
        return Length(frames, frames, lead=dropped)
    # Officially clips go to the end of the features, and the file ends with the shorter of pictures and sound.
    features = int(((samples - WAV2VEC_WINDOW) // WAV2VEC_HOP + 1) / 50 * 30)
    made = int(features / (clip_frames * 30 / fps)) + 1
    made = (made if options.clips is None else min(made, options.clips)) * clip_frames
    shown = min(frames, made - dropped)
    return Length(shown + dropped, shown)


def video_size(image: Frames, settings: WanS2VSettings, options: S2VOptions) -> tuple[int, int]:
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


def check_request(
    inputs: Inputs, settings: WanS2VSettings, sampling: S2VSampling, options: S2VOptions
) -> tuple[ResolvedSampling, tuple[int, int], PoseVideo | None]:
    """Find what is wrong with a request, without any model.

    Returns:
        The sampling without gaps, height and width of the video, and the pose video.

    Raises:
        UserError: an option is impossible, no size fits, or the pose video is not one.
    """
    return (
        check_sampling(settings, sampling),
        video_size(inputs.image, settings, options),
        pose_video(settings, options),
    )


def check_sampling(settings: WanS2VSettings, sampling: S2VSampling) -> ResolvedSampling:
    """The sampling without gaps.

    Raises:
        UserError: a value is impossible.
    """
    try:
        return sampling.filled(settings)
    except ValueError as error:
        raise UserError(f"{error}.") from error


def pose_video(settings: WanS2VSettings, options: S2VOptions) -> PoseVideo | None:
    """The pose video that was asked for.

    Raises:
        UserError: it is none.
    """
    return None if options.pose is None else PoseVideo(options.pose, settings.fps, options.official_timing)


def make_s2v_video(
    inputs: Inputs,
    checkpoint: WanS2VCheckpoint,
    prompt: str = "",
    sampling: S2VSampling | None = None,
    options: S2VOptions | None = None,
    variant: str = "",
    upscale: int = 1,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
    parallel: Parallel | None = None,
) -> Result:
    """Generate the video and write it. Finished clips are kept beside it until it is complete.

    Args:
        inputs: from `prepare`.
        checkpoint: from `load_checkpoint`.
        prompt: what to show.
        sampling: how to generate.
        options: size, length, pose, timing.
        variant: how the models were changed after loading; clips made with another one are not gone on from.
        upscale: enlarge the pictures so many times.
        progress: called with the number of denoising steps done and of all of them.
        warn: called with a sentence about what was done differently from what may be expected.
        parallel: how several processes share the work. Each calls this with the same inputs; the first alone reads
            and writes files, and only there `progress` and `warn` are called.

    Raises:
        UserError: a file or an option is not good, memory runs out, or the video cannot be written.
        KeyboardInterrupt: with a sentence about what is kept.
        OtherRankError: where something went wrong in another process.
    """
    started = time.monotonic()
    options = S2VOptions() if options is None else options
    parallel = Parallel() if parallel is None else parallel
    team = parallel.team
    if team.rank:
        progress = warn = None
    pipeline, settings = WanS2VPipeline(checkpoint, parallel), checkpoint.settings
    sampling = S2VSampling() if sampling is None else sampling
    filled = check_sampling(settings, sampling)
    size = video_size(inputs.image, settings, options)
    pose: PoseVideo | None = None
    picture, black = fit_picture(inputs.image, size, options.cover)
    if black and warn is not None:
        warn(f"{inputs.image_file}: {black} of the video's rows or columns are black; `--cover` avoids that.")
    length = video_length(len(inputs.sound), settings.fps, filled.clip_frames, filled.dropped, options)

    clips = -(-length.heard // filled.clip_frames)

    def opened() -> ClipStore:
        nonlocal pose
        pose = pose_video(settings, options)
        fingerprint = _fingerprint(inputs, checkpoint, prompt, filled, options, length, size, variant)
        parts = ClipStore(inputs.output, fingerprint, warn)
        if parts.finished and warn is not None:
            warn(f"going on after {parts.finished} of {clips} clips that are finished in {parts.folder}.")
        return parts

    shared = SharedClipStore(opened, team)
    parts = shared.here
    try:
        if shared.finished < clips:
            scene = pipeline.scene(picture, prompt, sampling)
            heard = clips * filled.clip_frames
            features = team.share(lambda: checkpoint.audio_encoder.features(inputs.sound, heard), "cpu")
            shown = None if options.pose is None else _shown(pose, scene, shared.finished, team)
            _make_clips(pipeline, scene, features, length, clips, shown, shared, progress)
        team.first(lambda: None if parts is None else _write(inputs, length, settings.fps, size, upscale, parts))
    except KeyboardInterrupt:
        if parts is None:
            raise
        _stop(parts, clips)
    except torch.OutOfMemoryError as error:
        if parts is not None:
            parts.remove_if_empty()
        raise UserError(
            f"generate: the device has not enough memory for clips of {filled.clip_frames} pictures of "
            f"{size[1]} x {size[0]}; try `--sequential`, a smaller `--max-area` or fewer `--clip-frames`."
        ) from error
    except BaseException:
        if parts is not None:
            parts.remove_if_empty()
        raise
    if pose is not None and warn is not None and 0 < pose.pictures < length.heard:
        warn(f"{options.pose}: ends after {pose.pictures / settings.fps:.2f} s; the rest follows black pictures.")
    if parts is not None:
        parts.remove()
    return Result(inputs.output, length.shown, settings.fps, time.monotonic() - started)


def _make_clips(
    pipeline: WanS2VPipeline,
    scene: VideoConditions,
    features: Tensor,
    length: Length,
    clips: int,
    shown: Iterator[Tensor] | None,
    parts: SharedClipStore,
    progress: Callable[[int, int], None] | None,
) -> None:
    steps, first = scene.sampling.steps, parts.finished
    done = first * steps

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, clips * steps)

    for clip in pipeline.clips(scene, features, length.heard, shown, first, parts.carry(), advance):
        parts.add(lambda clip=clip: to_frames(clip.pictures), clip.carry)  # type: ignore[misc]


def _shown(pose: PoseVideo | None, scene: VideoConditions, first: int, team: Team) -> Iterator[Tensor]:
    """The clips of the pose video from `first` on; it is in the first process."""
    height, width = scene.pixels.shape[3:]
    clips = iter(()) if pose is None else pose.clips(scene.sampling.clip_frames, (height, width), first)
    while True:
        yield team.share(lambda: next(clips), "cpu")


def _stop(parts: ClipStore, clips: int) -> NoReturn:
    """Say what an interrupted run leaves behind."""
    parts.remove_if_empty()
    if not parts.finished:
        raise KeyboardInterrupt from None
    raise KeyboardInterrupt(
        f"interrupted; {parts.finished} of {clips} clips are kept in {parts.folder}; the same command goes on there."
    ) from None


def _write(inputs: Inputs, length: Length, fps: int, size: tuple[int, int], upscale: int, parts: ClipStore) -> None:
    """The video from its finished clips, and the preview."""
    wanted = sample_frames(length.shown, SHEET_PICTURES)
    chosen: list[Frames] = []
    seen = 0
    sound, rate = inputs.sound, SPEECH_RATE
    source: NDArray[np.float32] | Path = inputs.audio_file
    if length.skip:
        source, rate = read_track(inputs.audio_file)
        source = source[round(length.skip * rate / fps) :]
        sound = sound[length.skip * SPEECH_RATE // fps :]
        if not source.size:
            source, sound = np.zeros(1, np.float32), np.zeros(1, np.float32)
    with VideoWriter(inputs.output, fps, size, audio=source, rate=rate, upscale=upscale) as writer:
        for number, pictures in enumerate(parts.pictures()):
            if number == 0 and length.lead:
                pictures = np.concatenate([pictures[:1].repeat(length.lead, axis=0), pictures])
            writer.write(pictures)
            here = wanted[(wanted >= seen) & (wanted < seen + len(pictures))]
            chosen.append(pictures[here - seen])
            seen += len(pictures)
    if inputs.sheet is not None:
        times = [(int(i) + 0.5) / fps for i in wanted]
        preview_sheet(
            np.concatenate(chosen), sound, SPEECH_RATE, fps, {}, inputs.sheet, title=inputs.output.name, times=times
        )


def _digest(*arrays: NDArray[Any]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:32]


def _fingerprint(
    inputs: Inputs,
    checkpoint: WanS2VCheckpoint,
    prompt: str,
    filled: ResolvedSampling,
    options: S2VOptions,
    length: Length,
    size: tuple[int, int],
    variant: str,
) -> dict[str, Any]:
    """What finished clips depend on, by the names that a person knows. What saves memory or time is left out."""
    model = checkpoint.transformer
    files = sorted(path for path in checkpoint.folder.rglob("*") if path.is_file())
    listing = [(str(f.relative_to(checkpoint.folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    pose = None
    if options.pose is not None:
        pose = hashlib.sha256(options.pose.read_bytes()).hexdigest()[:32] + f" {options.official_timing}"
    return {
        "format": 1,
        "image": _digest(inputs.image),
        "audio": _digest(inputs.sound),
        "pose": pose,
        "checkpoint": hashlib.sha256(repr(listing).encode()).hexdigest()[:32],
        "prompt": prompt,
        "negative prompt": filled.negative_prompt,
        "size": list(size),
        "framing": options.cover,
        "length": length.heard,
        "number of clip frames": filled.clip_frames,
        "number of steps": filled.steps,
        "guidance": filled.guidance,
        "shift": filled.shift,
        "solver": filled.solver,
        "seed": filled.seed,
        "beginning": filled.drop_first,
        "colour matching": filled.match_colour,
        "precision": f"{model.dtype} {variant}".strip(),
        "device": model.device.type,
    }
