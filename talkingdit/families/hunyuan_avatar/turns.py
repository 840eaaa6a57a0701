# SPDX-License-Identifier: Apache-2.0
"""Who speaks when in one recording of several people: RTTM files, and the voice of each person in the mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.encoders.speech import Sound
from talkingdit.errors import UserError
from talkingdit.media.sound import SPEECH_RATE

FADE = 0.02  # seconds in which a voice comes and goes, within its turn
MOST_BYTES = 64 << 20
OTHER_LINES = frozenset(  # kinds of lines of RTTM files that are no turns
    (
        "SPKR-INFO",
        "LEXEME",
        "NON-LEX",
        "NON-SPEECH",
        "SEGMENT",
        "NOSCORE",
        "NO_RT_METADATA",
        "SU",
        "EDIT",
        "FILLER",
        "IP",
    )
)


@dataclass(frozen=True)
class Turn:
    """A stretch of a recording in which somebody speaks, in seconds."""

    speaker: str
    start: float
    end: float


def read_turns(path: Path) -> tuple[Turn, ...]:
    """The turns of an RTTM file, in order of time.

    Lines are `SPEAKER file channel start duration <NA> <NA> name ...`; those of other kinds, comments (;;) and empty
    ones are left out.

    Raises:
        UserError: no such file, a line that is none, no turn, or turns of several recordings.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: expected an RTTM file of at most {MOST_BYTES >> 20} MB.")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected an RTTM file, got one that is no text.") from error
    except OSError as error:
        raise UserError(
            f"{path}: expected an RTTM file, got none that can be read ({error.strerror or error})."
        ) from error
    turns, recordings = [], set()
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0] != "SPEAKER":
            if words and not words[0].startswith(";") and words[0] not in OTHER_LINES:
                raise UserError(
                    f"{path}: line {number} is none of an RTTM file, which begin with SPEAKER, got {line[:60]!r}."
                )
            continue
        turns.append(_turn(path, number, words))
        recordings.add(words[1])
    if not turns:
        raise UserError(f"{path}: expected lines that begin with SPEAKER, got none.")
    if len(recordings) > 1:
        found = ", ".join(sorted(recordings)[:3])
        raise UserError(f"{path}: expected the turns of one recording, got those of {len(recordings)} ({found}).")
    return tuple(sorted(turns, key=lambda turn: (turn.start, turn.end)))


def _turn(path: Path, number: int, words: list[str]) -> Turn:
    if len(words) < 8:
        raise UserError(
            f"{path}: line {number} must be SPEAKER file channel start duration <NA> <NA> name, got {len(words)} words."
        )
    try:
        start, duration = float(words[3]), float(words[4])
    except ValueError:
        start = duration = float("nan")
    if not (0 <= start < float("inf") and 0 < duration < float("inf")):
        raise UserError(
            f"{path}: line {number} must have a start of at least 0 and a duration above 0 in seconds, "
            f"got {words[3]} and {words[4]}."
        )
    return Turn(words[7], start, start + duration)


def names_in(turns: Sequence[Turn]) -> tuple[str, ...]:
    """Who speaks, in the order of their first turns."""
    return tuple(dict.fromkeys(turn.speaker for turn in turns))


class Solo:
    """One person's voice in a recording of several: the recording in this person's turns, silence elsewhere.

    Where two speak at the same time, both have what is heard then.

    Args:
        mixture: the recording, 16 kHz.
        turns: of this person; they may overlap.
    """

    def __init__(self, mixture: Sound, turns: Sequence[Turn]):
        self._mixture = mixture
        self._turns = _joined(turns)

    def __len__(self) -> int:
        return len(self._mixture)

    def __getitem__(self, part: Any) -> NDArray[np.float32]:
        """Samples of a slice without steps."""
        begin, end, _ = part.indices(len(self))
        samples = np.asarray(self._mixture[begin:end], dtype=np.float32)
        time = (np.arange(begin, end) + 0.5) / SPEECH_RATE
        level = np.zeros(len(time), np.float32)
        for start, stop in self._turns:
            if start < end / SPEECH_RATE and stop > begin / SPEECH_RATE:
                fade = min(FADE, (stop - start) / 2)
                level = np.maximum(level, np.clip(np.minimum(time - start, stop - time) / fade, 0, 1))
        return (samples * level).astype(np.float32)


def _joined(turns: Sequence[Turn]) -> list[tuple[float, float]]:
    """Stretches in order, those that touch made one."""
    found: list[tuple[float, float]] = []
    for turn in sorted(turns, key=lambda turn: turn.start):
        if found and turn.start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], turn.end))
        else:
            found.append((turn.start, turn.end))
    return found
