# SPDX-License-Identifier: Apache-2.0
"""Headers that lie and streams that go on: all that is there is read, what is not is told, once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from av_files import speech, write_av, write_sound

from talkingdit.cli.messages import media_warnings
from talkingdit.data.probe import probe
from talkingdit.errors import UserError
from talkingdit.media import notices
from talkingdit.media.files import read_audio
from talkingdit.media.notices import MediaWarning
from talkingdit.media.sound import sound_blocks

FORMED = {"write_xing": "0", "id3v2_version": "0"}  # an MP3 as a stream is


@pytest.fixture(autouse=True)
def _anew() -> None:
    notices.forget()


def read(path: Path) -> tuple[np.ndarray, list[str]]:
    """The sound at 16 kHz, and what was told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = read_audio(path)
    assert all(item.category is MediaWarning for item in told)
    return found, [str(item.message) for item in told]


def assert_heard(found: np.ndarray, wanted: np.ndarray, at: float, within: float = 0.1) -> None:
    """Around `at` seconds of what was found is what is wanted, at most `within` seconds away."""
    piece = wanted[8000:16000]
    near = found[max(0, round((at + 0.5 - within) * 16000)) :][: len(piece) + round(2 * within * 16000)]
    likeness = np.correlate(near, piece, "valid") / (np.linalg.norm(piece) ** 2)
    assert likeness.max() > 0.9


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((24000, {}), (24000, {})),
        ((44100, FORMED), (44100, FORMED)),
        ((24000, {}), (44100, FORMED)),
        ((16000, FORMED), (22050, {})),
    ],
)
def test_joined_mp3s_are_as_long_as_their_parts(tmp_path: Path, first: tuple, second: tuple) -> None:
    """As streaming speech synthesis writes them; the second part may have a header, or a rate, of its own."""
    path, alone = tmp_path / "joined.mp3", [0.0]
    for number, ((rate, options), seconds) in enumerate(zip((first, second), (4, 6), strict=True)):
        part = write_sound(tmp_path / f"{number}.mp3", speech(seconds, rate), rate, "libmp3lame", muxer=options)
        with path.open("ab") as file:
            file.write(part.read_bytes())
        alone.append(alone[-1] + len(read_audio(part)) / 16000)  # encoders fill up
    found, _ = read(path)
    assert abs(len(found) / 16000 - alone[2]) < 0.12  # what a header says of that is lost in the middle
    assert abs(alone[2] - 10) < 0.12
    assert_heard(found, speech(4, 16000), 0.0)
    assert_heard(found, speech(6, 16000), alone[1], within=0.12)


def test_a_damaged_part_of_an_mp3_is_left_out_and_counted(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "v.mp3", speech(6, 24000), 24000, "libmp3lame")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 700] = b"\xff\xfb\x90\x64" * 175  # as headers without a packet
    path.write_bytes(data)
    found, told = read(path)
    assert abs(len(found) / 16000 - 6) < 0.2
    assert any("of its sound cannot be decoded; left out" in sentence for sentence in told)
    assert read(path)[1] == []  # said once
    assert_heard(found, speech(6, 16000), 0.0)
    assert_heard(found[4 * 16000 :], speech(6, 16000)[4 * 16000 :], 0.0, within=0.2)


def vbr(path: Path) -> Path:
    """Whose first packets are small: their rate tells nothing about the length."""
    wave = speech(10, 44100)
    wave[: 2 * 44100] *= 1e-3
    wave[2 * 44100 :] += 0.2 * np.random.default_rng(0).normal(size=8 * 44100).astype(np.float32)
    return write_sound(path, wave, 44100, "libmp3lame", muxer=FORMED, encoder={"q": "0", "b": "0"})


def adts(path: Path) -> Path:
    wave = speech(10, 44100)
    wave[: 5 * 44100] *= 1e-4
    wave[5 * 44100 :] += 0.2 * np.random.default_rng(0).normal(size=5 * 44100).astype(np.float32)
    return write_sound(path, wave, 44100, "aac", "adts")


def flac_pipe(path: Path) -> Path:
    return write_sound(path, speech(10, 16000), 16000, "flac", "flac", pipe=True)


def ogg_pipe(path: Path) -> Path:
    return write_sound(path, speech(10, 48000), 48000, "libopus", "ogg", pipe=True)


def webm_pipe(path: Path) -> Path:
    return write_sound(path, speech(10, 48000), 48000, "libopus", "webm", muxer={"live": "1"}, pipe=True)


def fragmented(path: Path) -> Path:
    flags = {"movflags": "empty_moov+frag_keyframe+default_base_moof", "frag_duration": "1000000"}
    return write_sound(path, speech(10, 16000), 16000, "aac", "mp4", muxer=flags, pipe=True)


