# SPDX-License-Identifier: Apache-2.0
"""The sound of a video is the given one: its packets where an MP4 may hold them, all channels in any case."""

from __future__ import annotations

import hashlib
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
from av_files import beeping, onset, speech, write_av, write_sound

from talkingdit.errors import UserError
from talkingdit.media.container import MediaFile
from talkingdit.media.files import VideoWriter, read_audio, read_video
from talkingdit.media.sound import channel_blocks, survey
from talkingdit.media.track import EncodedTrack

FPS = 25


def packets(path: Path) -> list[bytes]:
    """Digests of the packets of the sound."""
    with MediaFile(path) as source:
        return [hashlib.sha256(bytes(p)).digest() for p in source.packets(source.need_sound()) if p.size]


def channels(path: Path) -> np.ndarray:
    """All of the sound, [samples, channels], at 48 kHz."""
    return np.concatenate(list(channel_blocks(path, 48000)))


def film(path: Path, audio: Path | np.ndarray, pictures: int = 50, **more: object) -> Path:
    with VideoWriter(path, FPS, (32, 32), audio, **more) as video:  # type: ignore[arg-type]
        video.write(np.zeros((pictures, 32, 32, 3), np.uint8))
    return path


def two_voices(seconds: float, rate: int) -> np.ndarray:
    """Left and right differ: [2, samples]."""
    left = beeping(seconds, rate, 0.5) + 0.1 * speech(seconds, rate)
    return np.stack([left, 0.5 * beeping(seconds, rate, 1.2)])


COPIED = {
    "m4a": ("aac", 44100, "ipod"),
    "aac": ("aac", 48000, "adts"),
    "ts": ("aac", 44100, None),
    "mka": ("aac", 16000, None),
    "mp3": ("libmp3lame", 44100, None),
    "low.mp3": ("libmp3lame", 24000, None),
    "opus": ("libopus", 48000, None),
    "webm": ("libopus", 48000, None),
    "flac": ("flac", 48000, None),
    "alac.m4a": ("alac", 44100, "ipod"),
    "ac3": ("ac3", 48000, None),
}


@pytest.mark.parametrize("name", COPIED)
def test_packets_are_copied_and_heard_where_they_were(tmp_path: Path, name: str) -> None:
    codec, rate, form = COPIED[name]
    layout = "mono" if codec == "alac" else "stereo"
    wave = two_voices(2, rate)[: 1 if layout == "mono" else 2]
    path = write_sound(tmp_path / f"v.{name}", wave, rate, codec, form, layout)
    out = film(tmp_path / "out.mp4", path, pictures=60)
    given, found = packets(path), packets(out)
    if name in ("aac", "ts"):  # frames of their own framing, which an MP4 does not have
        assert len(found) == len(given)
    else:
        assert found == given
    one, other = channels(path), channels(out)
    assert one.shape[1] == other.shape[1]
    assert abs(len(one) - len(other)) <= 48000 // 8  # ends of encoders
    common = min(len(one), len(other)) - 4800
    assert np.abs(one[:common] - other[:common]).max() < 2e-3


@pytest.mark.parametrize("name", ["wav", "vorbis.ogg", "low.wav", "8000.mp3"])
def test_what_an_mp4_may_not_hold_is_encoded_with_its_channels(tmp_path: Path, name: str) -> None:
    rate = {"wav": 44100, "vorbis.ogg": 44100, "low.wav": 11025, "8000.mp3": 8000}[name]
    path = tmp_path / f"v.{name}"
    soundfile.write(path, two_voices(2, rate).T, rate)
    out = film(tmp_path / "out.mp4", path)
    with MediaFile(out) as source:
        assert source.need_sound().codec_context.name == "aac"
    one, other = channels(path)[:90000], channels(out)[:90000]
    assert other.shape[1] == 2
    for channel, at in ((0, 0.5), (1, 1.2)):
        assert abs(onset(one[:, channel], 48000) - at) < 0.012
        assert abs(onset(other[:, channel], 48000) - onset(one[:, channel], 48000)) < 0.002
        assert np.std(other[:, channel]) == pytest.approx(np.std(one[:, channel]), rel=0.1)


