# SPDX-License-Identifier: Apache-2.0
"""The road of a video job, from files to a file, the same for every family.

    read inputs -> outline -> encode -> denoise and decode, clip by clip -> write
    inputs.py      family     family    long_video.py, family               write.py

Every clip is written as soon as it is decoded; a live video can be watched while it is made. Where a model's clips do
not need the frames of those before, they are decoded and written aside, while the next one is denoised (`aside.py`).

Each stage takes and gives one small frozen object. Around the road, not in it: finished clips are kept beside the
output and an interrupted job goes on after them (`resume.py`), and the processes of torchrun share the work, of which
rank 0 alone reads and writes files and tells (`distributed`).
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from talkingdit.autoencoders.streaming import to_frames
from talkingdit.distributed.team import Team
from talkingdit.encoders.speech import Sound, pieces
from talkingdit.errors import UserError
from talkingdit.lock import alone
from talkingdit.media.sound import SPEECH_RATE
from talkingdit.pipelines.aside import Aside, half_of_the_threads
from talkingdit.pipelines.inputs import Inputs, Outline, check_heard
from talkingdit.pipelines.live import LiveSound
from talkingdit.pipelines.long_video import ClipPipeline, DenoisedClip, StepDone, generate_denoised
from talkingdit.pipelines.memory import out_of_memory
from talkingdit.pipelines.resume import ClipStore, NoStore, SharedClipStore, WatchedOnly
from talkingdit.pipelines.write import PreviewCurves, ShownFrames, VideoSink


@dataclass(frozen=True)
class Result:
    """What was made."""

    path: Path
    frames: int
    fps: int | Fraction
    took: float  # seconds
    first_after: float | None = None  # seconds until the first frames of a live video were written

    @property
    def seconds(self) -> float:
        return float(self.frames / self.fps)


@dataclass(frozen=True, kw_only=True)
class Talk:
    """How a job tells how it goes. Only rank 0 does.

    Args:
        progress: called with the number of denoising steps done and of all of them.
        warn: called with a sentence about what was done differently from what may be expected.
        step: called after every denoising step with its number, timestep and latents, see `StepDone`; gives those to go
            on from.
    """

    progress: Callable[[int, int], None] | None = None
    warn: Callable[[str], None] | None = None
    step: StepDone | None = None

    def say(self, sentences: tuple[str, ...]) -> None:
        for sentence in sentences:
            if self.warn is not None:
                self.warn(sentence)


class Interrupted(Exception):
    """The work is stopped after a denoising step; `Talk.step` raises it.

    Attributes:
        kept: gives the frames [n, H, W, 3] of the clips that are kept beside the video to be written.
        place: where they are, in words.
    """

    kept: Callable[[], Iterator[NDArray[np.uint8]]] = staticmethod(lambda: iter(()))
    place = "nothing is kept"


def make_video(
    inputs: Inputs,
    outline: Outline,
    pipeline: ClipPipeline,
    *,
    curves: PreviewCurves | None = None,
    talk: Talk | None = None,
    variant: str = "",
) -> Result:
    """Generate the video and write it. Finished clips are kept beside it until it is complete.

    Where several processes share the work (`pipeline.parallel`), each calls this with the same arguments.

    Args:
        inputs: from `read_inputs`.
        outline: from the family's `outline`.
        pipeline: of the family.
        curves: what the preview shows besides frames and sound.
        talk: progress and warnings.
        variant: how the models were changed after loading; clips made with another one are not gone on from.

    Raises:
        UserError: a file is not good, memory runs out, the video cannot be written, or another run makes one of the
            results.
        KeyboardInterrupt: with a sentence about what is kept.
        OtherRankError: where something went wrong on another rank.
    """
    started = time.monotonic()
    team = pipeline.parallel.team
    talk = Talk() if talk is None or team.rank else talk
    talk.say((*outline.warnings, *pipeline.warnings(inputs, outline)))
    check_heard(inputs.job, outline)
    with _alone(inputs, outline, team):
        store = _open_store(inputs, outline, pipeline, talk, variant)
        with _kept(store, outline), _shown(inputs, outline, curves, started, store) as shown:
            with _in_memory(outline.when_too_large), _aside(pipeline) as aside:
                _make_clips(pipeline, inputs, outline, store, talk, shown, aside)
            frames, first_after = team.on_rank_0(shown.finish)
            store.remove()
    took = time.monotonic() - started
    return Result(inputs.job.output, frames, outline.fps, took, first_after if inputs.job.live else None)


def _make_clips(
    pipeline: ClipPipeline,
    inputs: Inputs,
    outline: Outline,
    store: SharedClipStore,
    talk: Talk,
    shown: _Shown,
    aside: Aside,
) -> None:
    """Denoise the clips that are not finished yet, and have each decoded, written and kept."""
    awaited = inputs.job.live and not store.finished
    try:
        for clip in _made(pipeline, inputs, outline, store, talk, aside):
            if awaited:  # by who watches: the first frames are not decoded beside the next clip
                aside.wait()
                store.team.on_rank_0(functools.partial(shown.show, next(clip.pieces)))
                awaited = False
            aside.do(functools.partial(_finish, clip, shown, store, aside))
        aside.wait()
    except BaseException:  # before anybody waits for what is done aside, which may be waiting for who watches
        if shown.sink is not None:
            shown.sink.hurry()
        raise


@contextmanager
def _aside(pipeline: ClipPipeline) -> Iterator[Aside]:
    """What decodes and writes clips: a thread of its own where a processor computes, this process alone, and no clip
    needs the frames of the one before. A device would gain nothing, and need memory for both at once."""
    later = getattr(pipeline, "decodes_later", False)
    alone = pipeline.parallel.team.size == 1 and pipeline.checkpoint.transformer.device.type == "cpu"
    with half_of_the_threads() if later else nullcontext(1) as threads, Aside(later and alone and threads > 1) as aside:
        yield aside


def _finish(clip: DenoisedClip, shown: _Shown, store: SharedClipStore, aside: Aside) -> None:
    """Decode a clip, write its frames into the video and keep it."""
    for piece in clip.pieces:
        if aside.given_up:
            return
        store.team.on_rank_0(functools.partial(shown.show, piece))
    store.add(shown.of_clip, clip.carry)


def final_frames(
    inputs: Inputs, outline: Outline, pipeline: ClipPipeline, talk: Talk | None = None, *, in_pieces: bool = False
) -> Iterator[NDArray[np.uint8]]:
    """The frames of a video as they become final; nothing is written.

    Args:
        inputs, outline, pipeline, talk: as of `make_video`; one process alone.
        in_pieces: as they are decoded, where the pipeline tells them, not clip by clip.

    Yields:
        uint8 [n, H, W, 3], n > 0; together what `make_video` would write, before it is enlarged.

    Raises:
        UserError: memory runs out.
    """
    talk = Talk() if talk is None else talk
    talk.say((*outline.warnings, *pipeline.warnings(inputs, outline)))
    check_heard(inputs.job, outline)
    shown = ShownFrames(inputs, outline)
    for clip in _made(pipeline, inputs, outline, SharedClipStore(NoStore), talk, Aside(False)):
        for video in clip.pieces if in_pieces else (clip.whole().frames,):
            if len(frames := shown.of(to_frames(video))):
                yield frames


def _made(
    pipeline: ClipPipeline,
    inputs: Inputs,
    outline: Outline,
    store: SharedClipStore,
    talk: Talk,
    aside: Aside,
) -> Iterator[DenoisedClip]:
    """The clips that are not finished yet, from what all clips share on."""
    if store.finished >= outline.clips:
        if again := getattr(pipeline, "write_beside", None):
            again(outline, store.carry)
        return
    with _in_memory("what all clips share: the portrait, the words and the voice"):
        conditions = pipeline.encode(inputs, outline)
    with _in_memory(outline.when_too_large):
        if aside.really:
            aside.do(functools.partial(pipeline.get_ready_to_decode, conditions, store.finished, store.carry))
        yield from _clips(pipeline, conditions, inputs, outline, store, talk, aside.check)
    talk.say(pipeline.remarks(conditions, outline))


def _clips(
    pipeline: ClipPipeline,
    conditions: Any,
    inputs: Inputs,
    outline: Outline,
    store: SharedClipStore,
    talk: Talk,
    check: Callable[[], None],
) -> Iterator[DenoisedClip]:
    """The clips that are not finished yet, with progress."""
    work = outline.work or (outline.steps,) * outline.clips
    done, total = sum(work[: store.finished]), sum(work)
    spoken, team = inputs.job.spoken, pipeline.parallel.team

    def advance(step: int = -1, timestep: float | Tensor = 0.0, latents: Tensor | None = None) -> Tensor | None:
        nonlocal done
        check()
        done += 1
        if talk.progress is not None:
            talk.progress(done, -(-done // outline.steps) * outline.steps if spoken else total)
        return latents if talk.step is None else talk.step(step, timestep, latents)

    def known(index: int) -> int:
        return team.on_rank_0(lambda: _clips_known(inputs.sound, outline, index, check))

    count = known if spoken else outline.clips
    return generate_denoised(pipeline, conditions, count, store.finished, store.carry, advance)


def _clips_known(sound: Sound, outline: Outline, index: int, check: Callable[[], None]) -> int:
    """How many clips a voice that is being spoken takes, once its sound for clip `index` is there."""
    assert isinstance(sound, LiveSound)
    last = -(-((index + 1) * outline.clip_frames + outline.overlap_frames) * SPEECH_RATE // outline.fps)
    there = sound.wait(last + 1, check)
    if there > last:
        return outline.clips
    frames = -(-there * outline.fps // SPEECH_RATE)
    return min(outline.clips, max(1, -(-(frames - outline.overlap_frames) // outline.clip_frames)))


# ---- The video, beside the road --------------------------------------------------------------------------------------


class _Shown:
    """The video of a job on rank 0, which grows with the clips."""

    def __init__(self, inputs: Inputs, outline: Outline, store: SharedClipStore) -> None:
        self._inputs, self._outline, self._store = inputs, outline, store
        self.sink: VideoSink | None = None
        self._pieces: list[NDArray[np.uint8]] = []  # of the clip that is being decoded

    def open(self, curves: PreviewCurves | None, started: float) -> None:
        """Begin with what an earlier run has made."""
        self.sink = VideoSink(self._inputs, self._outline, curves, started)
        for frames in self._store.local.frames():
            self.sink.add(frames)

    def show(self, video: Tensor) -> None:
        """The next frames [1, 3, n, H, W] of a clip."""
        assert self.sink is not None
        self._pieces.append(to_frames(video))
        self.sink.add(self._pieces[-1])

    def of_clip(self) -> NDArray[np.uint8]:
        """What was shown since this was asked for the last time, [n, H, W, 3]."""
        pieces, self._pieces = self._pieces, []
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def finish(self) -> tuple[int, float | None]:
        """End the video -> its frames, and seconds until the first ones were written."""
        assert self.sink is not None
        self.sink.finish()
        return self.sink.seen, self.sink.first_after


@contextmanager
def _shown(
    inputs: Inputs, outline: Outline, curves: PreviewCurves | None, started: float, store: SharedClipStore
) -> Iterator[_Shown]:
    """See `_Shown`. An error leaves a live video that plays as far as it was made, and no other.

    Raises:
        KeyboardInterrupt: with a sentence where such a video is all that is kept.
    """
    shown, job = _Shown(inputs, outline, store), inputs.job
    try:
        store.team.on_rank_0(lambda: shown.open(curves, started))
        yield shown
    except BaseException as error:
        if shown.sink is not None:
            shown.sink.abort()
            alone = job.live and store.folder is None and shown.sink.seen > 0
            if alone and isinstance(error, KeyboardInterrupt) and not str(error):
                place = "the pipe" if job.pipe is not None else job.output
                raise KeyboardInterrupt(f"interrupted; {place} has the video as far as it was made.") from None
        raise


# ---- Resume, around the road -----------------------------------------------------------------------------------------


@contextmanager
def _alone(inputs: Inputs, outline: Outline, team: Team) -> Iterator[None]:
    """No other run writes what is made beside the video, whose own lock lies with its clips.

    Raises:
        UserError: another run is about to.
    """
    sheet = inputs.job.sheet
    with ExitStack() as held:

        def take() -> None:
            held.enter_context(alone([*outline.beside, *([] if sheet is None else [sheet])], "talkingdit generate"))

        team.on_rank_0(take)
        yield


def _open_store(inputs: Inputs, outline: Outline, pipeline: ClipPipeline, talk: Talk, variant: str) -> SharedClipStore:
    """The finished clips of an earlier run of this job, or an empty store."""

    def opened() -> ClipStore | NoStore:
        if inputs.job.pipe is not None:
            return NoStore()
        if inputs.job.spoken:
            return WatchedOnly(inputs.job.output)
        store = ClipStore(
            inputs.job.output, _fingerprint(inputs, outline, pipeline, variant), talk.warn, inputs.job.resume
        )
        if store.finished:
            talk.say(
                (f"going on after {store.finished} of {outline.clips} clips that are finished in {store.folder}.",)
            )
        return store

    return SharedClipStore(opened, pipeline.parallel.team)


@contextmanager
def _kept(store: SharedClipStore, outline: Outline) -> Iterator[None]:
    """What is left behind where a job does not come to its end: finished clips, or nothing."""
    try:
        yield
    except KeyboardInterrupt:
        store.remove_if_empty()
        if not store.finished or store.folder is None:
            raise
        raise KeyboardInterrupt(f"interrupted; {_where(store, outline)}; the same command goes on there.") from None
    except Interrupted as stop:
        store.remove_if_empty()
        if store.finished and store.folder is not None:
            stop.kept, stop.place = store.local.frames, _where(store, outline)
        raise
    except BaseException:
        store.remove_if_empty()
        raise
    finally:
        store.close()


def _where(store: SharedClipStore, outline: Outline) -> str:
    return f"{store.finished} of {outline.clips} clips are kept in {store.folder}"


@contextmanager
def _in_memory(what: str) -> Iterator[None]:
    """Say in a sentence what memory is too small for.

    Raises:
        UserError: it is.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"generate: the device has not enough memory for {what}.") from error


