# SPDX-License-Identifier: Apache-2.0
"""Media in and out: any format and rate, sound and picture in step, one sentence per mistake, nothing half-written."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from PIL import Image

from talkingdit.errors import UserError
from talkingdit.media.files import VideoWriter, check_writable, read_audio, read_image, read_video
from talkingdit.media.sound import sound_blocks

TONE = 440.0


def tone(rate: int, seconds: float = 1.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * TONE * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def click(rate: int, at: float, seconds: float) -> np.ndarray:
    """A short burst of noise in silence."""
    wave = np.zeros(round(rate * seconds), np.float32)
    start = round(at * rate)
    wave[start : start + rate // 100] = np.random.default_rng(0).uniform(-0.9, 0.9, rate // 100)
    return wave


def onset(wave: np.ndarray, rate: int) -> float:
    return float(np.flatnonzero(np.abs(wave) > 0.3 * np.abs(wave).max())[0] / rate)


def pitch(wave: np.ndarray, rate: int) -> float:
    return float(np.fft.rfft(wave * np.hanning(len(wave))).__abs__().argmax() * rate / len(wave))


def pictures(count: int = 32, flash: int = 16, side: int = 96) -> np.ndarray:
    frames = np.full((count, side, side, 3), 30, np.uint8)
    frames[flash] = 240
    return frames


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("a.wav", 8000),
        ("a.wav", 16000),
        ("a.wav", 44100),
        ("a.wav", 11127),
        ("a.flac", 96000),
        ("a.flac", 22050),
        ("a.ogg", 48000),
        ("a.mp3", 44100),
        ("a.mp3", 24000),
    ],
)
def test_every_format_and_rate_gives_the_same_sound_at_the_same_time(tmp_path: Path, name: str, rate: int) -> None:
    path = tmp_path / name
    wave = np.concatenate([np.zeros(rate // 2, np.float32), tone(rate)])
    soundfile.write(path, np.stack([wave, 0.5 * wave], axis=1), rate)
    found = read_audio(path)
    assert found.dtype == np.float32
    assert found.ndim == 1
    assert abs(len(found) - 24000) < 0.06 * 16000  # MP3 pads to whole packets
    assert abs(onset(found, 16000) - 0.5) < 0.01
    assert abs(pitch(found[8000:], 16000) - TONE) < 2
    assert abs(np.sqrt(np.mean(found[10000:22000] ** 2)) - 0.75 * 0.4 / np.sqrt(2)) < 0.02


def test_sound_in_containers_that_only_ffmpeg_reads(tmp_path: Path) -> None:
    import av

    path = tmp_path / "voice.m4a"
    wave = click(44100, 0.7, 2.0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 44100, 0, Fraction(1, 44100)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert abs(onset(read_audio(path), 16000) - 0.7) < 0.01


def test_sound_at_its_own_rate_is_not_touched(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav"), wave)


def make_silent(path: Path) -> None:
    soundfile.write(path, np.zeros(32000), 16000)


def make_without_samples(path: Path) -> None:
    soundfile.write(path, np.zeros(0), 16000)


def make_short(path: Path) -> None:
    soundfile.write(path, tone(16000, 0.05), 16000)


def make_nan(path: Path) -> None:
    soundfile.write(path, np.full(16000, np.nan), 16000, subtype="FLOAT")


def make_text(path: Path) -> None:
    path.write_text("this is not a sound " * 100)


def make_empty(path: Path) -> None:
    path.touch()


def make_silent_video(path: Path) -> None:
    with VideoWriter(path.with_suffix(".mp4"), 16, (32, 32)) as video:
        video.write(np.zeros((3, 32, 32, 3), np.uint8))
    path.with_suffix(".mp4").rename(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_silent, "expected speech, got 2.0 s of silence"),
        (make_without_samples, "expected sound, got a file without samples"),
        (make_short, "expected at least 0.1 s, got 0.050 s"),
        (make_nan, "expected finite samples, got NaN"),
        (make_text, "expected a WAV, FLAC, MP3 or OGG file, got one that cannot be decoded"),
        (make_empty, "expected audio data, got an empty file"),
        (make_silent_video, "expected a sound file, got a file without an audio stream"),
        (Path.mkdir, "expected a file, got a folder"),
        (lambda path: None, "expected an existing file, got none of this name"),
    ],
)
def test_audio_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], None], said: str) -> None:
    path = tmp_path / "voice.wav"
    make(path)
    with pytest.raises(UserError) as caught:
        read_audio(path)
    message = str(caught.value)
    assert said in message
    assert "voice.wav" in message
    assert "\n" not in message


def test_pictures_come_upright_opaque_and_in_rgb(tmp_path: Path) -> None:
    corner = np.zeros((20, 30, 3), np.uint8)
    corner[:10, :10] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    Image.fromarray(corner).save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png")
    assert turned.shape == (30, 20, 3)
    assert turned[2, 17].tolist() == [255, 0, 0]
    assert turned[2, 2].tolist() == [0, 0, 0]

    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2] = (0, 0, 255, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    over_white = read_image(tmp_path / "clear.png")
    assert over_white[0, 0].tolist() == [0, 0, 255]
    assert over_white[3, 3].tolist() == [255, 255, 255]

    Image.fromarray(np.full((4, 4), 30000, np.uint16)).save(tmp_path / "grey16.png")
    assert read_image(tmp_path / "grey16.png")[0, 0].tolist() == [116] * 3
    for name in ("a.jpg", "a.webp", "a.bmp", "a.gif"):
        Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(tmp_path / name)
        assert abs(int(read_image(tmp_path / name)[4, 4, 1]) - 128) <= 2


def make_truncated(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:4000])


def make_truncated_jpeg(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:1500])


def make_sound(path: Path) -> None:
    soundfile.write(path, tone(16000), 16000, format="WAV")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_sound, "expected an image (PNG, JPEG, WebP), got a sound file"),
        (make_silent_video, "expected an image (PNG, JPEG, WebP), got a video"),
        (make_text, "expected an image (PNG, JPEG, WebP), got a file of another kind"),
        (make_truncated, "expected a whole image, got one that cannot be decoded"),
        (make_truncated_jpeg, "expected a whole image, got one that cannot be decoded"),
        (make_empty, "expected image data, got an empty file"),
        (Path.mkdir, "expected a file, got a folder"),
        (lambda path: None, "expected an existing file, got none of this name"),
    ],
)
def test_images_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], None], said: str) -> None:
    path = tmp_path / "portrait.png"
    make(path)
    with pytest.raises(UserError) as caught:
        read_image(path)
    message = str(caught.value)
    assert said in message
    assert "portrait.png" in message
    assert "\n" not in message


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("fps", [16, 25, 23.976])
def test_click_and_flash_stay_where_they_were(tmp_path: Path, rate: int, fps: float) -> None:
    path = tmp_path / "out.mp4"
    flash = round(fps)
    with VideoWriter(path, fps, (96, 96), click(rate, flash / fps, 40 / fps), rate) as video:
        video.write(pictures(40, flash))
    frames, sound, found_fps, found_rate = read_video(path)
    assert sound is not None
    assert len(frames) == 40
    assert abs(found_fps - fps) < 0.01
    assert int(frames.mean(axis=(1, 2, 3)).argmax()) == flash
    assert abs(onset(sound, found_rate) - flash / fps) < 0.01
    assert abs(onset(read_audio(path), 16000) - flash / fps) < 0.01


@pytest.mark.parametrize("seconds", [0.5, 9.0])
def test_sound_is_cut_or_filled_to_the_length_of_the_video(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "out.mp4"
    with VideoWriter(path, 16, (32, 32), tone(16000, seconds), 16000) as video:
        video.write(pictures(32, side=32))
    _, sound, _, rate = read_video(path)
    assert sound is not None
    assert 2.0 <= len(sound) / rate < 2.0 + 1024 / rate + 1e-6  # the last AAC packet is whole
    if seconds < 2:
        assert np.abs(sound[int(0.6 * rate) :]).max() < 0.01
    else:
        assert np.sqrt(np.mean(sound[int(1.5 * rate) : int(1.95 * rate)] ** 2)) > 0.2


def test_a_sound_file_keeps_its_own_rate(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", click(44100, 1.0, 2.0), 44100)
    with VideoWriter(tmp_path / "out.mp4", 16, (32, 32), tmp_path / "a.wav") as video:
        for frame in pictures(32, side=32):
            video.write(frame)
    _, sound, _, rate = read_video(tmp_path / "out.mp4")
    assert sound is not None
    assert rate == 44100
    assert abs(onset(sound, rate) - 1.0) < 0.01


def test_the_file_plays_everywhere_and_colours_survive(tmp_path: Path) -> None:
    import av

    colours = np.zeros((16, 96, 96, 3), np.uint8)
    colours[:, :, :48], colours[:, :, 48:] = (200, 60, 40), (40, 90, 180)
    path = tmp_path / "out.mp4"
    with VideoWriter(path, 16, (96, 96), tone(16000), 16000) as video:
        video.write(colours)
    with av.open(str(path)) as container:
        picture, sound = container.streams.video[0], container.streams.audio[0]
        assert (picture.codec_context.name, picture.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert sound.codec_context.name == "aac"
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # index in front: playback starts while it loads
    decoded = read_video(path)[0].astype(int)
    assert np.abs(decoded[8, 40, 20] - (200, 60, 40)).max() <= 6
    assert np.abs(decoded[8, 40, 76] - (40, 90, 180)).max() <= 6


@pytest.mark.parametrize("method", ["nearest", "lanczos"])
def test_small_pictures_can_be_enlarged(tmp_path: Path, method: str) -> None:
    frames = pictures(4, 1, 33)  # odd: only the enlarged size has to be even
    frames[:, :16] = 250
    with VideoWriter(tmp_path / "out.mp4", 16, (33, 33), upscale=2, resample=method) as video:
        video.write(frames)
    found, sound, _, _ = read_video(tmp_path / "out.mp4")
    assert found.shape == (4, 66, 66, 3)
    assert sound is None
    assert found[2, 10].mean() > 230
    assert found[2, 55].mean() < 60


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")
    video = VideoWriter(path, 16, (96, 96), tone(16000), 16000)
    video.write(pictures(4, 1))
    assert path.read_bytes() == b"old"
    video.close()
    assert len(read_video(path)[0]) == 4
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with VideoWriter(tmp_path / "out.mp4", 16, (96, 96), tone(16000), 16000) as video:
            video.write(pictures(20))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(UserError, match="expected at least one frame, got none"):
        VideoWriter(tmp_path / "out.mp4", 16, (96, 96)).close()
    assert os.listdir(tmp_path) == []


def test_frames_of_another_kind_are_refused(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.mp4", 16, (96, 96)) as video:
        video.write(pictures(1, 0))
        with pytest.raises(ValueError, match=r"frames must be uint8 \(96, 96, 3\).*got float32 \(96, 96, 3\)"):
            video.write(np.zeros((96, 96, 3), np.float32))
        with pytest.raises(ValueError, match=r"got uint8 \(2, 64, 96, 3\)"):
            video.write(np.zeros((2, 64, 96, 3), np.uint8))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": (95, 96)}, "height and width must be even and positive, got 95 x 96"),
        ({"size": (96, 0)}, "got 96 x 0"),
        ({"fps": 0}, "fps must be positive, got 0"),
        ({"upscale": 0}, "expected upscale >= 1"),
        ({"resample": "cubic"}, "'nearest' or 'lanczos', got 1 and 'cubic'"),
        ({"audio": np.zeros((2, 9))}, r"audio must be finite [samples] and not empty, got shape (2, 9)"),
        ({"audio": np.ones(9), "rate": 0}, "the rate of the audio must be positive, got 0"),
        ({"audio": "none.wav"}, "audio 'none.wav': expected an existing file"),
    ],
)
def test_impossible_videos(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(UserError) as caught:
        VideoWriter(tmp_path / "out.mp4", **{"fps": 16, "size": (96, 96), **options})
    assert said in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_targets_are_checked_before_the_work(tmp_path: Path) -> None:
    good = tmp_path / "out.mp4"
    assert check_writable(good) == good
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="expected the name of a file, got a folder"):
        check_writable(tmp_path)
    with pytest.raises(UserError, match=r"nowhere.*expected an existing folder"):
        check_writable(tmp_path / "nowhere" / "out.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="expected an existing folder"):
        check_writable(tmp_path / "file" / "out.mp4")
    with pytest.raises(UserError, match="expected a folder that can be written to"):
        check_writable("/proc/out.mp4")


def test_read_video_refuses_what_is_none(tmp_path: Path) -> None:
    make_sound(tmp_path / "a.wav")
    with pytest.raises(UserError, match="expected a video, got a file without a video stream"):
        read_video(tmp_path / "a.wav")
    make_text(tmp_path / "b.mp4")
    with pytest.raises(UserError, match="expected a video, got a file that cannot be decoded"):
        read_video(tmp_path / "b.mp4")


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "m4a", "mp4"])
def test_a_part_of_a_sound_is_that_part_of_the_whole(tmp_path: Path, kind: str) -> None:
    """Clips of long recordings are read without decoding all of them, and must not be early or late by a sample."""
    seconds = np.arange(5 * 16000) / 16000
    sound = (0.3 * np.sin(900 * seconds + 200 * seconds**2)).astype(np.float32)
    path = tmp_path / f"v.{kind}"
    if kind in ("wav", "flac", "mp3"):
        soundfile.write(path, sound, 16000)
    else:
        with VideoWriter(tmp_path / "v.mp4", 10, (16, 16), audio=sound, rate=16000) as video:
            video.write(np.zeros((50, 16, 16, 3), np.uint8))
        (tmp_path / "v.mp4").rename(path)
    whole = read_audio(path)
    for start, length in ((0.0, 1.0), (0.25, 0.5), (1.5, 2.0), (3.9, 0.75)):
        part = read_audio(path, start=start, seconds=length)
        wanted = whole[round(start * 16000) : round((start + length) * 16000)]
        assert len(part) == len(wanted)
        assert np.abs(part - wanted).max() < 2e-3
    assert len(read_audio(path, start=4.0)) == len(whole) - 4 * 16000
    with pytest.raises(UserError, match="without samples"):
        read_audio(path, start=9.0, seconds=1.0)


@pytest.mark.parametrize("rate", [16000, 24000, 48000])
def test_a_part_of_a_steady_tone_in_an_mp3_is_not_silent(tmp_path: Path, rate: int) -> None:
    """Its frames borrow bits from so many before them that libsndfile begins a part with 0.1 to 0.4 s of silence."""
    path = tmp_path / "tone.mp3"
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 220 * np.arange(8 * rate) / rate), rate)
    whole, _ = soundfile.read(path)
    for start in (2.0, 3.625, 5.5):
        part = np.concatenate(list(sound_blocks(path, None, start, 1.0)))
        wanted = whole[round(start * rate) :][:rate]
        assert len(part) == rate
        assert np.abs(part - wanted).max() < 1e-4


@pytest.mark.parametrize("moment", ["_end", "abort"])
def test_an_interruption_while_a_video_is_ended_leaves_nothing_beside_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    target = tmp_path / "out.mp4"
    target.write_bytes(b"old")
    video = VideoWriter(target, fps=16, size=(16, 16))
    video.write(np.zeros((3, 16, 16, 3), np.uint8))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    if moment == "_end":
        monkeypatch.setattr(video, "_end", interrupted)
    else:  # a second one, while the first is obeyed
        container = video._container
        monkeypatch.setattr(video, "_container", SimpleNamespace(mux=interrupted, close=interrupted))
    with pytest.raises(KeyboardInterrupt):
        video.close()
    video.abort()
    if moment == "abort":
        container.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert target.read_bytes() == b"old"