def test_more_channels_than_two_stay_apart(tmp_path: Path) -> None:
    """Also the fourth of six, which in AAC would be a bass loudspeaker's."""
    wave = np.stack([beeping(2, 16000, 0.2 + 0.25 * channel) for channel in range(6)])
    soundfile.write(tmp_path / "v.wav", wave.T, 16000)
    found = channels(film(tmp_path / "out.mp4", tmp_path / "v.wav"))
    assert found.shape[1] == 6
    for channel in range(6):
        assert abs(onset(found[:, channel], 48000) - 0.2 - 0.25 * channel) < 0.001
        assert np.abs(found[:, channel]).max() > 0.7


@pytest.mark.parametrize("name", ["m4a", "mp3", "opus", "mka", "flac"])
def test_a_beginning_can_be_left_out(tmp_path: Path, name: str) -> None:
    """To the sample, although packets are whole: players are told where to begin."""
    codec, rate, form = COPIED[name]
    path = write_sound(tmp_path / f"v.{name}", speech(2, rate), rate, codec, form)
    out = film(tmp_path / "out.mp4", path, pictures=40, skip=Fraction(3, 16))
    assert set(packets(out)) <= set(packets(path))
    wanted = read_audio(path, 48000, Fraction(3, 16), 1.4)
    found = read_audio(out, 48000, 0, 1.4)
    best = max(range(-48, 49), key=lambda k: float(wanted[4800:48000] @ found[4800 + k : 48000 + k]))
    assert abs(best) <= 1
    assert np.abs(found[9600 + best : 60000 + best] - wanted[9600:60000]).max() < 5e-3


