# SPDX-License-Identifier: Apache-2.0
"""A video in one pass: the right pictures and sound for every clip, and no more memory for a longer one."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clip_files import RATE, draw, number_of, voice, write_video

from talkingdit.curate import look as looking
from talkingdit.curate.look import looks, unpacked
from talkingdit.curate.measure import Video, Watcher
from talkingdit.curate.settings import Watch, Write
from talkingdit.curate.stages.sync import envelope, shift
from talkingdit.media.sound import sound_blocks

WATCH = Watch(fps=16, clip_seconds=1.0, still_every=0.25)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("look") / "video.mp4"
    return write_video(path, draw(40), 16, voice(2.5))


def test_clips_have_their_own_pictures_and_sound(video: Path) -> None:
    clips = list(looks(video, WATCH, find_cuts=False))
    assert [(c.start, len(c.pictures), c.number) for c in clips] == [(0.0, 16, 0), (1.0, 16, 1), (2.0, 8, 2)]
    numbers = [number_of(picture) for clip in clips for picture in clip.pictures]
    assert numbers == [k % 27 for k in range(40)]
    whole = np.concatenate(list(sound_blocks(video)))
    np.testing.assert_array_equal(np.concatenate([c.samples for c in clips]), whole[: round(2.5 * RATE)])
    for clip in clips:
        for still in clip.stills:
            assert number_of(still.picture) == number_of(clip.pictures[still.index])


def test_a_part_and_a_slower_look(video: Path) -> None:
    (clip,) = looks(video, Watch(fps=8, clip_seconds=9), start=0.5, end=1.5, find_cuts=False)
    assert (clip.start, clip.fps, len(clip.pictures)) == (0.5, 8.0, 8)
    assert [number_of(picture) for picture in clip.pictures] == [8, 10, 12, 14, 16, 18, 20, 22]
    whole = np.concatenate(list(sound_blocks(video)))
    np.testing.assert_array_equal(clip.samples, whole[RATE // 2 : RATE // 2 + RATE])


def test_a_clip_travels_to_another_process(video: Path) -> None:
    clip = next(looks(video, WATCH, find_cuts=False))
    found, spoken = unpacked(video, clip.packed(4, [(0.25, 0.5)]))
    assert spoken == [(0.25, 0.5)]
    assert (found.start, found.size, found.seconds) == (clip.start, clip.size, clip.seconds)
    np.testing.assert_array_equal(found.pictures, clip.pictures[[0, 5, 10, 15]])
    np.testing.assert_array_equal(found.samples, clip.samples)


def test_memory_does_not_grow_with_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[tuple[int, int, int]] = []
    add = looking._Cutter.add

    def counted(self: looking._Cutter, frame: np.ndarray) -> object:
        yield from add(self, frame)
        sound = sum(map(len, self.sound._held)) if self.sound is not None else 0
        held.append((len(self.pictures), len(self.stills), sound))

    monkeypatch.setattr(looking._Cutter, "add", counted)
    path = write_video(tmp_path / "long.mp4", draw(640), 16, voice(40.0))
    assert sum(len(clip.pictures) for clip in looks(path, WATCH, find_cuts=False)) == 640
    assert len(held) == 640
    pictures, stills, sound = (max(column) for column in zip(*held, strict=True))
    assert pictures <= 16
    assert stills <= 4
    assert sound <= 2 * RATE


def test_every_cut_of_a_list_divides(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts that are known late, close together and beyond the longest clip."""

    class Known:
        def __init__(self) -> None:
            self.seen = self.settled = 0

        def add(self, _: np.ndarray) -> list[tuple[int, float]]:
            self.seen += 1
            before, self.settled = self.settled, max(0, self.seen - 5)
            return [(at, 1.0) for at in (3, 4, 22) if before < at <= self.settled]

        def finish(self) -> list[tuple[int, float]]:
            before, self.settled = self.settled, self.seen
            return [(at, 1.0) for at in (38,) if before < at <= self.settled]

    monkeypatch.setattr(looking, "Cuts", lambda threshold: Known())
    clips = list(looks(video, WATCH))
    assert [(round(c.start * 16), len(c.pictures), c.shot) for c in clips] == [
        *((0, 3, 0), (3, 1, 1), (4, 16, 2), (20, 2, 2)),
        *((22, 16, 3), (38, 2, 4)),
    ]
    assert [number_of(c.pictures[0]) for c in clips] == [n % 27 for n in (0, 3, 4, 20, 22, 38)]


def test_a_shift_of_mouth_and_voice_is_measured() -> None:
    """A voice that is louder as the mouth is wider; the mouth then comes later, or earlier, by known pictures."""
    fps, count = 25.0, 150
    rng = np.random.default_rng(0)
    opening = np.clip(np.convolve(rng.normal(size=count + 8), np.ones(4) / 2, "same")[4:-4], 0, 1)
    loud = np.interp(np.arange(round(count / fps * RATE)) / RATE * fps - 0.5, np.arange(count), opening)
    samples = (loud * np.sin(2 * np.pi * 700 * np.arange(len(loud)) / RATE)).astype(np.float32)
    voice_curve = envelope(samples, fps, count)
    for pictures in (0, 5, -7):
        lag, score, _ = shift(np.roll(opening, pictures), voice_curve, fps, 0.6)
        assert lag == pytest.approx(pictures / fps)
        assert score > 0.7  # loudness is logarithmic, and the roll brings the end to the front
    _, score, _ = shift(rng.normal(size=count), voice_curve, fps, 0.6)
    assert score < 0.4
    assert shift(np.zeros(count), voice_curve, fps, 0.6)[1] == 0.0


def test_sound_that_ends_early_leaves_the_rest_silent(tmp_path: Path) -> None:
    path = write_video(tmp_path / "short.mp4", draw(32), 16, voice(1.25))
    clips = list(looks(path, WATCH, find_cuts=False))
    assert len(clips[0].samples) == RATE
    assert len(clips[1].samples) < RATE / 2
    assert Fraction(len(clips[1].pictures), 16) == 1


def test_all_that_watching_holds_does_not_grow_with_the_video(tmp_path: Path) -> None:
    """Ten times as long takes a tenth more at most, beside the clips' figures; `tools/long_memory.py` takes an hour."""
    watcher = Watcher(
        Watch(clip_seconds=2.0, cut=0, stages=("picture",), samples=0), tmp_path, write=Write(anchors=False)
    )
    peaks = []
    for seconds in (4, 4, 40):  # the first loads what is loaded once
        path = write_video(tmp_path / "video.mp4", draw(seconds * 8, (128, 192)), 8, voice(float(seconds)))
        tracemalloc.start()
        try:
            record = watcher.record(Video("video", path))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert (record["error"], len(record["clips"])) == ("", seconds // 2)
    assert peaks[2] < 1.1 * peaks[1], peaks
