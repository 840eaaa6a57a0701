# SPDX-License-Identifier: Apache-2.0
"""Sound, pictures and video files: read what people have, write what every player plays.

Everything a user may hand over is checked here, and every complaint is a `UserError` of one sentence.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from talkingdit.errors import UserError

SPEECH_RATE = 16000  # Hz, of every waveform that enters a speech encoder
SILENCE_PEAK = 1e-4  # -80 dBFS
SHORTEST_AUDIO = 0.1  # seconds; less is not speech
AAC_FRAME = 1024  # samples of one AAC packet, and the encoder's priming
LARGEST_IMAGE = 100_000_000  # pixels
SEEK_MARGIN = 0.5  # seconds before a part at which decoding begins: codecs need a packet or two to settle


def read_audio(
    path: str | os.PathLike[str], rate: int = SPEECH_RATE, start: float = 0.0, seconds: float | None = None
) -> np.ndarray:
    """Read any sound file (WAV, FLAC, MP3, OGG, M4A, or the sound of a video) as mono at the given rate.

    Args:
        path: the file.
        rate: samples per second.
        start, seconds: only this part of it; less where it ends before. No more than that is decoded.

    Returns:
        float32 [samples]; channels are averaged, the beginning of the file, or of the part, is sample 0.

    Raises:
        UserError: no such file, empty, not a sound file, shorter than 0.1 s, not finite, or silent.
    """
    source = _existing_file(path, "audio")
    samples, found = _decode_audio(source, start, seconds)
    if samples.size == 0:
        raise UserError(f"audio {str(source)!r}: expected sound, got a file without samples")
    if not np.isfinite(samples).all():
        raise UserError(f"audio {str(source)!r}: expected finite samples, got NaN or infinity")
    if len(samples) < SHORTEST_AUDIO * found:
        raise UserError(
            f"audio {str(source)!r}: expected at least {SHORTEST_AUDIO} s, got {len(samples) / found:.3f} s"
        )
    if float(np.abs(samples).max()) < SILENCE_PEAK:
        raise UserError(f"audio {str(source)!r}: expected speech, got {len(samples) / found:.1f} s of silence")
    if found != rate:
        import soxr

        samples = soxr.resample(samples, found, rate)
    return np.ascontiguousarray(samples, dtype=np.float32)


def read_track(path: str | os.PathLike[str]) -> tuple[np.ndarray, int]:
    """A sound file as it is: float32 [samples] mono at its own rate, and that rate in Hz.

    Raises:
        UserError: no such file, empty, or not a sound file.
    """
    return _decode_audio(_existing_file(path, "audio"))


def _decode_audio(source: Path, start: float = 0.0, seconds: float | None = None) -> tuple[np.ndarray, int]:
    """Samples [n] float32 mono at the file's own rate, and that rate."""
    import soundfile

    # soundfile reads WAV, FLAC, OGG and MP3 exactly from the first sample; FFmpeg knows the rest.
    try:
        with soundfile.SoundFile(source) as file:
            rate = int(file.samplerate)
            first = min(round(start * rate), file.frames)
            before = file.seek(max(0, first - round(SEEK_MARGIN * rate)))
            count = -1 if seconds is None else first - before + round(seconds * rate)
            data = file.read(count, dtype="float32", always_2d=True)[first - before :]
        return data.mean(axis=1), rate
    except soundfile.LibsndfileError:
        return _decode_audio_with_av(source, start, seconds)


def _frames_from(container: Any, stream: Any, start: float) -> Iterator[Any]:
    """Frames of a track from a little before `start` seconds on; all of them where a file cannot be searched."""
    if start > SEEK_MARGIN:
        container.seek(int((start - SEEK_MARGIN) * 1e6))
        frames = container.decode(stream)
        frame = next(frames, None)
        if frame is not None and frame.time is not None and frame.time <= start:
            yield frame
            yield from frames
            return
        container.seek(0)
    yield from container.decode(stream)


