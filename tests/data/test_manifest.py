# SPDX-License-Identifier: Apache-2.0
"""Manifests in our words and in those of other programs, what is wrong with them, and what is known of their files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_files import draw, voice, write_video, write_voice
from PIL import Image

from talkingdit.data.manifest import Entry, read_manifest
from talkingdit.data.probe import Media, Probes, frames_of, media_of, probe
from talkingdit.errors import UserError


def only(path: Path) -> Entry:
    (entry,) = read_manifest(path).entries
    return entry


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_metadata_of_diffsynth_studio_is_understood(tmp_path: Path) -> None:
    """The columns of its Wan2.2-S2V example, with a quoted comma."""
    path = write(
        tmp_path / "metadata.csv",
        "video,prompt,input_audio,s2v_pose_video\n"
        'v/a.mp4,"a person, talking",v/a.wav,v/pose.mp4\nv/b.mp4,sings,v/b.wav,\n',
    )
    first, second = read_manifest(path).entries
    assert (first.video, first.audio, first.pose) == tuple(tmp_path / "v" / n for n in ("a.mp4", "a.wav", "pose.mp4"))
    assert first.caption == "a person, talking"
    assert second.pose is None
    assert first.where == f"{path}:2"
    assert len({first.key, second.key}) == 2


def test_metadata_of_videox_fun_is_understood(tmp_path: Path) -> None:
    row = {"file_path": "train/v.mp4", "audio_path": "wav/a.wav", "text": "speaks", "type": "video", "width": 512}
    path = write(tmp_path / "metadata.json", json.dumps([row]))
    manifest = read_manifest(path)
    (entry,) = manifest.entries
    assert (entry.video, entry.audio) == (tmp_path / "train/v.mp4", tmp_path / "wav/a.wav")
    assert (entry.caption, entry.width) == ("speaks", 512)
    assert manifest.ignored == ("type",)


def test_everything_that_jsonl_can_say(tmp_path: Path) -> None:
    row = {
        **{"id": "set/one", "video": "a.mp4", "audio": "none", "kind": "film", "start": 1.5, "end": 4},
        **{"reference": "me.png", "regions": {"face": [0.1, 0.2, 0.5, 1], "lips": "lips.mp4"}},
        "outside": {"smile": ["smile.png", 12.5], "side": 3},
    }
    entry = only(write(tmp_path / "m.jsonl", json.dumps(row) + "\n\n"))
    assert (entry.key, entry.kind, entry.start, entry.end) == ("set/one", "film", 1.5, 4.0)
    assert entry.silent
    assert entry.audio is None
    assert entry.reference == tmp_path / "me.png"
    assert entry.regions == {"face": (0.1, 0.2, 0.5, 1.0), "lips": tmp_path / "lips.mp4"}
    assert entry.outside == {"smile": (tmp_path / "smile.png", 12.5), "side": (3.0,)}


def test_csv_says_the_same_with_dotted_columns(tmp_path: Path) -> None:
    text = "video,regions.face,regions.lips,outside.smile\na.mp4,0.1;0.2;0.5;1,lips.mp4,smile.png;12.5\nb.mp4,,,\n"
    first, second = read_manifest(write(tmp_path / "m.csv", text)).entries
    assert first.regions == {"face": (0.1, 0.2, 0.5, 1.0), "lips": tmp_path / "lips.mp4"}
    assert first.outside == {"smile": (tmp_path / "smile.png", 12.5)}
    assert not second.regions
    assert not second.outside


def test_keys_do_not_depend_on_where_a_row_stands(tmp_path: Path) -> None:
    """Rows may be added in front: what was encoded for a row stays its own."""
    rows: list[dict[str, Any]] = [{"video": "a.b.mp4"}, {"video": "a_b.mp4"}, {"video": "a.b.mp4", "start": 2}]
    before = {e.key for e in read_manifest(write_rows(tmp_path / "1.jsonl", *rows)).entries}
    after = {e.key for e in read_manifest(write_rows(tmp_path / "2.jsonl", {"video": "c.mp4"}, *rows[::-1])).entries}
    assert len(before) == 3
    assert before < after
    assert not any(set(key) & set(". ") for key in after)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.jsonl", '{"video": "a.mp4"}\n{"video": \n', r"m.jsonl:2: not JSON"),
        ("m.jsonl", '\n["a.mp4"]\n', r"m.jsonl:2: expected an object with a video, got list"),
        ("m.jsonl", '{"caption": "x"}\n', r"m.jsonl:1: expected a column 'video' with a file, got none"),
        ("m.jsonl", '{"video": 3}\n', r"m.jsonl:1: video must be a text, got 3"),
        ("m.jsonl", '{"video": "a", "start": -1}\n', r"m.jsonl:1: start must be a number of at least 0, got -1"),
        ("m.jsonl", '{"video": "a", "start": 2, "end": 1}\n', r"end must be behind start \(2\), got 1"),
        ("m.jsonl", '{"video": "a", "frames": 1.5}\n', r"frames must be a whole number of at least 1, got 1.5"),
        ("m.jsonl", '{"video": "a", "fps": "x"}\n', r"fps must be a number of at least 0, got 'x'"),
        ("m.jsonl", '{"video": "a", "id": "a b"}\n', r"id must be letters, digits"),
        ("m.jsonl", '{"video": "a", "regions": {"f": [0, 0, 2, 1]}}\n', r"region 'f' must be a file or a box"),
        ("m.jsonl", '{"video": "a", "outside": {"s": [true]}}\n', r"outside 's' must be seconds or image files"),
        ("m.jsonl", '{"video": "a.mp4"}\n' * 2, r"m.jsonl:2: the same id as at .*m.jsonl:1"),
        ("m.csv", "video,prompt\na.mp4\n", r"m.csv:2: expected 2 columns as in the first line, got 1"),
        ("m.csv", "video\na.mp4,b,c\n", r"m.csv:2: expected 1 columns as in the first line, got 3"),
        ("m.csv", 'video\n"a.mp4\n', r"m.csv:\d: not a row of csv"),
        ("m.json", '{"video": "a.mp4"}', r"m.json: expected a list of objects, got dict"),
        ("m.jsonl", '{"video": "a", "start": 1' + "0" * 400 + "}", r"m.jsonl:1: start must be a number of at least 0"),
        ("m.jsonl", '{"video": "a", "end": 1' + "0" * 5000 + "}", r"m.jsonl:1: not JSON"),
        ("m.jsonl", '{"video": "a", "end": 1e300}', r"m.jsonl:1: end must be at most 1073741824"),
        ("m.jsonl", '{"video": "a", "fps": NaN}', r"m.jsonl:1: fps must be a number of at least 0, got nan"),
        ("m.csv", "video,end\na.mp4,inf\n", r"m.csv:2: end must be a number of at least 0, got 'inf'"),
        ("m.jsonl", '{"video": "a", "outside": {"s": 1e300}}', r"outside 's' must be seconds or image files"),
        ("m.jsonl", '{"video": ' + "[" * 100_000, r"m.jsonl:1: not JSON \(maximum recursion"),
        ("m.json", "[" * 100_000, r"m.json: not JSON \(maximum recursion"),
        ("m.jsonl", r'{"video": "a\ud800.mp4"}', r"video must be a text of whole characters, got 'a\\ud800.mp4'"),
        ("m.jsonl", r'{"video": "a", "caption": "\udc00"}', r"caption must be a text of whole characters"),
        ("m.jsonl", r'{"video": "a", "regions": {"f": "b\u0000"}}', r"region 'f' must be a text without NUL"),
        ("m.jsonl", r'{"video": "a", "outside": {"s": "\ud800"}}', r"outside 's' must be a text of whole characters"),
        ("m.jsonl", "", r"m.jsonl: expected at least one video, got an empty manifest"),
        ("m.txt", "a.mp4", r"expected a .jsonl, .csv or .json file"),
    ],
)
def test_mistakes_are_one_sentence_with_file_and_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_manifest(write(tmp_path / name, text))
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected an existing file, got none of this name"):
        read_manifest(tmp_path / "m.csv")


def test_files_are_opened_once_and_again_when_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start must not wait for a million files, and not believe in one that was replaced."""
    video = write_video(tmp_path / "a.mp4", draw(20), 16, voice(1.25))
    manifest = write_rows(tmp_path / "m.jsonl", {"video": "a.mp4"})
    entries = read_manifest(manifest).entries
    Probes(manifest).fill(entries)
    opened: list[Path] = []
    monkeypatch.setattr("talkingdit.data.probe.probe", lambda path: opened.append(path) or probe(path))
    found, _ = Probes(manifest).of(entries[0])
    assert not opened
    assert (found.height, found.width, found.fps, found.seconds) == (32, 48, 16.0, 1.25)
    assert found.sound == pytest.approx(1.25, abs=0.07)
    write_video(video, draw(30), 16)
    os.utime(video, ns=(1, 1))
    again, _ = Probes(manifest).of(entries[0])
    assert opened == [video]
    assert (again.seconds, again.sound) == (30 / 16, 0.0)