def wave_size(size: int, odd: bool = False) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        soundfile.write(path, speech(10, 16000), 16000, format="WAV")
        data = bytearray(path.read_bytes())
        at = data.index(b"data")
        data[at + 4 : at + 8] = size.to_bytes(4, "little")
        if size in (0, 0xFFFFFFFF):
            data[4:8] = size.to_bytes(4, "little")
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("v.mp3", vbr),
        ("v.aac", adts),
        ("v.flac", flac_pipe),
        ("v.ogg", ogg_pipe),
        ("v.webm", webm_pipe),
        ("v.mp4", fragmented),
        ("zero.wav", wave_size(0)),
        ("full.wav", wave_size(0xFFFFFFFF)),
        ("short.wav", wave_size(32000)),
        ("long.wav", wave_size(10_000_000)),
    ],
)
def test_all_is_read_whatever_the_header_states(tmp_path: Path, name: str, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / name)
    found, told = read(path)
    filled = 0.12 if name == "v.mp4" else 0.06  # by the encoder; fragments do not say how much
    assert abs(len(found) / 16000 - 10) < filled
    assert abs(probe(path).sound - 10) < filled
    assert len(told) <= 1
    if name in ("v.aac", "short.wav"):
        assert "holds 10.0" in told[0]


def test_chunks_behind_the_data_of_a_wave_are_no_sound(tmp_path: Path) -> None:
    path = tmp_path / "v.wav"
    soundfile.write(path, speech(1, 16000), 16000)
    data = path.read_bytes() + b"LIST" + (2000).to_bytes(4, "little") + b"\x55" * 2000
    path.write_bytes(data)
    assert len(read(path)[0]) == 16000


@pytest.mark.parametrize("share", [0.6, 0.99])
def test_a_file_that_is_cut_is_read_as_far_as_it_goes(tmp_path: Path, share: float) -> None:
    path = tmp_path / "v.flac"
    soundfile.write(path, speech(10, 16000), 16000)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    found, told = read(path)
    assert 0.5 * share < len(found) / 160000 < share + 0.1
    np.testing.assert_allclose(found, speech(10, 16000)[: len(found)], atol=1e-4)
    assert any("states 10.00 s, holds" in sentence for sentence in told) or share > 0.9


@pytest.mark.parametrize(("codec", "rate"), [("opus", 48000), ("vorbis", 44100), ("vorbis", 16000)])
def test_chained_oggs_are_as_long_as_their_links(tmp_path: Path, codec: str, rate: int) -> None:
    path = tmp_path / "v.ogg"
    for number in range(3):
        part = tmp_path / f"{number}.ogg"
        soundfile.write(part, speech(2, rate), rate, format="OGG", subtype=codec.upper())
        with path.open("ab") as file:
            file.write(part.read_bytes())
    found, told = read(path)
    assert abs(len(found) / 16000 - 6) < 0.06
    assert ["states" in sentence for sentence in told] == [True]
    for link in range(3):
        assert_heard(found, speech(2, 16000), 2.0 * link, within=0.05)
    part = read_audio(path, start=2.5, seconds=2)
    np.testing.assert_allclose(part, found[40000:72000], atol=1e-3)


def test_a_video_without_a_length_is_measured(tmp_path: Path) -> None:
    path = write_av(tmp_path / "v.webm", ("libvpx", "libopus"), 48000, muxer={"live": "1"})
    found = probe(path)
    assert found.error == ""
    assert found.seconds == pytest.approx(2.0)
    assert found.sound == pytest.approx(2.0, abs=0.02)


def test_blocks_are_the_whole(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "v.m4a", speech(10, 44100), 44100, "aac", "ipod")
    blocks = list(sound_blocks(path))
    assert max(len(block) for block in blocks) < 2 * 16000
    np.testing.assert_array_equal(np.concatenate(blocks), read_audio(path))


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        *(("WAV", kind) for kind in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")),
        *((form, "PCM_24") for form in ("AIFF", "AU", "CAF", "W64", "RF64", "FLAC")),
    ],
)
def test_samples_are_those_that_another_library_reads(tmp_path: Path, form: str, kind: str) -> None:
    path = tmp_path / f"v.{form.lower()}"
    soundfile.write(path, np.stack([speech(0.5, 16000), 0.5 * speech(0.5, 16000)], axis=1), 16000, kind, format=form)
    np.testing.assert_array_equal(read_audio(path), soundfile.read(path, dtype="float32")[0].mean(axis=1))


def test_a_playlist_opens_nothing(tmp_path: Path) -> None:
    write_sound(tmp_path / "v.ts", speech(1, 44100), 44100, "aac")
    path = tmp_path / "v.m3u8"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\nv.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(UserError, match="cannot be decoded"):
        read_audio(path)


def test_a_name_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    soundfile.write(tmp_path / "voice.wav", speech(1, 16000), 16000)
    for name in ("voice:1.wav", "http:voice.wav", "concat:a|b.wav"):
        (tmp_path / name).write_bytes((tmp_path / "voice.wav").read_bytes())
        assert len(read_audio(name)) == 16000


def test_a_wave_of_nothing_but_zeros_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "v.wav"
    with path.open("wb") as file:
        file.write(b"RIFF\0\0\0\0WAVE")
        file.truncate(1 << 32)
    with pytest.raises(UserError, match="cannot be decoded"):
        read_audio(path)


def test_the_command_says_it_in_a_sentence_and_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "v.flac"
    soundfile.write(path, speech(4, 16000), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with media_warnings():
        read_audio(path)
        read_audio(path)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"talkingdit: {path}: ") for line in lines)
    assert sum("states 4.00 s, holds" in line for line in lines) == 1