def _fingerprint(inputs: Inputs, outline: Outline, pipeline: ClipPipeline, variant: str) -> dict[str, Any]:
    """What finished clips depend on, by names that a person knows. What saves memory or time is left out."""
    checkpoint = pipeline.checkpoint
    model, folder = checkpoint.transformer, checkpoint.folder
    listing = sorted(_listing(folder))
    return {
        "format": 2,
        "image": _digest(inputs.image),
        "audio": _digest_of_sound(inputs.sound),
        "checkpoint": hashlib.sha256(repr(listing).encode()).hexdigest()[:32],
        "prompt": inputs.job.prompt,
        "size": list(outline.size),
        **outline.settings,
        "precision": f"{model.dtype} {variant}".strip(),
        "device": model.device.type,
    }


def _listing(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Files of a checkpoint with sizes and times. Hidden ones, of file systems, downloads and locks, are none of it."""
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts) and file.is_file():
            yield str(name), file.stat().st_size, file.stat().st_mtime_ns


def _digest(array: NDArray[Any]) -> str:
    found = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()[:32]


def _digest_of_sound(sound: Sound) -> str:
    """As of an array of all samples."""
    found = hashlib.sha256(f"{np.dtype(np.float32)}{(len(sound),)}".encode())
    for piece in pieces(sound):
        found.update(np.ascontiguousarray(piece).data)
    return found.hexdigest()[:32]
