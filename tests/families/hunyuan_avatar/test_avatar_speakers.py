# SPDX-License-Identifier: Apache-2.0
"""Who speaks where and when, and with which expression: what is read, and the rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.emotions import Emotion, emotion_index, read_emotion
from talkingdit.families.hunyuan_avatar.places import Place, draw_mask, enlarged, place_speakers
from talkingdit.families.hunyuan_avatar.speakers import (
    Speaker,
    check_boxes,
    check_speakers,
    named_by_turns,
    read_speaker,
)
from talkingdit.families.hunyuan_avatar.turns import Solo, Turn, names_in, read_turns

LEFT, MIDDLE, RIGHT = (10.0, 40.0, 30.0, 60.0), (90.0, 40.0, 112.0, 62.0), (150.0, 30.0, 180.0, 60.0)


# ---- Speakers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("anna=a.wav", Speaker("anna", Path("a.wav"))),
        ("anna=a.wav@mask.png", Speaker("anna", Path("a.wav"), mask=Path("mask.png"))),
        ("anna=a.wav@1,2,30,40.5", Speaker("anna", Path("a.wav"), box=(1, 2, 30, 40.5))),
        ("anna=me@home/a.wav", Speaker("anna", Path("me@home/a.wav"))),
        ("anna=me@home/a.wav@1,2,3,4", Speaker("anna", Path("me@home/a.wav"), box=(1, 2, 3, 4))),
        ("anna", Speaker("anna")),
        ("anna@1,2,3,4", Speaker("anna", box=(1, 2, 3, 4))),
        ("anna@face.jpg", Speaker("anna", mask=Path("face.jpg"))),
        ("anna=@face.jpg", Speaker("anna", mask=Path("face.jpg"))),
        ("anna=a.wav@face.MP4", Speaker("anna", Path("a.wav"), mask=Path("face.MP4"))),
        ("anna:0.5=a.wav", Speaker("anna", Path("a.wav"), strength=0.5)),
        ("anna:2=a.wav@1,2,3,4", Speaker("anna", Path("a.wav"), box=(1, 2, 3, 4), strength=2.0)),
        ("anna:0@face.jpg", Speaker("anna", mask=Path("face.jpg"), strength=0.0)),
        ("team:anna=a.wav", Speaker("team:anna", Path("a.wav"))),
    ],
)
def test_speakers_are_read_as_they_are_written(text: str, expected: Speaker) -> None:
    assert read_speaker(text) == expected
    assert read_speaker(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("=a.wav", "must have a name"),
        ("anna=a.wav@5,2,3,4", "x0 < x1 and y0 < y1, got 5,2,3,4"),
        ("anna=", "must be NAME=voice.wav"),
        ("anna@nowhere", "must be NAME=voice.wav"),
        ("anna:-1=a.wav", "strength of at least 0, got -1"),
        (":2=a.wav", "must have a name"),
    ],
)
def test_what_is_no_speaker_is_told(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_speaker(text)


def test_everybody_has_one_voice() -> None:
    a, b, mute = Speaker("a", Path("a.wav")), Speaker("b", Path("b.wav")), Speaker("c")
    check_speakers([a, b], turns=False)
    check_speakers([mute], turns=False)  # who speaks in --audio, and where
    check_speakers([mute, Speaker("d")], turns=True)
    for speakers, turns, sentence in (
        ([a, Speaker("a", Path("x.wav"))], False, "'a' twice"),
        ([a, mute], False, "got none for 'c'"),
        ([mute, Speaker("d")], False, "got none for 'c'"),
        ([a], True, "no recording beside turns"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check_speakers(speakers, turns=turns)


def test_found_faces_go_to_speakers_from_left_to_right() -> None:
    speakers = [Speaker("a"), Speaker("b")]
    places, remarks = place_speakers(speakers, [RIGHT, LEFT], (100, 200), [None, None])
    assert [place.face for place in places] == [LEFT, RIGHT]
    assert remarks == []
    # Who has a box keeps it, and its face is not given to another one.
    boxed = [Speaker("a", box=(0.0, 30.0, 50.0, 70.0)), Speaker("b")]
    places, _ = place_speakers(boxed, [RIGHT, LEFT], (100, 200), [None, None])
    assert places[0] == Place((0.0, 30.0, 50.0, 70.0), (0.0, 30.0, 50.0, 70.0))
    assert places[1].face == RIGHT
    # So with a mask.
    mask = np.zeros((100, 200), np.float32)
    mask[:, 140:] = 1
    places, _ = place_speakers(speakers, [RIGHT, LEFT], (100, 200), [mask, None])
    assert places[0].mask is mask
    assert places[1].face == LEFT


def test_of_more_faces_the_largest_speak() -> None:
    places, remarks = place_speakers([Speaker("a")], [LEFT, RIGHT, MIDDLE], (100, 200), [None])
    assert places[0].face == RIGHT
    assert remarks == ["2 more faces were found than speakers; who has no voice stays silent."]
    places, _ = place_speakers([Speaker("a"), Speaker("b")], [LEFT, RIGHT, MIDDLE], (100, 200), [None, None])
    assert [place.face for place in places] == [MIDDLE, RIGHT]


def test_more_speakers_than_faces_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"1 face found for 2 speakers without a box or a mask \(a, b\); say where"):
        place_speakers([Speaker("a"), Speaker("b")], [LEFT], (100, 200), [None, None])
    places, remarks = place_speakers([Speaker("a")], [], (100, 200), [None])  # as released: everywhere
    assert places == [Place()]
    assert "the voice moves the whole picture" in remarks[0]


def test_a_masked_area_is_three_faces_wide_and_ends_before_the_next_face() -> None:
    alone = (90.0, 40.0, 110.0, 60.0)
    assert enlarged(alone, [alone], (200, 400)) == (70.0, 20.0, 130.0, 80.0)
    assert enlarged(LEFT, [LEFT], (100, 200)) == (0.0, 20.0, 50.0, 80.0)  # inside of the picture
    near = (36.0, 42.0, 56.0, 62.0)
    first, second = (enlarged(face, [LEFT, near], (100, 200)) for face in (LEFT, near))
    assert first[2] == second[0] == 33.0
    above = (10.0, 0.0, 30.0, 9.0)  # its middle is further up than the masked area reaches
    assert enlarged(LEFT, [LEFT, above], (100, 200)) == enlarged(LEFT, [LEFT], (100, 200))


def test_masks_are_drawn_in_the_size_of_the_video() -> None:
    mask = draw_mask(Place((20.0, 10.0, 60.0, 30.0)), (100, 200), (50, 100))
    assert mask.shape == (50, 100)
    assert mask[5:15, 10:30].all()
    assert mask.sum() == 200
    assert draw_mask(Place(), (100, 200), (50, 100)).all()
    given = np.zeros((100, 200), np.float32)
    given[:, 100:] = 1
    assert np.array_equal(draw_mask(Place(mask=given), (100, 200), (50, 100)), given[::2, ::2])


def test_boxes_outside_of_the_picture_are_told() -> None:
    check_boxes([Speaker("a", box=(0, 0, 200, 100))], (100, 200), Path("p.png"))
    for box in ((-1.0, 0.0, 10.0, 10.0), (0.0, 0.0, 201.0, 10.0), (0.0, 0.0, 10.0, 101.0)):
        with pytest.raises(UserError, match=r"speaker a: the box .* is not inside p.png, which has 200 x 100 pixels"):
            check_boxes([Speaker("a", box=box)], (100, 200), Path("p.png"))


# ---- Turns -----------------------------------------------------------------------------------------------------------
RTTM = """;; a comment
SPKR-INFO talk 1 <NA> <NA> <NA> unknown ben <NA> <NA>
SPEAKER talk 1 1.50 0.50 <NA> <NA> ben <NA> <NA>

