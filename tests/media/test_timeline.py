# SPDX-License-Identifier: Apache-2.0
"""One time line: a flash and its beep are at one place, in every container and whatever its clock says."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import struct
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from av_files import FPS, onset, speech, write_av, write_sound

from talkingdit.data.clips import read_frames, times
from talkingdit.data.manifest import read_manifest
from talkingdit.data.probe import Probes, frames_of, media_of, probe
from talkingdit.media.container import MediaFile
from talkingdit.media.files import read_audio, read_video
from talkingdit.media.pose import PoseVideo
from talkingdit.media.reader import Upright, read_pictures, timed_pictures
from talkingdit.media.timeline import timeline

# What people have. The last one is the room for the sound to be late in: AVI does not say what fills up the beginning
# of an MP3 (1,105 samples).
CONTAINERS = {
    "mp4": (("libx264", "aac"), 44100, 0.002),
    "mov": (("libx264", "pcm_s16le"), 48000, 0.002),
    "m4v": (("mpeg4", "aac"), 16000, 0.002),
    "mkv": (("libx264", "aac"), 48000, 0.002),
    "opus.mkv": (("libx264", "libopus"), 48000, 0.002),
    "webm": (("libvpx", "libopus"), 48000, 0.002),
    "ts": (("libx264", "aac"), 44100, 0.002),
    "mp3.ts": (("libx264", "mp2"), 44100, 0.002),
    "avi": (("mpeg4", "pcm_s16le"), 16000, 0.002),
    "mp3.avi": (("libx264", "libmp3lame"), 44100, 1105 / 44100 + 0.002),
    "flv": (("libx264", "aac"), 44100, 0.003),
}
KINDS = [name for name in CONTAINERS if name != "flv"]


def make(tmp_path: Path, kind: str, **more: object) -> Path:
    codecs, rate, _ = CONTAINERS[kind]
    return write_av(tmp_path / f"v.{kind}", codecs, rate, **more)  # type: ignore[arg-type]


def flashes(path: Path) -> list[float]:
    """When bright pictures are shown, on the time line."""
    with MediaFile(path) as source:
        upright = Upright(source.pictures)
        return [float(at) for at, frame in timed_pictures(source) if upright(frame).mean() > 120]


def assert_aligned(path: Path, kind: str, at: float | None = None) -> None:
    """Flash and beep are at one place, for those who read a whole file and for those who read a part."""
    late = CONTAINERS[kind][2]
    (flash,) = flashes(path)
    if at is not None:
        assert abs(flash - at) < 0.07  # the sound may begin a packet earlier than the pictures
    assert -0.002 < onset(read_audio(path, 48000), 48000) - flash < late
    line = timeline(path)
    assert line.pictures is not None
    begins = float(line.pictures)
    found = list(read_pictures(path, [Fraction(flash) + Fraction(k, 100) for k in (-5, -3, 0, 1, 3, 5)]))
    assert [bool(frame.mean() > 120) for frame in found] == [False, False, True, True, False, False]
    # As training reads: frames count from the first one, and the sound from where that is.
    number = round((flash - begins) * FPS)
    (bright,) = read_frames(path, times(0, number, 1, FPS))
    assert bright.mean() > 120
    heard = read_audio(path, 48000, begins + number / FPS - 0.2, 0.4)
    assert -0.002 < onset(heard, 48000) - 0.2 < late
    frames, sound, _, rate = read_video(path)
    assert sound is not None
    assert int(frames.mean(axis=(1, 2, 3)).argmax()) == number
    assert -0.002 < onset(sound, rate) - number / FPS < late


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_flash_and_its_beep_are_at_one_place(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path, kind)
    assert_aligned(path, kind, 1.0)
    found = probe(path)
    assert found.error == ""
    assert found.seconds == pytest.approx(2.0, abs=0.002)
    assert found.sound - found.begins == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(
    ("kind", "begin"),
    [*itertools.product(("mkv", "webm"), (10, 100)), *itertools.product(("ts",), (100, 36000)), ("mp4", 10)],
)
def test_a_clock_may_begin_anywhere(tmp_path: Path, kind: str, begin: float) -> None:
    path = make(tmp_path, kind, begin=begin)
    assert_aligned(path, kind, 1.0)
    assert len(read_audio(path)) / 16000 == pytest.approx(2.0, abs=0.15)
    assert probe(path).seconds == pytest.approx(2.0, abs=0.002)


@pytest.mark.parametrize("early", [0.4, -0.4])
@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts", "webm"])
def test_sound_and_pictures_may_begin_apart(tmp_path: Path, kind: str, early: float) -> None:
    """The time line begins with what is first."""
    path = make(tmp_path, kind, early=early, begin=1.0)
    assert_aligned(path, kind)
    line = timeline(path)
    assert line.pictures is not None
    assert line.sound is not None
    assert float(line.pictures - line.sound) == pytest.approx(early, abs=0.05)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm", "ts"])
def test_lost_sound_is_silence(tmp_path: Path, kind: str) -> None:
    """Packets are missing before the beep, which stays where it is."""
    path = make(tmp_path, kind, lost=(0.3, 0.7))
    assert_aligned(path, kind, 1.0)


@pytest.mark.parametrize(
    ("name", "codec", "form"), [("v.m4a", "aac", "ipod"), ("v.mka", "aac", None), ("v.ts", "aac", None)]
)
@pytest.mark.parametrize("lost", [(1.5, 1.9), (1.5, 1.51)])
def test_a_gap_of_any_length_moves_nothing(
    tmp_path: Path, name: str, codec: str, form: str | None, lost: tuple
) -> None:
    wave = speech(4, 44100)
    whole = write_sound(tmp_path / f"whole-{name}", wave, 44100, codec, form)
    path = write_sound(tmp_path / name, wave, 44100, codec, form, lost=lost)
    found, wanted = read_audio(path), read_audio(whole)
    assert abs(len(found) - len(wanted)) < 32
    for begin, end in ((0.0, 1.4), (2.0, 3.9)):
        one, other = (sound[round(begin * 16000) : round(end * 16000)] for sound in (found, wanted))
        assert max(np.corrcoef(one[8:-8], other[8 + k : len(other) - 8 + k])[0, 1] for k in range(-8, 9)) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_that_part_of_the_whole(tmp_path: Path, kind: str) -> None:
    codecs, rate, _ = CONTAINERS[kind]
    path = write_sound(tmp_path / f"v.{kind}", speech(6, rate), rate, codecs[1], {"m4v": "mp4"}.get(kind))
    whole = read_audio(path)
    for start, seconds in ((0.0, 1.0), (1.3, 0.5), (2.51, 2.0), (4.9, 0.75)):
        part = read_audio(path, start=start, seconds=seconds)
        wanted = whole[round(start * 16000) : round((start + seconds) * 16000)]
        assert len(part) == len(wanted)
        assert np.abs(part - wanted).max() < 2e-3


@pytest.mark.parametrize("begin", [0, 36000])
def test_a_voice_in_a_transport_stream_begins_at_once(tmp_path: Path, begin: float) -> None:
    path = write_sound(tmp_path / "v.ts", speech(4, 44100), 44100, "aac", begin=begin)
    found = read_audio(path)
    assert abs(len(found) / 16000 - 4) < 0.06
    assert onset(found, 16000) < 0.04


def test_a_stream_that_begins_within_a_group_of_pictures_is_aligned(tmp_path: Path) -> None:
    """Pictures before the first key frame are never shown, but their sound is heard."""
    whole = make(tmp_path, "ts", group=20, flash=30)
    data = whole.read_bytes()
    path = tmp_path / "v.ts"
    path.write_bytes(data[len(data) // 188 // 4 * 188 :])
    line = timeline(path)
    assert line.pictures is not None
    assert line.pictures > Fraction(1, 5)
    assert_aligned(path, "ts")
    found = probe(path)
    with MediaFile(path) as source:
        shown = sum(1 for _ in timed_pictures(source))
    assert found.seconds == pytest.approx(shown / FPS, abs=0.001)
    assert found.begins == pytest.approx(float(line.pictures))


def unstamped(path: Path, packets: int) -> None:
    """Take the time stamps off the first packets of the sound of a transport stream, which has packet id 257."""
    data = bytearray(path.read_bytes())
    done = 0
    for at in range(0, len(data), 188):
        pid, start = (data[at + 1] & 0x1F) << 8 | data[at + 2], data[at + 1] & 0x40
        if pid != 257 or not start or done == packets:
            continue
        payload = at + 4 + (1 + data[at + 4] if data[at + 3] & 0x20 else 0)
        assert data[payload : payload + 3] == b"\0\0\1"
        data[payload + 7] &= 0x3F
        done += 1
    assert done == packets
    path.write_bytes(data)


@pytest.mark.parametrize("packets", [1, 2])
def test_first_packets_without_time_stamps_lie_before_the_first_that_has_one(tmp_path: Path, packets: int) -> None:
    path = make(tmp_path, "ts", muxer={"pes_payload_size": "0"})
    unstamped(path, packets)
    assert_aligned(path, "ts", 1.0)


def test_joined_transport_streams_go_on(tmp_path: Path) -> None:
    """The clock starts anew in the middle, for sound and pictures alike."""
    data = make(tmp_path, "ts").read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(data + data)
    one, other = flashes(path)
    assert other - one == pytest.approx(2.0, abs=0.15)
    sound = read_audio(path)
    half = round((one + 0.5) * 16000)
    assert abs(onset(sound[:half], 16000) - one) < 0.005
    assert abs(half / 16000 + onset(sound[half:], 16000) - other) < 0.12
    assert probe(path).seconds == pytest.approx(4.0, abs=0.15)


def test_all_frames_of_a_stream_with_a_clock_of_its_own_are_used(tmp_path: Path) -> None:
    for number, begin in enumerate((0, 100)):
        write_av(tmp_path / f"{number}.ts", ("libx264", "aac"), 16000, pictures=64, begin=begin)
        (tmp_path / "m.jsonl").write_text(f'{{"video": "{number}.ts"}}\n')
        (entry,) = read_manifest(tmp_path / "m.jsonl").entries
        video, sound = media_of(entry, Probes(tmp_path / "m.jsonl"))
        assert frames_of(entry, video, sound, FPS) == 64
        assert len(list(read_frames(entry.video, times(0, 0, 64, FPS)))) == 64


# ---- Pose videos -----------------------------------------------------------------------------------------------------


def greys(path: Path, shown: list[float], begin: float = 0) -> Path:
    """A video whose picture at second t has the grey 40 + 40 t."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        stream.options = {"crf": "5", "preset": "ultrafast", "bf": "0"}
        stream.codec_context.time_base = Fraction(1, 1000)
        for at in shown:
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), round(40 + 40 * at), np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * (at + begin)), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


