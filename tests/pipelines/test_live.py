# SPDX-License-Identifier: Apache-2.0
"""Videos that are watched while they are made, of voices that are heard while they are spoken."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import soundfile
import tiny_families
import torch
from numpy.typing import NDArray
from tiny_checkpoint import make_checkpoint

import talkingdit
from talkingdit.encoders.log_mel import SpeechFeatures
from talkingdit.errors import UserError
from talkingdit.families.gloria import checkpoint as gloria_checkpoint
from talkingdit.families.gloria import pipeline as gloria
from talkingdit.families.gloria.pipeline import GloriaPipeline
from talkingdit.families.puppet.pipeline import PuppetPipeline
from talkingdit.media.files import VideoWriter, read_video
from talkingdit.pipelines import inputs
from talkingdit.pipelines.features import LEVEL_SECONDS, LiveFeatures
from talkingdit.pipelines.live import LiveSound

RATE, FPS, CLIP = 16000, 16, 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of Gloria: chunks of 4 latents that share 2; they hear 13 frames, 21, 29, ... and show 5, 13, 21, ..."""
    folder = tmp_path_factory.mktemp("gloria")
    tiny_families.gloria(folder)
    return folder / "model"


@pytest.fixture(params=["puppet", "gloria"])
def either(request: pytest.FixtureRequest) -> tuple[Path, type, int]:
    """A checkpoint, its pipeline, and the frames that three clips show."""
    if request.param == "gloria":
        return request.getfixturevalue("chunked"), GloriaPipeline, 5 + 2 * CLIP
    return request.getfixturevalue("checkpoint"), PuppetPipeline, 3 * CLIP


@pytest.fixture(scope="module")
def voice() -> NDArray[np.int16]:
    """4.2 s of noise that comes and goes."""
    time = np.arange(round(4.2 * RATE)) / RATE
    noise = np.random.default_rng(1).normal(size=len(time))
    return (0.1 * noise * (1 + np.sin(9 * time)) * 2**14).astype(np.int16)


@pytest.fixture
def portrait(tmp_path: Path) -> Path:
    cv2.imwrite(str(tmp_path / "face.png"), np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    return tmp_path / "face.png"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.uint8]]:
    """The frames that are written, before their compression."""
    written: list[NDArray[np.uint8]] = []
    write = VideoWriter.write

    def record(self: VideoWriter, frames: NDArray[np.uint8]) -> None:
        written.append(frames)
        write(self, frames)

    monkeypatch.setattr(VideoWriter, "write", record)
    return written


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int], None]], None]]:
    """Standard input is a pipe that a function writes to, given its descriptor, in a thread of its own."""
    threads: list[threading.Thread] = []

    def speak(say: Callable[[int], None]) -> None:
        out, into = os.pipe()

        def run() -> None:
            try:
                say(into)
            finally:
                os.close(into)

        monkeypatch.setattr(inputs, "STANDARD_INPUT", out)
        threads.append(threading.Thread(target=run))
        threads[-1].start()

    yield speak
    for thread in threads:
        thread.join()


def generate(portrait: Path, audio: Path | str, output: str, checkpoint: Path, **more: Any) -> Any:
    target = portrait.with_name(output)
    return talkingdit.generate(portrait, audio, target, checkpoint=checkpoint, steps=1, **more)


