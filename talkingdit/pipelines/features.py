# SPDX-License-Identifier: Apache-2.0
"""Speech features of a whole video for its clips: in memory while they are few, on disk where the voice is long."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import EllipsisType
from typing import Protocol

import torch
from torch import Tensor

from talkingdit.distributed.team import Team
from talkingdit.encoders.speech import (
    WHOLE_SECONDS,
    Level,
    SpeechEncoder,
    WindowedEncoder,
    feature_parts,
    is_long,
)
from talkingdit.errors import UserError
from talkingdit.media.sound import SPEECH_RATE
from talkingdit.pipelines.inputs import Inputs
from talkingdit.pipelines.live import LONGEST, LiveSound
from talkingdit.pipelines.memory import out_of_memory
from talkingdit.pipelines.rows import Rows

# Of a voice from a pipe, the sound that the features of a frame are made with.
CONTEXT_SECONDS = 10  # before it
AHEAD = SPEECH_RATE // 2  # samples behind it
LEVEL_SECONDS = 3  # of sound, at least, by which its level is judged


class Features(Protocol):
    """Speech features [layers, audio_dim, F], one column per video frame: a tensor, or what reads like one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, part: tuple[EllipsisType, slice], /) -> Tensor:
        """`features[..., first:last]`: [layers, audio_dim, n] of some frames."""


class StoredFeatures:
    """Features on disk, float32 in the order of frames, so that those of a clip are one piece.

    Args:
        folder: on whose disk they lie, see `Rows`.
        first: the first of them, [layers, audio_dim, n].
    """

    def __init__(self, folder: Path, first: Tensor):
        self._rows = Rows(folder, tuple(first.shape[:2]))
        self._dtype = first.dtype
        self.append(first)

    def append(self, part: Tensor) -> None:
        """Add features [layers, audio_dim, n] of the next frames."""
        self._rows.append(part.float().cpu().permute(2, 0, 1).contiguous().numpy())

    @property
    def shape(self) -> tuple[int, ...]:
        count, layers, dim = self._rows.shape
        return layers, dim, count

    def __getitem__(self, part: tuple[EllipsisType, slice]) -> Tensor:
        return torch.from_numpy(self._rows[part[1]]).permute(1, 2, 0).to(self._dtype)


class LiveFeatures:
    """Speech features [layers, audio_dim, F] of a voice that is still being spoken; slices wait for it.

    The level is judged by the first seconds in which there is something to hear, and holds from then on.

    Args:
        encoder: of the family.
        sound: the voice.
        fps: video frames per second.
    """

    def __init__(self, encoder: SpeechEncoder, sound: LiveSound, fps: float) -> None:
        self._encoder, self._sound, self._fps = encoder, sound, fps
        self._level: Level | None = None
        layers, dim = self[..., 0:1].shape[:2]
        self.shape = (layers, dim, math.ceil(LONGEST / SPEECH_RATE * fps))

    def __getitem__(self, part: tuple[EllipsisType, slice]) -> Tensor:
        first, last = part[1].start or 0, part[1].stop
        end = math.ceil(last / self._fps * SPEECH_RATE) + AHEAD
        heard = max(end, LEVEL_SECONDS * SPEECH_RATE)
        there = self._sound.wait(heard)
        # Whole seconds, as encoders have their places there; never behind the end of the sound.
        begin = min(int(first / self._fps), (there - 1) // SPEECH_RATE) - CONTEXT_SECONDS
        begin = max(0, begin) * SPEECH_RATE
        window = self._levelled(min(heard, there))(self._sound[begin : min(end, there)])
        if not isinstance(self._encoder, WindowedEncoder):
            before = round(begin / SPEECH_RATE * self._fps)
            return self._encoder.features(window, last - before)[..., first - before :]
        # Where the end is not within reach it makes no difference, known or not.
        samples = there if there < end else LONGEST
        return self._encoder.part(window, begin, samples, first, last - first)

    def _levelled(self, heard: int) -> Level:
        """The level of the voice, of which the first `heard` samples may be looked at."""
        if self._level is not None or not isinstance(self._encoder, WindowedEncoder):
            return self._level or Level()
        try:
            self._level = self._encoder.level([self._sound[0:heard]])
        except UserError:  # nothing to hear yet
            return Level()
        return self._level


class SharedFeatures:
    """Features that rank 0 has, on every process of a team: each asks for the same frames at the same time."""

    def __init__(self, team: Team, make: Callable[[], Features]):
        self._team = team
        self._features: Features | None = None

        def made() -> tuple[int, ...]:
            self._features = make()
            return tuple(self._features.shape)

        self.shape = team.on_rank_0(made)

    def __getitem__(self, part: tuple[EllipsisType, slice]) -> Tensor:
        def read() -> Tensor:
            assert self._features is not None
            return self._features[part]

        return self._team.broadcast(read, "cpu")


def encode_voice(encoder: SpeechEncoder, inputs: Inputs, frames: int, fps: float, team: Team) -> Features:
    """Features of the first video frames of a job, for every process; of a voice that comes from a pipe, as they come.

    Args:
        encoder: of the family; rank 0 runs it.
        inputs: of the job, with the voice.
        frames: how many; those past the end of the voice are silence.
        fps: video frames per second.
        team: the processes.

    Raises:
        UserError: memory or disk is too small, or as the encoder raises it.
    """

    def make() -> Features:
        try:
            if isinstance(inputs.sound, LiveSound):
                return LiveFeatures(encoder, inputs.sound, fps)
            return _encode(encoder, inputs, frames, fps)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            seconds = min(len(inputs.sound) / SPEECH_RATE, WHOLE_SECONDS)
            raise UserError(
                f"generate: memory is too small for the speech encoder, which hears {seconds:.0f} s of the voice at "
                "once; `talkingdit plan --seconds` says what that takes beside the other models."
            ) from error

    return make() if team.size == 1 else SharedFeatures(team, make)


def _encode(encoder: SpeechEncoder, inputs: Inputs, frames: int, fps: float) -> Features:
    parts = feature_parts(encoder, inputs.sound, frames, fps)
    first = next(parts)
    if not is_long(len(inputs.sound)):
        return first.cpu()
    stored = StoredFeatures(inputs.job.output.parent, first)
    for part in parts:
        stored.append(part)
    return stored
