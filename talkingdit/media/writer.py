# SPDX-License-Identifier: Apache-2.0
"""Videos that every player plays: H.264 and AAC in an MP4, written frame by frame."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import numpy as np

from talkingdit.atomic import WholeFile
from talkingdit.errors import UserError
from talkingdit.media.checks import existing_file, reason_of
from talkingdit.media.opening import as_target
from talkingdit.media.pictures import add_pictures, to_yuv
from talkingdit.media.sound import SPEECH_RATE, decode_audio
from talkingdit.media.targets import check_writable

AAC_FRAME = 1024  # samples of one AAC packet, and the encoder's priming
AAC_RATES = (SPEECH_RATE, 22050, 24000, 32000, 44100, 48000)


class VideoWriter:
    """Stream frames and one sound track into an MP4 (H.264 yuv420p + AAC, index in front), in constant memory.

    The file is written under a temporary name beside the target and renamed by `close`; leaving the `with` block by an
    exception removes it. The sound starts with the first frame and is cut, or filled with silence, to the length of
    the video. Equal frames and sound give equal files.

        with VideoWriter("out.mp4", fps=16, size=(96, 96), audio=waveform, rate=16000, upscale=4) as video:
            for clip in clips:
                video.write(clip)

    Args:
        path: target; an existing file is replaced.
        fps: frames per second, any positive number.
        size: (height, width) of the frames given to `write`.
        audio: float [samples] mono, or a sound file, whose own rate is kept, or None for a video without sound.
        rate: of an `audio` array, in Hz; a rate that AAC does not know is resampled.
        upscale: integer factor for small frames.
        resample: "nearest" or "lanczos", used when upscale > 1.
        crf: H.264 quality, lower is better.

    Raises:
        UserError: a side is odd after upscaling (yuv420p needs even ones), an argument is out of range, or the target
            cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float,
        size: tuple[int, int],
        audio: np.ndarray | str | os.PathLike[str] | None = None,
        rate: int = SPEECH_RATE,
        upscale: int = 1,
        resample: str = "lanczos",
        crf: int = 16,
    ) -> None:
        import av

        self.path = check_writable(path)
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
        self._audio: np.ndarray | None = None
        if isinstance(audio, (str, os.PathLike)):
            audio, rate = decode_audio(existing_file(audio, "audio"))
        if audio is not None:
            self._audio, rate = _prepare_track(audio, int(rate), self.path)
        self._rate, self._sent = rate, 0
        try:
            self._whole = WholeFile(self.path, prefix=f".{self.path.stem[:40]}.", suffix=".part")
        except OSError as error:
            raise UserError(f"video {str(self.path)!r}: could not be written ({reason_of(error)})") from None
        try:
            self._container = av.open(
                as_target(self._whole.path), "w", format="mp4", options={"movflags": "+faststart"}
            )
            self._video = add_pictures(self._container, self._fps, (height, width), crf)
            self._sound = None
            if self._audio is not None:
                sound = self._container.add_stream("aac", rate=self._rate)
                sound.layout, sound.format, sound.bit_rate = "mono", "fltp", 128_000
                self._sound = sound
        except BaseException:
            self._whole.abort()
            raise

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
            self._send_audio(self.frames, last=False)

    def close(self) -> None:
        """Finish the file and move it to its name.

        Raises:
            UserError: no frame was written, or the file cannot be written; nothing is left behind then.
        """
        if self.frames == 0:
            self.abort()
            raise UserError(f"video {str(self.path)!r}: expected at least one frame, got none")
        with self._writing():
            self._container.mux(self._video.encode(None))
            if self._sound is not None:
                self._send_audio(self.frames, last=True)
                self._container.mux(self._sound.encode(None))
            self._container.close()
            self._whole.finish()

    def abort(self) -> None:
        """Give up: remove what was written so far; an older file at the target stays."""
        import av

        with contextlib.suppress(av.FFmpegError, OSError, ValueError):
            self._container.close()
        self._whole.abort()

    def _enlarge(self, frame: np.ndarray) -> np.ndarray:
        if self.upscale == 1:
            return frame
        if self.resample == "nearest":
            return frame.repeat(self.upscale, axis=0).repeat(self.upscale, axis=1)
        from PIL import Image

        size = (self.size[1] * self.upscale, self.size[0] * self.upscale)
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))

    def _send_audio(self, frames: int, last: bool) -> None:
        """Encode the sound up to the end of video frame `frames`, in whole AAC packets unless it is the last."""
        import av

        if self._audio is None or self._sound is None:
            return
        end = round(frames * self._rate / self._fps)
        while self._sent < end and (last or end - self._sent >= AAC_FRAME):
            count = min(AAC_FRAME, end - self._sent)
            chunk = self._audio[self._sent : self._sent + count]
            chunk = np.pad(chunk, (0, count - len(chunk)))
            piece = av.AudioFrame.from_ndarray(chunk[None], format="fltp", layout="mono")
            piece.sample_rate, piece.pts, piece.time_base = self._rate, self._sent, Fraction(1, self._rate)
            self._container.mux(self._sound.encode(piece))
            self._sent += count

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn trouble with the file into one sentence, and leave nothing half-written."""
        import av

        try:
            yield
        except (av.FFmpegError, OSError) as error:
            self.abort()
            raise UserError(f"video {str(self.path)!r}: could not be written ({reason_of(error)})") from None


def _prepare_track(audio: np.ndarray, rate: int, path: Path) -> tuple[np.ndarray, int]:
    """The sound as AAC takes it: float32 within -1..1, at a rate the codec knows."""
    samples = np.asarray(audio, dtype=np.float32)
    if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
        raise UserError(f"video {str(path)!r}: audio must be finite [samples] and not empty, got shape {samples.shape}")
    if rate < 1:
        raise UserError(f"video {str(path)!r}: the rate of the audio must be positive, got {rate}")
    if rate not in AAC_RATES:
        import soxr

        target = next((r for r in AAC_RATES if r > rate), AAC_RATES[-1])
        samples, rate = soxr.resample(samples, rate, target), target
    return np.clip(samples, -1.0, 1.0), rate