SHOWN = {
    "10, then 50 per second": [k / 10 for k in range(20)] + [2 + k / 50 for k in range(100)],
    "1.5 s missing": [k / 25 for k in range(38)] + [3 + k / 25 for k in range(25)],
}


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("begin", [0, 5])
@pytest.mark.parametrize("name", SHOWN)
def test_pose_pictures_are_those_of_their_time(tmp_path: Path, name: str, suffix: str, begin: float) -> None:
    shown = SHOWN[name]
    path = greys(tmp_path / f"pose.{suffix}", shown, 0 if suffix == "mp4" else begin)
    clip = next(PoseVideo(path, 16).clips(56, (64, 64)))
    found = (((clip[0].mean((0, 2, 3)) + 1) * 127.5).numpy() - 40) / 40
    for number, at in enumerate(found):
        nearest = min(reversed(shown), key=lambda t: abs(t - number / 16))  # the later of two
        assert abs(at - nearest) < 0.039, number
    later = next(PoseVideo(path, 16).clips(20, (64, 64), first=2))
    assert float((later[:, :, :16] - clip[:, :, 40:56]).abs().max()) < 0.02


def test_a_pose_video_with_sound_is_on_the_line_of_its_voice(tmp_path: Path) -> None:
    """The driving video may be the voice as well: what is seen belongs to what is heard."""
    path = make(tmp_path, "ts", early=0.4, begin=3)
    clip = next(PoseVideo(path, FPS).clips(60, (48, 64)))
    bright = int(clip[0].mean((0, 2, 3)).argmax())
    assert abs(bright / FPS - onset(read_audio(path), 16000)) <= 1 / FPS