def put(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def test_an_interrupt_tells_that_what_was_watched_is_there(
    portrait: Path,
    either: tuple[Path, Any, int],
    voice: NDArray[np.int16],
    spoken: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A voice in a pipe is heard once: no clips of it are kept, but the video is."""
    checkpoint, pipeline, _ = either
    denoised = pipeline.denoised

    def interrupted(self: Any, conditions: Any, index: int, *given: Any, **more: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return denoised(self, conditions, index, *given, **more)

    monkeypatch.setattr(pipeline, "denoised", interrupted)
    spoken(lambda pipe: put(pipe, voice.tobytes()))
    with pytest.raises(KeyboardInterrupt, match=r"interrupted; .*live\.mp4 has the video as far as it was made\."):
        generate(portrait, "-", "live.mp4", checkpoint, audio_rate=RATE, live=True)
    assert len(read_video(portrait.with_name("live.mp4"))[0]) > 0


@pytest.mark.parametrize("threads", [1, 2])  # with two, a clip is written while the next one is denoised
def test_a_live_video_is_the_video_and_grows_clip_by_clip(
    portrait: Path,
    either: tuple[Path, Any, int],
    voice: NDArray[np.int16],
    recorded: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
) -> None:
    checkpoint, pipeline, shown = either
    torch.set_num_threads(threads)
    soundfile.write(portrait.with_name("voice.wav"), voice[: 2 * RATE], RATE)
    file, live = portrait.with_name("voice.wav"), portrait.with_name("live.mp4")
    generate(portrait, file, "whole.mp4", checkpoint)
    whole = np.concatenate(recorded)
    denoised, seen = pipeline.denoised, {}

    def watched(self: Any, conditions: Any, index: int, *given: Any, **more: Any) -> Any:
        if threads == 1:
            seen[index] = len(read_video(live)[0]) if live.exists() else 0
        if index == 3:
            raise KeyboardInterrupt
        return denoised(self, conditions, index, *given, **more)

    monkeypatch.setattr(pipeline, "denoised", watched)
    recorded.clear()
    with pytest.raises(KeyboardInterrupt, match="3 of 4 clips are kept"):
        generate(portrait, file, "live.mp4", checkpoint, live=True)
    assert all(index * CLIP - FPS / 2 <= frames <= index * CLIP for index, frames in seen.items())
    assert len(read_video(live)[0]) == shown  # what an interrupt leaves plays to its end
    np.testing.assert_array_equal(np.concatenate(recorded), whole[:shown])

    monkeypatch.setattr(pipeline, "denoised", denoised)
    recorded.clear()
    result = generate(portrait, file, "live.mp4", checkpoint, live=True, sheet=portrait.with_name("sheet.png"))
    np.testing.assert_array_equal(np.concatenate(recorded), whole)
    assert 0 < result.first_after <= result.took
    assert {path.name for path in portrait.parent.iterdir()} == {
        *("face.png", "voice.wav", "whole.mp4", "live.mp4", "sheet.png")
    }


def test_a_voice_is_seen_while_it_is_spoken_and_its_end_is_the_end(
    portrait: Path, either: tuple[Path, Any, int], voice: NDArray[np.int16], recorded: list[Any], spoken: Any
) -> None:
    """The pipe stalls until the first clips can be watched, and ends in the middle of a clip."""
    checkpoint = either[0]
    live, watched = portrait.with_name("slow.mp4"), []

    def slowly(pipe: int) -> None:
        put(pipe, voice[: 13 * RATE // 4].tobytes())
        until = time.monotonic() + 120
        while not live.exists() and time.monotonic() < until:
            time.sleep(0.05)
        watched.append(len(read_video(live)[0]))
        for begin in range(13 * RATE // 4, len(voice), 1000):
            put(pipe, voice[begin : begin + 1000].tobytes())

    spoken(slowly)
    sheet = portrait.with_name("sheet.png")
    result = generate(portrait, "-", "slow.mp4", checkpoint, audio_rate=RATE, sheet=sheet)
    assert watched[0] > 0
    assert result.frames == 68 == len(read_video(live)[0])  # ceil(4.2 s * 16)
    slow, other = np.concatenate(recorded), io.BytesIO()
    assert sheet.exists()

    recorded.clear()
    soundfile.write(other, voice, RATE, format="WAV", subtype="PCM_16")
    spoken(lambda pipe: put(pipe, other.getvalue()))  # at once, in a container
    generate(portrait, "-", "fast.mp4", checkpoint)
    np.testing.assert_array_equal(np.concatenate(recorded), slow)
    sound = read_video(live)[1]
    assert sound is not None
    assert abs(len(sound) / RATE - 4.25) < 0.15


@pytest.mark.parametrize("frames", [7, 13, 14, 21, 30])  # within a chunk, at its end, and one frame behind
def test_a_spoken_voice_gives_the_chunks_of_the_recording(
    portrait: Path,
    chunked: Path,
    voice: NDArray[np.int16],
    recorded: list[Any],
    spoken: Any,
    monkeypatch: pytest.MonkeyPatch,
    frames: int,
) -> None:
    """All of them, the last one too, and the figure over them, where the features are the same."""
    voice, encode, features = voice[: frames * RATE // FPS], gloria.encode_voice, []

    def of_the_recording(*given: Any) -> Any:
        features.extend([] if features else [encode(*given)])
        return features[0]

    monkeypatch.setattr(gloria, "encode_voice", of_the_recording)
    soundfile.write(portrait.with_name("voice.wav"), voice, RATE, subtype="PCM_16")
    figures = portrait.with_name("file.png"), portrait.with_name("pipe.png")
    generate(portrait, portrait.with_name("voice.wav"), "file.mp4", chunked, attention_figure=figures[0])
    whole = np.concatenate(recorded)
    assert len(whole) == frames
    recorded.clear()

    def slowly(pipe: int) -> None:
        heard = 13 * RATE // FPS + 1  # one sample more than the first chunk hears
        put(pipe, voice[:heard].tobytes())
        until = time.monotonic() + 120
        while len(voice) > heard and not recorded and time.monotonic() < until:
            time.sleep(0.05)
        assert recorded or len(voice) <= heard  # a chunk is made before the sound of the next one is there
        put(pipe, voice[heard:].tobytes())

    spoken(slowly)
    generate(portrait, "-", "pipe.mp4", chunked, audio_rate=RATE, live=True, attention_figure=figures[1])
    np.testing.assert_array_equal(np.concatenate(recorded), whole)
    rows = [figure.with_suffix(".csv").read_text() for figure in figures]
    assert rows[0] == rows[1]
    assert len(rows[0].splitlines()) == 1 + 1 + -(-(frames - 1) // 4)  # names, and latents


def test_a_spoken_voice_is_seen_no_longer_than_asked_for(
    portrait: Path, chunked: Path, voice: NDArray[np.int16], spoken: Any
) -> None:
    spoken(lambda pipe: put(pipe, voice.tobytes()))
    assert generate(portrait, "-", "out.mp4", chunked, audio_rate=RATE, frames=18).frames == 18
    assert len(read_video(portrait.with_name("out.mp4"))[0]) == 18


def test_a_chunk_is_seen_latent_by_latent(portrait: Path, chunked: Path, voice: NDArray[np.int16]) -> None:
    pipe = talkingdit.TalkingPipeline.from_pretrained(chunked)
    given = (voice[: 14 * RATE // FPS].astype(np.float32) / 2**15, RATE)
    spans = pipe.stream(image=portrait, audio=given, steps=1)
    assert [len(span.frames) for span in spans] == [1, 4, 4, 4, 1]


def test_features_of_a_spoken_voice_are_those_of_the_recording(
    tmp_path: Path, voice: NDArray[np.int16], spoken: Any
) -> None:
    encoder, samples = SpeechFeatures(fps=FPS), voice.astype(np.float32) / 2**15
    spoken(lambda pipe: put(pipe, voice.tobytes()))
    features = LiveFeatures(encoder, LiveSound(inputs.STANDARD_INPUT, tmp_path, RATE), FPS)
    level = encoder.level([samples[: LEVEL_SECONDS * RATE]])
    wanted = encoder.part(level(samples), 0, len(samples), 0, 80)  # silence behind its end
    got = np.concatenate([features[..., first : first + 8].numpy() for first in range(0, 80, 8)], axis=2)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)
    assert features.shape[:2] == (encoder.layers, encoder.audio_dim)


def test_another_rate_is_brought_to_that_of_speech(tmp_path: Path, spoken: Any) -> None:
    tone = np.sin(2 * np.pi * 300 * np.arange(48000) / 48000)
    spoken(lambda pipe: put(pipe, (tone * 2**14).astype("<i2").tobytes()))
    sound = LiveSound(inputs.STANDARD_INPUT, tmp_path, 48000)
    got = sound[0 : 2 * RATE]
    assert sound.ended
    assert abs(len(got) - RATE) <= 1
    wanted = 0.5 * np.sin(2 * np.pi * 300 * np.arange(len(got)) / RATE)
    assert np.abs(got - wanted)[200:-200].max() < 1e-3


def test_who_waits_for_a_voice_that_stalls_is_told_what_goes_wrong_meanwhile(tmp_path: Path, spoken: Any) -> None:
    told = threading.Event()

    def stall(pipe: int) -> None:
        put(pipe, b"\0" * 2 * RATE)
        told.wait(60)

    spoken(stall)
    sound = LiveSound(inputs.STANDARD_INPUT, tmp_path, RATE)
    assert sound.wait(RATE) == RATE

    def check() -> None:
        raise UserError("the reader has gone")

    with pytest.raises(UserError, match="the reader has gone"):
        sound.wait(2 * RATE, check)
    told.set()


def test_a_pipe_with_too_little_sound_is_told_before_a_model_is_loaded(
    portrait: Path, voice: NDArray[np.int16], spoken: Any, chunked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gloria_checkpoint, "load_checkpoint", None)
    spoken(lambda pipe: put(pipe, voice[:300].tobytes()))
    with pytest.raises(UserError, match=r"audio -: expected at least 0\.1 s, got 0\.019 s\."):
        generate(portrait, "-", "out.mp4", chunked, audio_rate=RATE)
    assert {path.name for path in portrait.parent.iterdir()} == {"face.png"}


@pytest.mark.parametrize("data", [b"", b"no sound at all, and no container either"])
def test_a_pipe_without_sound_is_told(portrait: Path, checkpoint: Path, spoken: Any, data: bytes) -> None:
    spoken(lambda pipe: put(pipe, data))
    with pytest.raises(UserError, match=r"audio -: expected sound, raw with `--audio-rate` or in a container, got "):
        generate(portrait, "-", "out.mp4", checkpoint)
    assert {path.name for path in portrait.parent.iterdir()} == {"face.png"}
