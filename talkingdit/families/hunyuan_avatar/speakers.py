# SPDX-License-Identifier: Apache-2.0
"""Who speaks in a video: names, voices, and which part of the picture each of them moves; see `places.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from talkingdit.errors import UserError
from talkingdit.media.boxes import Box, read_box, write_box
from talkingdit.media.kinds import IMAGES, VIDEOS


@dataclass(frozen=True)
class Speaker:
    """Somebody who speaks in a video.

    Args:
        name: as turns name them.
        voice: a recording; None where one recording holds all voices.
        mask: a picture of the size of the portrait, bright where the face is, or a video of such pictures, in which the
            face moves.
        box: of the face in the portrait, in its pixels.
        strength: how much the voice moves the face.

    Raises:
        ValueError: both a mask and a box, a box without room, or a strength that is none.
    """

    name: str
    voice: Path | None = None
    mask: Path | None = None
    box: Box | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("must have a name, NAME=voice.wav, got none")
        if self.mask is not None and self.box is not None:
            raise ValueError(f"must have a mask or a box, got both for {self.name}")
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ValueError(f"must have a box x0,y0,x1,y1 with x0 < x1 and y0 < y1, got {write_box(self.box)}")
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"must have a strength of at least 0, got {self.strength}")

    def __str__(self) -> str:
        voice = "" if self.voice is None else f"={self.voice}"
        place = "" if self.mask is None else f"@{self.mask}"
        name = self.name if self.strength == 1.0 else f"{self.name}:{self.strength:g}"
        return f"{name}{voice}{place}" + ("" if self.box is None else f"@{write_box(self.box)}")

    @property
    def moves(self) -> bool:
        """Is the mask a video?"""
        return self.mask is not None and self.mask.suffix.lower() in VIDEOS


def read_speaker(text: str) -> Speaker:
    """From NAME=voice.wav, NAME=voice.wav@mask.png, NAME=voice.wav@x0,y0,x1,y1, or these without the recording.

    The mask may be a video, and a strength may stand behind the name: NAME:0.5=voice.wav.

    Raises:
        ValueError: something else.
    """
    name, given, rest = text.partition("=")
    if not given:
        name, at, place = text.partition("@")
        rest = at + place
    name, strength = _name_and_strength(name)
    voice, at, place = rest.rpartition("@")
    if at and (box := read_box(place)) is not None:
        return Speaker(name, Path(voice).expanduser() if voice else None, box=box, strength=strength)
    if at and Path(place).suffix.lower() in (*IMAGES, *VIDEOS):
        recording = Path(voice).expanduser() if voice else None
        return Speaker(name, recording, mask=Path(place).expanduser(), strength=strength)
    if (at and not voice) or (given and not rest):
        raise ValueError(f"must be NAME=voice.wav, NAME=voice.wav@mask.png or NAME=voice.wav@x0,y0,x1,y1, got {text!r}")
    return Speaker(name, Path(rest).expanduser() if rest else None, strength=strength)


def _name_and_strength(text: str) -> tuple[str, float]:
    """NAME:0.5; a colon that no number follows belongs to the name."""
    name, given, number = text.rpartition(":")
    try:
        return (name, float(number)) if given else (text, 1.0)
    except ValueError:
        return text, 1.0


def check_speakers(speakers: Sequence[Speaker], turns: bool) -> None:
    """Does everybody have one voice?

    Args:
        turns: one recording holds all voices, and turns say whose they are.

    Raises:
        ValueError: two of one name, a voice that is missing, or one too many.
    """
    names = [speaker.name for speaker in speakers]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"generate: speaker must have a name of its own each, got {twice[0]!r} twice")
    voiced = [speaker.name for speaker in speakers if speaker.voice is not None]
    mute = [speaker.name for speaker in speakers if speaker.voice is None]
    if turns and voiced:
        raise ValueError(
            "generate: speaker must have no recording beside turns, which divide that of --audio, "
            f"got one for {voiced[0]!r}"
        )
    if not turns and mute and (voiced or len(mute) > 1):
        raise ValueError(
            f"generate: speaker must have a recording, NAME=voice.wav, unless there are turns, got none for {mute[0]!r}"
        )


def named_by_turns(speakers: Sequence[Speaker], names: Sequence[str], path: Path) -> tuple[Speaker, ...]:
    """The speakers of a recording with turns: those that were named, or all that the turns name, in their order.

    Raises:
        UserError: turns name somebody else.
    """
    if not speakers:
        return tuple(Speaker(name) for name in names)
    known = [speaker.name for speaker in speakers]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{path}: names {unknown[0]!r}, who is none of the speakers {', '.join(known)}.")
    return tuple(speakers)


def check_boxes(speakers: Sequence[Speaker], size: tuple[int, int], image: Path) -> None:
    """Are the boxes in the picture?

    Args:
        size: height and width of the picture.

    Raises:
        UserError: one is not.
    """
    height, width = size
    for speaker in speakers:
        box = speaker.box
        if box is not None and (min(box) < 0 or box[2] > width or box[3] > height):
            raise UserError(
                f"--speaker {speaker.name}: the box {write_box(box)} is not inside {image}, "
                f"which has {width} x {height} pixels."
            )