# ---- Upright, and square ---------------------------------------------------------------------------------------------

QUADRANTS = np.array([[30, 90], [150, 220]])
MATRICES = {  # a, b, c, d of the display matrix, and what becomes of the quadrants
    "as it is": ((1, 0, 0, 1), QUADRANTS),
    "clockwise": ((0, 1, -1, 0), np.rot90(QUADRANTS, -1)),
    "upside down": ((-1, 0, 0, -1), np.rot90(QUADRANTS, 2)),
    "counter-clockwise": ((0, -1, 1, 0), np.rot90(QUADRANTS)),
    "mirrored": ((-1, 0, 0, 1), QUADRANTS[:, ::-1]),
    "mirrored and turned": ((0, 1, 1, 0), QUADRANTS.T),
}


def quadrants(path: Path, pixel: Fraction = Fraction(1), size: tuple[int, int] = (48, 64)) -> Path:
    import av

    picture = np.repeat(np.kron(QUADRANTS, np.ones((size[0] // 2, size[1] // 2)))[..., None], 3, axis=2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.sample_aspect_ratio = pixel
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def assert_seen(frame: np.ndarray, wanted: np.ndarray) -> None:
    height, width = frame.shape[:2]
    found = [[frame[height * y // 4, width * x // 4].mean() for x in (1, 3)] for y in (1, 3)]
    assert np.abs(np.array(found) - wanted).max() < 12


@pytest.mark.parametrize("name", MATRICES)
def test_everyone_sees_pictures_upright(tmp_path: Path, name: str) -> None:
    path = quadrants(tmp_path / "v.mp4")
    matrix, wanted = MATRICES[name]
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    size = (64, 48) if matrix[0] == 0 else (48, 64)
    clip = next(PoseVideo(path, 25).clips(1, size))
    seen = [read_video(path)[0][0], next(read_frames(path, times(0, 0, 1, 25)))]
    seen.append(((clip[0, :, 0].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8))
    for frame in seen:
        assert frame.shape == (*size, 3)
        assert_seen(frame, wanted)
    assert (probe(path).height, probe(path).width) == size


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("pixel", "size"), [(Fraction(2), (48, 128)), (Fraction(1, 2), (96, 64)), (Fraction(4, 3), (48, 85))]
)
def test_pixels_become_square(tmp_path: Path, suffix: str, pixel: Fraction, size: tuple[int, int]) -> None:
    path = quadrants(tmp_path / f"v.{suffix}", pixel)
    for frame in (read_video(path)[0][0], next(read_frames(path, times(0, 0, 1, 25)))):
        assert frame.shape == (*size, 3)
        assert_seen(frame, QUADRANTS)
    assert (probe(path).height, probe(path).width) == size


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("fps", [10, 16, 25])
def test_as_many_frames_are_read_as_are_counted(tmp_path: Path, suffix: str, fps: int) -> None:
    """Also where the rate changes, and nobody knows how long the last picture is shown."""
    for number, shown in enumerate((SHOWN["10, then 50 per second"][:60], SHOWN["1.5 s missing"])):
        greys(tmp_path / f"{number}.{suffix}", shown)
        (tmp_path / "m.jsonl").write_text(f'{{"video": "{number}.{suffix}", "audio": "none"}}\n')
        (entry,) = read_manifest(tmp_path / "m.jsonl").entries
        video, sound = media_of(entry, Probes(tmp_path / "m.jsonl"))
        count = frames_of(entry, video, sound, fps)
        assert abs(count - (shown[-1] + 0.02) * fps) <= 1 + 0.1 * fps
        assert len(list(read_frames(entry.video, times(0, 0, count, fps)))) == count


def test_a_forked_data_worker_can_free_what_its_parent_has_read(tmp_path: Path) -> None:
    """Scalers with threads made it wait for threads that it does not have."""
    path = make(tmp_path, "mp4")
    with MediaFile(path) as source:
        upright = Upright(source.pictures)
        frames = [frame for _, frame in itertools.islice(timed_pictures(source), 3)]
        assert len({upright(frame).shape for frame in frames}) == 1
    time.sleep(0.1)  # for threads, if there are any, to begin to wait

    def free() -> None:
        frames.clear()
        gc.collect()

    child = multiprocessing.get_context("fork").Process(target=free)
    child.start()
    child.join(30)
    stuck = child.is_alive()
    child.kill()
    assert not stuck
    assert child.exitcode == 0
