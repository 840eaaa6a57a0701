# SPDX-License-Identifier: Apache-2.0
"""Videos that every player plays: H.264 in an MP4, written frame by frame, with the given sound beside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from talkingdit.atomic import WholeFile
from talkingdit.errors import UserError
from talkingdit.media.checks import reason_of
from talkingdit.media.growing import OPTIONS, GrowingFile, Pipe
from talkingdit.media.opening import as_target
from talkingdit.media.pictures import add_pictures, to_yuv
from talkingdit.media.sound import SPEECH_RATE
from talkingdit.media.targets import check_writable
from talkingdit.media.track import SoundTrack, open_track


class VideoWriter:
    """Stream frames and one sound track into an MP4 (H.264 yuv420p, index in front), in constant memory.

    The file is written under a temporary name beside the target and renamed by `close`; leaving the `with` block by an
    exception removes it. With `live` it is a fragmented MP4 that plays while it grows, under its name from the first
    fragment on, and an exception leaves what was written, ended properly. The sound starts with the first frame and is
    cut to the length of the video. A sound file is copied as it is, all channels, where an MP4 may hold its codec; it
    is encoded otherwise (see `track.py`). Equal frames and sound give equal files.

        with VideoWriter("out.mp4", fps=16, size=(96, 96), audio=waveform, rate=16000, upscale=4) as video:
            for clip in clips:
                video.write(clip)

    Args:
        path: target; an existing file is replaced.
        fps: frames per second, any positive number.
        size: (height, width) of the frames given to `write`.
        audio: float [samples] mono, or a sound file, or a `track.SoundTrack`, or None for a video without sound.
        rate: of an `audio` array, in Hz; a rate that AAC does not know is resampled.
        upscale: integer factor for small frames.
        resample: "nearest" or "lanczos", used when upscale > 1.
        crf: H.264 quality, lower is better.
        skip: seconds of a sound file that are left out at its beginning.
        live: True, or the descriptor of a pipe that the video goes into instead; `path` is then its name in messages.

    Raises:
        UserError: a side is odd after upscaling (yuv420p needs even ones), an argument is out of range, or the target
            cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float | Fraction,
        size: tuple[int, int],
        audio: np.ndarray | str | os.PathLike[str] | SoundTrack | None = None,
        rate: int = SPEECH_RATE,
        *,
        upscale: int = 1,
        resample: str = "lanczos",
        crf: int = 16,
        skip: float | Fraction = 0,
        live: bool | int = False,
    ) -> None:
        piped = live is not False and live is not True
        self.path = Path(path) if piped else check_writable(path)
        if not fps > 0:
            raise UserError(f"video {str(self.path)!r}: fps must be positive, got {fps}")
        if upscale < 1 or resample not in ("nearest", "lanczos"):
            raise UserError(
                f"video {str(self.path)!r}: expected upscale >= 1 and resample 'nearest' or 'lanczos', "
                f"got {upscale} and {resample!r}"
            )
        self.size = (int(size[0]), int(size[1]))
        self.upscale, self.resample = int(upscale), resample
        height, width = (side * self.upscale for side in self.size)
        if height < 2 or width < 2 or height % 2 or width % 2:
            raise UserError(
                f"video {str(self.path)!r}: height and width must be even and positive, got {height} x {width}"
            )
        self.frames = 0
        self._fps = Fraction(fps).limit_denominator(1001)
        self._sound: SoundTrack | None = None
        if isinstance(audio, SoundTrack):
            self._sound = audio
        elif audio is not None:
            self._sound = open_track(audio, int(rate), Fraction(skip), self.path)
        self._live = live is not False
        self._over = False
        self._open(int(live) if piped else None, (height, width), crf)

    def _open(self, descriptor: int | None, size: tuple[int, int], crf: int) -> None:
        """The container with its streams, at its target."""
        import av

        target: Any
        try:
            if not self._live:
                self._whole = WholeFile(self.path, prefix=f".{self.path.stem[:40]}.", suffix=".part")
                target, options = as_target(self._whole.path), {"movflags": "+faststart"}
            else:
                self._growing = GrowingFile(self.path) if descriptor is None else Pipe(descriptor)
                target, options = self._growing, OPTIONS
        except OSError as error:
            raise UserError(f"video {str(self.path)!r}: could not be written ({reason_of(error)})") from None
        try:
            self._container = av.open(target, "w", format="mp4", options=options)
            self._video = add_pictures(self._container, self._fps, size, crf, live=self._live)
            if self._sound is not None:
                self._sound.add_to(self._container)
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        if self._live:
            self._growing.close()
        else:
            self._whole.abort()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, frames: np.ndarray) -> None:
        """Append one frame, uint8 [H, W, 3] RGB of the size given at the beginning, or several, [n, H, W, 3].

        Raises:
            ValueError: another dtype or shape.
            UserError: the disk is full or the file cannot be written.
        """
        batch = frames if frames.ndim == 4 else frames[None]
        if frames.dtype != np.uint8 or batch.ndim != 4 or batch.shape[1:] != (*self.size, 3):
            raise ValueError(
                f"VideoWriter: frames must be uint8 {(*self.size, 3)} or a batch of such, "
                f"got {frames.dtype} {tuple(frames.shape)}"
            )
        for frame in batch:
            self._write_one(frame)

    def _write_one(self, frame: np.ndarray) -> None:
        shown = to_yuv(self._enlarge(frame))
        shown.pts, shown.time_base = self.frames, 1 / self._fps
        self.frames += 1
        with self._writing():
            self._container.mux(self._video.encode(shown))
            if self._sound is not None:
                self._sound.send(self.frames / self._fps, last=False)
            self._pass_on()

    def _pass_on(self) -> None:
        if self._live:
            self._growing.pass_on()

    def close(self) -> None:
        """Finish the file and move it to its name.

        Raises:
            UserError: no frame was written, or the file cannot be written; nothing is left behind then.
        """
        if self.frames == 0:
            self.abort()
            raise UserError(f"video {str(self.path)!r}: expected at least one frame, got none")
        try:
            with self._writing():
                self._end()
                if self._live:
                    self._growing.close()
                else:
                    self._whole.finish()
        except BaseException:  # also an interruption
            self.abort()
            raise
        self._over = True

    def _end(self) -> None:
        """What the encoders still hold, and the index."""
        self._container.mux(self._video.encode(None))
        if self._sound is not None:
            self._sound.send(self.frames / self._fps, last=True)
            self._sound.close()
        self._container.close()
        self._pass_on()

    def hurry(self) -> None:
        """Wait no longer for a reader that reads nothing (`Pipe.hurry`); said from any thread while another writes."""
        if self._live:
            self._growing.hurry()

    def abort(self) -> None:
        """Give up: remove what was written so far, and an older file at the target stays; end it where it is live."""
        import av

        if self._over:
            return
        self.hurry()
        try:
            if self._live and self.frames:
                with contextlib.suppress(av.FFmpegError, OSError, ValueError):
                    self._end()
            with contextlib.suppress(av.FFmpegError, OSError, ValueError):
                self._container.close()
            if self._sound is not None:
                self._sound.close()
        finally:  # a second interruption leaves no more behind than the first
            self._release()
            self._over = True

    def _enlarge(self, frame: np.ndarray) -> np.ndarray:
        if self.upscale == 1:
            return frame
        if self.resample == "nearest":
            return frame.repeat(self.upscale, axis=0).repeat(self.upscale, axis=1)
        from PIL import Image

        size = (self.size[1] * self.upscale, self.size[0] * self.upscale)
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn trouble with the file into one sentence, and leave nothing half-written."""
        import av

        try:
            yield
        except (av.FFmpegError, OSError) as error:
            self.abort()
            raise UserError(f"video {str(self.path)!r}: could not be written ({reason_of(error)})") from None