def _decode_audio_with_av(source: Path, start: float = 0.0, seconds: float | None = None) -> tuple[np.ndarray, int]:
    import av

    try:
        with av.open(str(source)) as container:
            if not container.streams.audio:
                raise UserError(f"audio {str(source)!r}: expected a sound file, got a file without an audio stream")
            stream = container.streams.audio[0]
            rate = int(stream.rate)
            resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
            parts: list[np.ndarray] = []
            begins: float | None = None
            first = round(start * rate)
            end = None if seconds is None else first + round(seconds * rate)
            for frame in _frames_from(container, stream, start):
                if begins is None:
                    begins = frame.time or 0.0
                parts += [part.to_ndarray().reshape(-1) for part in resampler.resample(frame)]
                if end is not None and frame.time is not None and round(frame.time * rate) >= end:
                    break
            parts += [part.to_ndarray().reshape(-1) for part in resampler.resample(None)]
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"audio {str(source)!r}: expected a WAV, FLAC, MP3 or OGG file, got one that cannot be decoded "
            f"({_reason(error)})"
        ) from None
    samples = np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32)
    # Priming samples carry a time before zero, late streams one after it: sample 0 is time `start` either way.
    offset = round((begins or 0.0) * rate) - first
    samples = samples[-offset:] if offset < 0 else np.pad(samples, (offset, 0))
    return (samples if end is None else samples[: end - first]), rate


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a picture upright (EXIF orientation applied), transparency over white.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        UserError: no such file, empty, not a picture, truncated, or more than 100 million pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    source = _existing_file(path, "image")
    try:
        with Image.open(source) as opened:
            if opened.width * opened.height > LARGEST_IMAGE:
                raise UserError(
                    f"image {str(source)!r}: expected at most {LARGEST_IMAGE // 1_000_000} million pixels, "
                    f"got {opened.width} x {opened.height}"
                )
            opened.load()
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I;16"):  # 16-bit greys would be clipped, not scaled
                grey = (np.asarray(picture, dtype=np.uint32) // 257).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            rgba = picture.convert("RGBA")
    except UnidentifiedImageError:
        raise UserError(f"image {str(source)!r}: expected a picture (PNG, JPEG, WebP), got {_kind(source)}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"image {str(source)!r}: expected a whole picture, got one that cannot be decoded ({_reason(error)})"
        ) from None
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return np.array(Image.alpha_composite(white, rgba).convert("RGB"))


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Make sure, before any long work, that a file can be written at `path`; leaves nothing behind.

    Returns:
        The path. An existing file there is not touched.

    Raises:
        UserError: the folder does not exist or does not let files be made, or `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise UserError(f"output {str(target)!r}: expected the name of a file, got a folder")
    folder = target.parent
    if not folder.is_dir():
        raise UserError(f"output {str(target)!r}: expected an existing folder, got {str(folder)!r}, which is none")
    try:
        handle, probe = tempfile.mkstemp(prefix=f".{target.name[:40]}.", dir=folder)
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise UserError(
            f"output {str(target)!r}: expected a folder that can be written to, got {str(folder)!r} ({_reason(error)})"
        ) from None
    if target.exists() and not os.access(target, os.W_OK):
        raise UserError(f"output {str(target)!r}: expected a file that may be replaced, got a write-protected one")
    return target


class VideoWriter:
    """Stream frames and one sound track into an MP4 (H.264 yuv420p + AAC, index in front), in constant memory.

    The file is written under a temporary name beside the target and renamed by `close`; leaving the `with` block by an
    exception removes it. The sound starts with the first frame and is cut, or filled with silence, to the length of
    the video.

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
            audio, rate = _decode_audio(_existing_file(audio, "audio"))
        if audio is not None:
            self._audio, rate = _prepare_track(audio, int(rate), self.path)
        self._rate, self._sent = rate, 0
        handle, name = tempfile.mkstemp(prefix=f".{self.path.stem[:40]}.", suffix=".part", dir=self.path.parent)
        os.close(handle)
        self._temporary = Path(name)
        try:
            self._container = av.open(name, "w", format="mp4", options={"movflags": "+faststart"})
            video = self._container.add_stream("libx264", rate=self._fps)
            video.height, video.width, video.pix_fmt = height, width, "yuv420p"
            video.options = {"crf": str(crf), "preset": "medium"}
            # Say which matrix the conversion below uses, or players guess it from the size.
            video.codec_context.colorspace = 5  # BT.601, FFmpeg's default for RGB to YUV
            video.codec_context.color_range = 1
            self._video = video
            self._sound = None
            if self._audio is not None:
                sound = self._container.add_stream("aac", rate=self._rate)
                sound.layout, sound.format, sound.bit_rate = "mono", "fltp", 128_000
                self._sound = sound
        except BaseException:
            self._temporary.unlink(missing_ok=True)
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
        import av

        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(self._enlarge(frame)), format="rgb24")
        picture.pts, picture.time_base = self.frames, 1 / self._fps
        self.frames += 1
        with self._writing():
            self._container.mux(self._video.encode(picture))
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
            # mkstemp makes private files; give the result the rights any new file would have.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(self._temporary, 0o666 & ~umask)
            os.replace(self._temporary, self.path)

    def abort(self) -> None:
        """Give up: remove what was written so far; an older file at the target stays."""
        import av

        with contextlib.suppress(av.FFmpegError, OSError, ValueError):
            self._container.close()
        self._temporary.unlink(missing_ok=True)

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
            raise UserError(f"video {str(self.path)!r}: could not be written ({_reason(error)})") from None


def read_video(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray | None, float, int]:
    """Read a whole video into memory.

    Returns:
        frames uint8 [F, H, W, 3] RGB; sound float32 [samples] mono from the time of frame 0 on, or None; frames per
        second; rate of the sound in Hz (0 without sound).

    Raises:
        UserError: no such file, or not a video.
    """
    import av

    source = _existing_file(path, "video")
    try:
        with av.open(str(source)) as container:
            if not container.streams.video:
                raise UserError(f"video {str(source)!r}: expected a video, got a file without a video stream")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.base_rate or 0)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            has_sound = bool(container.streams.audio)
    except av.FFmpegError as error:
        raise UserError(
            f"video {str(source)!r}: expected a video, got a file that cannot be decoded ({_reason(error)})"
        ) from None
    if not frames:
        raise UserError(f"video {str(source)!r}: expected a video, got a file without frames")
    audio, rate = _decode_audio_with_av(source) if has_sound else (None, 0)
    return np.stack(frames), audio, fps, rate


def _prepare_track(audio: np.ndarray, rate: int, path: Path) -> tuple[np.ndarray, int]:
    """The sound as AAC takes it: float32 within -1..1, at a rate the codec knows."""
    samples = np.asarray(audio, dtype=np.float32)
    if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
        raise UserError(f"video {str(path)!r}: audio must be finite [samples] and not empty, got shape {samples.shape}")
    if rate < 1:
        raise UserError(f"video {str(path)!r}: the rate of the audio must be positive, got {rate}")
    known = (SPEECH_RATE, 22050, 24000, 32000, 44100, 48000)
    if rate not in known:
        import soxr

        target = next((r for r in known if r > rate), known[-1])
        samples, rate = soxr.resample(samples, rate, target), target
    return np.clip(samples, -1.0, 1.0), rate


def _existing_file(path: str | os.PathLike[str], what: str) -> Path:
    source = Path(path)
    if source.is_dir():
        raise UserError(f"{what} {str(source)!r}: expected a file, got a folder")
    if not source.is_file():
        raise UserError(f"{what} {str(source)!r}: expected an existing file, got none of this name")
    if not os.access(source, os.R_OK):
        raise UserError(f"{what} {str(source)!r}: expected a readable file, got one without permission to read")
    if source.stat().st_size == 0:
        raise UserError(f"{what} {str(source)!r}: expected {what} data, got an empty file")
    return source


def _kind(source: Path) -> str:
    """What a file that is no picture is, as far as FFmpeg can tell."""
    import av

    try:
        with av.open(str(source)) as container:
            # FFmpeg plays text as a terminal, and believes the name of a file that should be a picture.
            guessed = container.format.name in ("tty", "image2") or container.format.name.endswith("_pipe")
            if container.streams.video and not guessed:
                return "a video"
            if container.streams.audio:
                return "a sound file"
    except (av.FFmpegError, ValueError):
        pass
    return "a file of another kind"


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0].rstrip(".")