def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", draw(20), 16)
    manifest = write_rows(tmp_path / "m.jsonl", {"video": "a.mp4"})
    (tmp_path / "m.jsonl.probe").write_text('{"path": "a.mp4", "stamp": [')
    probes = Probes(manifest)
    probes.fill(read_manifest(manifest).entries)
    assert probes.of(read_manifest(manifest).entries[0])[0].seconds == 1.25
    assert "1.25" in (tmp_path / "m.jsonl.probe").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": float("inf")}, {"seconds": "5"}, {"fps": float("nan")}, {"fps": 0}, {"sound": -1}, {"width": None},
        {"begins": 10**400}, {"error": 3}, {"path": ["a.mp4"]}, {"more": 1}, "[" * 100_000, '"a"', "[1]", "{}",
    ],
)  # fmt: skip
def test_a_cache_that_cannot_be_is_not_believed(tmp_path: Path, change: dict[str, Any] | str) -> None:
    """It lies beside the manifest, and comes with it from wherever that is from."""
    write_video(tmp_path / "a.mp4", draw(5), 16, voice(5 / 16))
    entry = only(write_rows(tmp_path / "m.jsonl", {"video": "a.mp4"}))
    probes = Probes(tmp_path / "m.jsonl")
    probes.fill([entry])
    cache = tmp_path / "m.jsonl.probe"
    cache.write_text(change if isinstance(change, str) else json.dumps(json.loads(cache.read_text()) | change))
    video, sound = media_of(entry, Probes(tmp_path / "m.jsonl"))
    assert video == probe(tmp_path / "a.mp4")
    assert frames_of(entry, video, sound, 16) == 5