SPEAKER talk 1 0.00 1.00 <NA> <NA> anna <NA> <NA>
SPEAKER talk 1 0.90 0.30 <NA> <NA> anna <NA> <NA>
"""


def test_turns_are_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "turns.rttm"
    file.write_text(RTTM)
    turns = read_turns(file)
    assert turns == (Turn("anna", 0.0, 1.0), Turn("anna", 0.9, pytest.approx(1.2)), Turn("ben", 1.5, 2.0))
    assert names_in(turns) == ("anna", "ben")
    assert [s.name for s in named_by_turns((), names_in(turns), file)] == ["anna", "ben"]
    given = (Speaker("ben", box=(1, 2, 3, 4)), Speaker("anna"), Speaker("carl"))
    assert named_by_turns(given, names_in(turns), file) == given
    with pytest.raises(UserError, match=r"turns.rttm: names 'anna', who is none of the speakers ben, carl"):
        named_by_turns((Speaker("ben"), Speaker("carl")), names_in(turns), file)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"SPEAKER talk 1 0 1 <NA>\n", "line 1 must be SPEAKER file channel start duration"),
        (b"SPEAKER talk 1 -1 1 <NA> <NA> a\n", "line 1 must have a start of at least 0 .* got -1 and 1"),
        (b"SPEAKER talk 1 0 nan <NA> <NA> a\n", "line 1 must have a start of at least 0"),
        (b"0.0 1.0 anna\n", "line 1 is none of an RTTM file"),
        (b"", "expected lines that begin with SPEAKER, got none"),
        (b"SPEAKER x 1 0 1 <NA> <NA> a\nSPEAKER y 1 0 1 <NA> <NA> a\n", r"got those of 2 \(x, y\)"),
        (b"\xff\xfe\x00\x80", "got one that is no text"),
    ],
)
def test_what_are_no_turns_is_told(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "turns.rttm"
    file.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_turns(file)
    with pytest.raises(UserError, match="none that can be read"):
        read_turns(tmp_path / "none.rttm")


def test_a_solo_is_the_mixture_in_the_turns_of_one() -> None:
    mixture = np.random.default_rng(0).uniform(-1, 1, 32_000).astype(np.float32)
    solo = Solo(mixture, [Turn("a", 0.5, 1.0), Turn("a", 0.9, 1.25), Turn("a", 1.75, 9.0)])
    found = solo[:]
    assert len(solo) == len(found) == 32_000
    assert not found[:8000].any()
    assert not found[20_000:28_000].any()
    assert np.array_equal(found[8320:19_680], mixture[8320:19_680])  # one stretch, without a gap at 1.0
    assert np.array_equal(found[28_320:], mixture[28_320:])
    assert np.abs(found[8000:8320]).max() < np.abs(mixture[8000:8320]).max()  # it comes in softly
    pieces = [solo[begin : begin + 777] for begin in range(0, 32_000, 777)]
    assert np.array_equal(np.concatenate(pieces), found)
    assert not Solo(mixture, [])[:].any()


# ---- Emotions --------------------------------------------------------------------------------------------------------
def test_emotions_are_read_as_they_are_written() -> None:
    for text, expected in (
        ("happy.png", Emotion(Path("happy.png"))),
        ("happy.png@1-2.5", Emotion(Path("happy.png"), 1.0, 2.5)),
        ("happy.png@1.5-", Emotion(Path("happy.png"), 1.5)),
        ("me@home/happy.png", Emotion(Path("me@home/happy.png"))),
        ("me@home.png@.5-1", Emotion(Path("me@home.png"), 0.5, 1.0)),
    ):
        assert read_emotion(text) == expected
        assert read_emotion(str(expected)) == expected
    with pytest.raises(ValueError, match="must have a start before its end, got 2-1"):
        read_emotion("happy.png@2-1")
    with pytest.raises(ValueError, match="got nothing"):
        read_emotion("")


def test_every_latent_follows_what_was_named_last() -> None:
    """At 25 frames per second: latents begin at frames 0, 1, 5, 9, ..., and last 0.16 s."""
    track = [Emotion(Path("a")), Emotion(Path("b"), 0.5, 1.0)]
    found = emotion_index(track, 9, 25.0)
    middles = [0.02, *((4 * k - 1.5 + 0.5) / 25 for k in range(1, 9))]
    assert found == [1 if 0.5 <= time < 1.0 else 0 for time in middles]
    assert set(found) == {0, 1}
    assert emotion_index([Emotion(Path("a"), 0.5, 1.0)], 9, 25.0) == [0 if 0.5 <= t < 1.0 else -1 for t in middles]
    assert emotion_index([], 3, 25.0) == [-1, -1, -1]