@pytest.mark.parametrize("name", ["m4a", "mp3", "wav"])
def test_the_sound_ends_with_the_video(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"v.{name}"
    if name == "wav":
        soundfile.write(path, speech(5, 44100), 44100)
    else:
        write_sound(path, speech(5, 44100), 44100, *COPIED[name][::2])
    _, sound, _, rate = read_video(film(tmp_path / "out.mp4", path))
    assert sound is not None
    assert 2.0 <= len(sound) / rate < 2.0 + 1152 / rate + 1e-6


@pytest.mark.parametrize("kind", ["gap", "damaged", "joined"])
def test_sound_that_is_not_whole_is_mended(tmp_path: Path, kind: str) -> None:
    """Players would go on where packets are missing, and lose the pictures."""
    if kind == "gap":
        wave = beeping(3, 44100, 1.5)
        path = write_sound(tmp_path / "v.m4a", wave, 44100, "aac", "ipod", lost=(0.5, 1.0))
    else:
        path = write_sound(tmp_path / "v.mp3", beeping(3, 44100, 1.5), 44100, "libmp3lame")
        data = bytearray(path.read_bytes())
        if kind == "damaged":
            data[6000:7000] = b"\xff\xfb\x90\x64" * 250
            path.write_bytes(data)
        else:
            other = write_sound(tmp_path / "o.mp3", speech(1, 24000), 24000, "libmp3lame")
            path.write_bytes(bytes(data) + other.read_bytes())
    assert not (survey(path).whole and survey(path).rate)
    out = film(tmp_path / "out.mp4", path, pictures=75)
    with MediaFile(out) as source:
        assert source.need_sound().codec_context.name == "aac"
    assert abs(onset(read_audio(out), 16000) - onset(read_audio(path), 16000)) < 0.003


def test_the_voice_may_be_a_video(tmp_path: Path) -> None:
    path = write_av(tmp_path / "v.ts", ("libx264", "aac"), 44100, early=0.2, begin=7)
    out = film(tmp_path / "out.mp4", path)
    assert abs(onset(read_audio(out), 16000) - onset(read_audio(path), 16000)) < 0.002


# ---- What the model hears --------------------------------------------------------------------------------------------


def stereo(tmp_path: Path, wave: np.ndarray, rate: int = 48000) -> dict[str, np.ndarray]:
    """What the model hears of [2, samples] in files of all kinds."""
    soundfile.write(tmp_path / "v.wav", wave.T, rate)
    soundfile.write(tmp_path / "v.flac", wave.T, rate)
    write_sound(tmp_path / "v.mka", wave, rate, "flac", layout="stereo")
    write_sound(tmp_path / "v.mov", wave, rate, "pcm_s16le", layout="stereo")
    write_sound(tmp_path / "v.m4a", wave, rate, "aac", "ipod", "stereo", encoder={"b": "320000"})
    write_sound(tmp_path / "v.mp3", wave, rate, "libmp3lame", layout="stereo", encoder={"b": "320000"})
    return {name: read_audio(tmp_path / f"v.{name}") for name in ("wav", "flac", "mka", "mov", "m4a", "mp3")}


def test_the_mix_is_the_same_whatever_the_container(tmp_path: Path) -> None:
    wave = np.stack([speech(1, 48000), 0.3 * speech(1.5, 48000)[24000:]])
    found = stereo(tmp_path, wave)
    soundfile.write(tmp_path / "mean.wav", wave.mean(axis=0), 48000)
    wanted = read_audio(tmp_path / "mean.wav")
    for name, sound in found.items():
        lossy = name in ("m4a", "mp3")
        assert np.std(sound[:15000]) == pytest.approx(np.std(wanted[:15000]), rel=0.02), name
        assert np.abs(sound[:15000] - wanted[:15000]).max() < (0.05 if lossy else 1e-4), name


def test_antiphase_is_not_silence(tmp_path: Path) -> None:
    """A microphone wired the wrong way round: the mean of both channels is nothing, each of them is the voice."""
    wave = speech(1, 48000)
    for name, sound in stereo(tmp_path, np.stack([0.9 * wave, -0.9 * wave])).items():
        assert np.std(sound[:15000]) == pytest.approx(0.9 * np.std(wave), rel=0.05), name
    soundfile.write(tmp_path / "silent.wav", np.zeros((48000, 2)), 48000)
    with pytest.raises(UserError, match="s of silence"):
        read_audio(tmp_path / "silent.wav")


def test_a_part_is_mixed_as_the_whole(tmp_path: Path) -> None:
    wave = speech(4, 16000)
    soundfile.write(tmp_path / "v.wav", np.stack([wave, -0.98 * wave], axis=1), 16000, subtype="FLOAT")
    whole = read_audio(tmp_path / "v.wav")
    np.testing.assert_allclose(whole, wave, atol=1e-6)
    np.testing.assert_allclose(read_audio(tmp_path / "v.wav", start=2.5, seconds=1), wave[40000:56000], atol=1e-6)


def test_a_voice_on_one_of_many_channels_is_heard(tmp_path: Path) -> None:
    wave = np.zeros((16000, 6))
    wave[:, 2] = speech(1, 16000)
    soundfile.write(tmp_path / "v.wav", wave, 16000)
    np.testing.assert_allclose(read_audio(tmp_path / "v.wav"), wave.mean(axis=1), atol=1e-4)


def test_a_video_of_a_voice_is_the_voice_again(tmp_path: Path) -> None:
    """What was made is read as what was given: a second round changes nothing."""
    path = write_sound(tmp_path / "v.m4a", two_voices(2, 44100), 44100, "aac", "ipod", "stereo")
    once = film(tmp_path / "once.mp4", path)
    twice = film(tmp_path / "twice.mp4", once)
    shutil.copy(once, tmp_path / "copy.mp4")
    assert packets(twice) == packets(once)
    np.testing.assert_allclose(read_audio(once)[:31000], read_audio(path)[:31000], atol=1e-3)


def test_the_sound_of_hours_is_not_copied_for_every_packet() -> None:
    """An array is one block: to copy the rest of it 56,000 times an hour takes longer than the video."""
    samples = np.linspace(-1, 1, 5000, dtype=np.float32)[:, None]
    track = EncodedTrack(iter([samples]), 16000, 1)
    pieces = [track._next(1024) for _ in range(4)]
    assert all(np.shares_memory(piece, samples) for piece in pieces)
    rest = track._next(1024)
    assert np.array_equal(np.concatenate([*pieces, rest])[:5000], samples)
    assert not rest[5000 - 4096 :].any()
