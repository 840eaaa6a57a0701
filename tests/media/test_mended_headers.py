# SPDX-License-Identifier: Apache-2.0
"""Sound files of programs that leave something out of a header, or write what FFmpeg takes for something else."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from av_files import speech, write_sound

from talkingdit.errors import UserError
from talkingdit.media import notices
from talkingdit.media.files import read_audio
from talkingdit.media.notices import MediaWarning
from talkingdit.media.timeline import length

WAVE = speech(1.0, 16000)
PCM = np.rint(WAVE * 32767).astype("<i2")
GUID = bytes.fromhex("000000001000800000aa00389b71")  # behind the kind of samples in a WAV of the extensible form


@pytest.fixture(autouse=True)
def _anew() -> None:
    notices.forget()


def chunk(name: bytes, data: bytes, pad: bool = True) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (pad and len(data) % 2)


def form(kind: int = 1, channels: int = 1, rate: int = 16000, bits: int = 16, more: bytes = b"") -> bytes:
    side = channels * bits // 8
    return chunk(b"fmt ", struct.pack("<HHIIHH", kind, channels, rate, rate * side % 2**32, side % 2**16, bits) + more)


def valid(bits: int, of: int) -> bytes:
    """The form of samples of so many bits in places of more."""
    return form(0xFFFE, bits=of, more=struct.pack("<HHIH", 22, bits, 4, 1) + GUID)


def wave(path: Path, *chunks: bytes) -> Path:
    body = b"WAVE" + b"".join(chunks)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    ("suffix", "kind", "codec", "muxer"),
    [
        ("w64", "w64", "pcm_s16le", {}),
        ("aiff", "aiff", "pcm_s16be", {}),
        ("aifc", "aiff", "pcm_f32be", {}),
        ("wav", "wav", "pcm_s16le", {"rf64": "always"}),
    ],
)
def test_what_was_written_to_a_pipe_is_read_whole(
    suffix: str, kind: str, codec: str, muxer: dict[str, str], cut: bool, tmp_path: Path
) -> None:
    """RF64, W64 and AIFF state no sizes then; and cut files as far as they go."""
    whole = write_sound(tmp_path / f"a.{suffix}", WAVE, 16000, codec, kind, muxer=muxer)
    path = write_sound(tmp_path / f"b.{suffix}", WAVE, 16000, codec, kind, muxer=muxer, pipe=True)
    wanted = read_audio(whole)
    np.testing.assert_allclose(wanted, WAVE, atol=1e-4)
    if cut:
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
        wanted = wanted[: len(read_audio(path))]
        assert 11500 < len(wanted) < 12100
    assert np.array_equal(read_audio(path), wanted)


@pytest.mark.parametrize("stated", [1000, 1 << 40])
def test_an_rf64_of_a_wrong_size_is_read_to_its_end(stated: int, tmp_path: Path) -> None:
    size = chunk(b"ds64", struct.pack("<QQQI", stated + 72, stated, stated // 2, 0))
    body = b"WAVE" + size + form() + b"data" + b"\xff" * 4 + PCM.tobytes()
    (tmp_path / "a.wav").write_bytes(b"RF64" + b"\xff" * 4 + body)
    with pytest.warns(MediaWarning, match=r"holds 1\.00 s of sound"):
        found = read_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(found, WAVE, atol=1e-4)


@pytest.mark.parametrize(("bits", "of"), [(24, 32), (20, 24), (12, 16), (20, 32)])
def test_samples_of_fewer_bits_than_their_places(bits: int, of: int, tmp_path: Path) -> None:
    """FFmpeg takes those of 24 bits in 32 for floats: noise of 3e16 times full scale."""
    places = np.rint(WAVE.astype(np.float64) * 2 ** (of - 1)).astype("<i8").reshape(-1, 1).view(np.uint8)
    path = wave(tmp_path / "a.wav", valid(bits, of), chunk(b"data", places[:, : of // 8].tobytes()))
    wanted, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_allclose(wanted, WAVE, atol=2 / 2**bits + 1e-7)
    assert np.array_equal(read_audio(path), wanted)


@pytest.mark.parametrize("pad", [True, False])
def test_a_chunk_of_odd_length_with_and_without_the_byte_behind_it(pad: bool, tmp_path: Path) -> None:
    odd = [chunk(name, b"\0" * count, pad) for name, count in ((b"JUNK", 27), (b"bext", 603))]
    path = wave(tmp_path / "a.wav", odd[0], form(), odd[1], chunk(b"data", PCM.tobytes()))
    np.testing.assert_allclose(read_audio(path), WAVE, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: wave(path, form(channels=65535), chunk(b"data", PCM.tobytes())), "of pcm_s16le, none of which"),
        (lambda path: wave(path, form(rate=1), chunk(b"data", PCM.tobytes())), "expected 1000 to 1000000 samples per"),
        (lambda path: wave(path, form(rate=2**31 - 1), chunk(b"data", PCM.tobytes())), "per second, got 2147483647"),
        (
            lambda path: wave(path, form(3, bits=32), chunk(b"data", (WAVE * 32768).astype("<f4").tobytes())),
            r"expected samples from -1 to 1, got one of [\d.]+; divide them by what full scale is",
        ),
        (os.mkfifo, "expected a file that can be read twice, got a pipe; save it first"),
        (lambda path: path.symlink_to("nowhere"), "got a link that leads to none"),
        (lambda path: path.symlink_to(path), "got a link that leads to none"),
        (lambda path: path.symlink_to("/dev/zero"), "got something else"),
    ],
)  # fmt: skip
def test_what_is_no_recording_is_named(make: Callable[[Path], object], sentence: str, tmp_path: Path) -> None:
    make(tmp_path / "a.wav")
    with pytest.raises(UserError, match=sentence) as caught:
        read_audio(tmp_path / "a.wav")
    assert "\n" not in str(caught.value)


def test_levels_above_full_scale_are_no_reason_to_refuse(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", WAVE * 20, 16000, "FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), WAVE * 20, rtol=1e-6)


def test_a_last_packet_without_a_length_counts(tmp_path: Path) -> None:
    """As WavPack has it in Matroska: half a second of the manifest's clips was lost."""
    long = speech(1.2, 44100)
    path = write_sound(tmp_path / "a.mka", long, 44100, "wavpack", "matroska")
    assert abs(float(length(path).sound) - 1.2) < 0.002
    assert abs(len(read_audio(path)) / 16000 - 1.2) < 0.002


def test_a_length_that_is_not_so_is_told_once_by_whoever_finds_it(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.mp3", speech(1.5, 44100), 44100, "libmp3lame", muxer={"write_xing": "0"})
    path.write_bytes(path.read_bytes() + bytes(100_000))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read_audio(path)
        length(path)
    assert sum("states" in str(item.message) for item in told) == 1
