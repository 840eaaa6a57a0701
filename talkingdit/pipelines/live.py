# SPDX-License-Identifier: Apache-2.0
"""A voice that is still being spoken: sound from a pipe, of a length that nobody knows.

A thread takes the pipe apart as the sound comes and keeps it on the disk; who asks for samples that are not there yet
waits for them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.errors import UserError
from talkingdit.media.opening import open_container
from talkingdit.media.sound import SHORTEST_AUDIO, SPEECH_RATE
from talkingdit.pipelines.rows import Rows

LONGEST = 24 * 3600 * SPEECH_RATE  # samples that a voice is taken to have until its end is known
BLOCK = 1 << 15  # bytes that are read at once, at most
POLL = 0.1  # seconds between looks at whether somebody has interrupted


class LiveSound:
    """Samples [n] float32 at 16 kHz, mono, as they come; slices wait for what is not there yet.

    Its length is a day until the pipe has ended, and then what there was. A copy in another process has no samples.

    Args:
        descriptor: of the pipe, which is read to its end.
        folder: on whose disk the sound is kept.
        rate: samples per second of raw 16-bit little-endian mono sound; None for any container that can be read
            forward.

    Raises:
        UserError: the descriptor is a terminal, or nothing can be kept in the folder.
    """

    def __init__(self, descriptor: int, folder: Path, rate: int | None = None) -> None:
        if os.isatty(descriptor):
            raise UserError("audio -: expected sound from a pipe, got a terminal.")
        self._rows = Rows(folder)
        self._ended, self._failed = False, ""
        self._changed: threading.Condition | None = threading.Condition()
        blocks = _raw(descriptor, rate) if rate else _contained(descriptor)
        threading.Thread(target=self._read, args=(blocks,), daemon=True, name="voice").start()

    def _read(self, blocks: Iterator[NDArray[np.float32]]) -> None:
        assert self._changed is not None
        try:
            for block in blocks:
                if not np.isfinite(block).all():
                    raise ValueError("NaN or infinity")
                with self._changed:
                    self._rows.append(block)
                    self._changed.notify_all()
        except Exception as error:  # it ends there; who waits is told
            self._failed = str(error).partition("\n")[0] or type(error).__name__
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, samples: int, check: Callable[[], None] = lambda: None) -> int:
        """Wait until there are so many samples, or all -> how many there are.

        Args:
            check: called again and again meanwhile; what it raises ends the waiting.

        Raises:
            UserError: the pipe gave no sound at all, or less than 0.1 s.
        """
        assert self._changed is not None
        with self._changed:
            while len(self._rows) < samples and not self._ended:
                self._changed.wait(POLL)
                check()
        if self._ended and not len(self._rows):
            got = self._failed or "no sound"
            raise UserError(f"audio -: expected sound, raw with `--audio-rate` or in a container, got {got}.")
        if self._ended and len(self._rows) < SHORTEST_AUDIO * SPEECH_RATE:
            seconds = len(self._rows) / SPEECH_RATE
            raise UserError(f"audio -: expected at least {SHORTEST_AUDIO} s, got {seconds:.3f} s.")
        return len(self._rows)

    @property
    def ended(self) -> bool:
        """Has the pipe ended?"""
        return self._ended

    @property
    def trouble(self) -> str:
        """Why it ended before its time, as far as anybody can tell."""
        return self._failed

    def __len__(self) -> int:
        return len(self._rows) if self._ended else LONGEST

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        begin, end, _ = part.indices(len(self))
        self.wait(end)
        return self._rows[begin:end]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_changed": None}

    def blocks(self, skip: Fraction) -> Iterator[NDArray[np.float32]]:
        """The sound as [n, 1], as a track of a video takes it."""
        begin = round(skip * SPEECH_RATE)
        while True:
            there = self.wait(begin + 1)
            if there <= begin:
                return
            yield self._rows[begin : min(there, begin + SPEECH_RATE)][:, None]
            begin = min(there, begin + SPEECH_RATE)


def _raw(descriptor: int, rate: int) -> Iterator[NDArray[np.float32]]:
    """Raw 16-bit samples as they come, [n] at 16 kHz."""
    import soxr

    stream = soxr.ResampleStream(rate, SPEECH_RATE, 1, dtype="float32") if rate != SPEECH_RATE else None
    rest = b""
    while True:
        data = os.read(descriptor, BLOCK)
        rest += data
        whole = len(rest) - len(rest) % 2
        samples = np.frombuffer(rest[:whole], "<i2").astype(np.float32) * np.float32(2**-15)
        rest = rest[whole:]
        if stream is not None:
            samples = stream.resample_chunk(samples, last=not data)
        if len(samples):
            yield samples
        if not data:
            return


class _Forward:
    """A descriptor as a file that can only be read on."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, size: int = -1) -> bytes:
        return os.read(self._descriptor, BLOCK if size < 0 else size)


def _contained(descriptor: int) -> Iterator[NDArray[np.float32]]:
    """Sound in a container as it comes, [n] at 16 kHz."""
    import av

    # Look at the beginning only: what FFmpeg reads before it gives anything away, a listener waits for.
    options = {"probesize": str(BLOCK), "analyzeduration": "200000"}
    with open_container(_Forward(descriptor), options=options) as container:  # type: ignore[arg-type]
        if not container.streams.audio:
            raise ValueError("a container without sound")
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=SPEECH_RATE)
        for frame in container.decode(container.streams.audio[0]):
            for piece in resampler.resample(frame):
                yield np.asarray(piece.to_ndarray(), np.float32).reshape(-1)
        for piece in resampler.resample(None):
            yield np.asarray(piece.to_ndarray(), np.float32).reshape(-1)
