# SPDX-License-Identifier: Apache-2.0
"""Several recordings heard together, as one file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from talkingdit.errors import UserError
from talkingdit.media.sound import sound_blocks

RATE = 48000  # Hz, of the mixture
BLOCK = RATE  # samples that are added up at once
CEILING = 0.99  # where the peak of a mixture that would clip comes to lie

Samples = NDArray[np.float32]


def mix_voices(voices: Sequence[Path], target: Path) -> Path:
    """Write recordings, each from its beginning, as one mono FLAC of 24 bits; it lasts as long as the longest.

    Voices keep their levels; a mixture that would clip is made quieter as a whole. Memory does not grow with length.

    Args:
        voices: any sound files.
        target: the file to write.

    Returns:
        target.

    Raises:
        UserError: a recording is none, or the disk is full.
    """
    peak = max((float(np.abs(block).max(initial=0)) for block in mixed_blocks(voices)), default=0.0)
    gain = np.float32(CEILING / peak if peak > CEILING else 1.0)
    try:
        with soundfile.SoundFile(target, "w", RATE, 1, "PCM_24", format="FLAC") as file:
            for block in mixed_blocks(voices):
                file.write(block * gain)
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"{target}: the mixture of {len(voices)} voices cannot be written ({error}).") from error
    return target


def mixed_blocks(voices: Sequence[Path]) -> Iterator[Samples]:
    """The sum of recordings, float32 [n] at 48 kHz, block by block."""
    streams = [_even(sound_blocks(voice, RATE)) for voice in voices]
    while streams:
        parts = [(stream, block) for stream in streams if (block := next(stream, None)) is not None]
        if parts:
            total = np.zeros(max(len(block) for _, block in parts), np.float32)
            for _, block in parts:
                total[: len(block)] += block
            yield total
        streams = [stream for stream, _ in parts]


def _even(blocks: Iterator[Samples]) -> Iterator[Samples]:
    """The same samples in blocks of one size, the last one shorter."""
    rest = np.zeros(0, np.float32)
    for block in blocks:
        rest = np.concatenate([rest, block])
        while len(rest) >= BLOCK:
            yield rest[:BLOCK]
            rest = rest[BLOCK:]
    if len(rest):
        yield rest