def test_files_whose_size_is_known_are_not_opened(tmp_path: Path) -> None:
    write_voice(tmp_path / "a.wav", 2.0)
    row = {"video": "not/there.mp4", "audio": "a.wav", "fps": 25, "frames": 50, "width": 64, "height": 32}
    entry = only(write_rows(tmp_path / "m.jsonl", row))
    video, sound = media_of(entry, Probes(tmp_path / "m.jsonl"))
    assert video == Media(2.0, 25.0, 32, 64)
    assert sound.sound == 2.0


@pytest.mark.parametrize(
    ("fps", "frames", "start", "end", "sound", "wanted"),
    [
        (16, 20, 0, None, 9.0, 20),
        (25, 50, 0, None, 9.0, 32),  # two seconds: frame 31 is at 1.94, the last frame at 1.96
        (24, 25, 0, None, 9.0, 17),  # frame 16 is the last frame, at 1.0
        (10, 10, 0, None, 9.0, 16),  # frame 15 at 0.9375 is nearest to the frame at 0.9
        (16, 20, 0.5, None, 9.0, 12),
        (16, 20, 0.25, 0.75, 9.0, 8),
        (16, 20, 0, None, 0.98, 16),  # the sound ends before, but for less than half a frame
        (16, 20, 0, None, 0.5, 8),
        (16, 20, 3, None, 9.0, 0),
    ],
)
def test_how_many_frames_there_are(
    fps: float, frames: int, start: float, end: float | None, sound: float, wanted: int
) -> None:
    entry = Entry("k", "m:1", Path("v.mp4"), Path("a.wav"), start=start, end=end)
    assert frames_of(entry, Media(frames / fps, fps, 32, 32), Media(sound=sound), 16) == wanted


def test_images_are_looked_into_as_a_viewer_shows_them(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((20, 60, 3), np.uint8))
    exif = image.getexif()
    exif[274] = 6  # turned by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    found = probe(tmp_path / "a.jpg")
    assert (found.height, found.width) == (60, 20)
    (tmp_path / "b.png").write_bytes(b"no image")
    assert "b.png is not an image" in probe(tmp_path / "b.png").error


def test_what_is_expected_to_speak_must_have_a_sound(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", draw(5), 16)
    rows = {"video": "a.mp4"}, {"video": "a.mp4", "audio": "none"}, {"video": "a.mp4", "audio": "gone.wav"}
    dumb, silent, gone = read_manifest(write_rows(tmp_path / "m.jsonl", *rows)).entries
    probes = Probes(tmp_path / "m.jsonl")
    with pytest.raises(UserError, match=r'a.mp4 has no sound; say so with audio "none"'):
        media_of(dumb, probes)
    with pytest.raises(UserError, match=r"gone.wav does not exist"):
        media_of(gone, probes)
    assert media_of(silent, probes)[0].seconds > 0
