# SPDX-License-Identifier: Apache-2.0
"""A long voice is kept on disk and heard in windows: the same video, in constant memory, and clear words without it."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import soundfile
import torch
from tiny_checkpoint import make_checkpoint
from tiny_s2v import AUDIO_DIM, LAYERS, Voice

import talkingdit
from talkingdit.distributed.team import ALONE, Team
from talkingdit.encoders import speech
from talkingdit.encoders.log_mel import SpeechFeatures
from talkingdit.errors import UserError
from talkingdit.families.puppet.preview import MouthCurves
from talkingdit.families.puppet.text import PromptEncoder
from talkingdit.media.files import VideoWriter
from talkingdit.pipelines.features import StoredFeatures, encode_voice
from talkingdit.pipelines.inputs import Inputs, Job, read_voice
from talkingdit.pipelines.rows import Rows

SECONDS = 9


@pytest.fixture
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("WHOLE_SECONDS", 4), ("OVERLAP_SECONDS", 2), ("FADE_SECONDS", 1)):
        monkeypatch.setattr(speech, name, seconds)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    cv2.imwrite(str(tmp_path / "face.png"), np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    soundfile.write(tmp_path / "voice.wav", 0.1 * np.random.default_rng(1).normal(size=16000 * SECONDS), 16000)
    return tmp_path


def inputs_of(work: Path) -> Inputs:
    job = Job(image=work / "face.png", audio=work / "voice.wav", output=work / "out.mp4")
    return Inputs(job, np.zeros((8, 8, 3), np.uint8), read_voice(job.audio, work))


# ---- Rows on disk ----------------------------------------------------------------------------------------------------


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    wanted = np.random.default_rng(0).normal(size=(1000, 3, 5)).astype(np.float32)
    rows = Rows(tmp_path, (3, 5))
    assert rows.shape == (0, 3, 5)
    assert rows[:].shape == (0, 3, 5)
    for part in np.split(wanted, [1, 7, 7, 600]):
        rows.append(part)
    np.testing.assert_array_equal(rows[:], wanted)
    for part in (slice(3, 8), slice(-5, None), slice(990, 2000), slice(8, 3), slice(0, 0)):
        np.testing.assert_array_equal(rows[part], wanted[part])
    np.testing.assert_array_equal(np.asarray(rows), wanted)
    with pytest.raises(ValueError, match="no steps"):
        rows[::2]
    with pytest.raises(ValueError, match="rows must be float32"):
        rows.append(wanted[:, :2])


def test_rows_have_no_name_and_go_with_the_process_that_made_them(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    rows.append(np.ones(10, np.float32))
    assert not list(tmp_path.iterdir())
    copy = pickle.loads(pickle.dumps(rows))
    assert len(copy) == 10
    with pytest.raises(RuntimeError, match="the process that made them"):
        copy[:]


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    rows = Rows(tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"does not fit there \(No space left on device\)"):
        rows.append(np.ones(10, np.float32))
    with pytest.raises(UserError, match="expected a folder that can be written to"):
        Rows(tmp_path / "none")


# ---- The same video --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_short_windows")
def test_a_long_voice_and_its_features_lie_on_disk(work: Path) -> None:
    inputs = inputs_of(work)
    assert isinstance(inputs.sound, Rows)
    encoder = SpeechFeatures(16)
    found = encode_voice(encoder, inputs, 16 * SECONDS + 5, 16, ALONE)
    assert isinstance(found, StoredFeatures)
    whole = encoder.features(np.asarray(inputs.sound), 16 * SECONDS + 5)
    assert found.shape == whole.shape
    torch.testing.assert_close(found[..., 30:149], whole[..., 30:149], rtol=1e-5, atol=1e-5)
    # An encoder in half precision gets its dtype back.
    half = StoredFeatures(work, whole.bfloat16())
    torch.testing.assert_close(half[..., 3:5], whole.bfloat16()[..., 3:5], rtol=0, atol=0)


@pytest.mark.usefixtures("_short_windows")
def test_an_encoder_of_windows_that_it_knows_nothing_of(work: Path) -> None:
    inputs = inputs_of(work)
    found = encode_voice(Voice(), inputs, 16 * SECONDS, 16, ALONE)
    assert found.shape == (LAYERS, AUDIO_DIM, 16 * SECONDS)
    whole = Voice().features(np.asarray(inputs.sound), 16 * SECONDS)
    torch.testing.assert_close(found[..., : 16 * SECONDS], whole)


def shared(folder: str) -> list[torch.Tensor]:
    """On one of several processes, of which rank 0 alone has the voice."""
    team = Team.start()
    inputs = team.on_rank_0(lambda: inputs_of(Path(folder)))
    found = encode_voice(SpeechFeatures(16), inputs, 160, 16, team)
    assert found.shape == (2, 160, 160)
    return [found[..., first : first + 32] for first in range(0, 160, 32)]


def test_every_process_gets_the_features_of_a_clip(work: Path, processes: Any) -> None:
    whole = SpeechFeatures(16).features(np.asarray(inputs_of(work).sound), 160)
    for clips in processes(2, shared, str(work), timeout=240.0):
        torch.testing.assert_close(torch.cat(clips, dim=2), whole, rtol=0, atol=0)


def test_the_video_of_a_long_voice_is_that_of_the_whole(
    work: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), steps=1)
    written: list[np.ndarray] = []
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames, write=VideoWriter.write: (
        written.append(frames), write(self, frames)))  # fmt: skip
    videos = []
    for seconds in (600, 4):
        monkeypatch.setattr(speech, "WHOLE_SECONDS", seconds)
        monkeypatch.setattr(speech, "OVERLAP_SECONDS", 2)
        monkeypatch.setattr(speech, "FADE_SECONDS", 1)
        talkingdit.generate(
            work / "face.png", work / "voice.wav", work / "out.mp4", checkpoint=checkpoint, sheet=work / "sheet.png"
        )
        videos.append(np.concatenate(written))
        written.clear()
    assert len(videos[0]) == 16 * SECONDS
    assert np.abs(videos[0].astype(int) - videos[1]).max() <= 1  # the rounding of features made in other batches
    assert {path.name for path in work.iterdir()} == {"face.png", "voice.wav", "out.mp4", "sheet.png"}


def test_the_mouth_of_a_voice_is_measured_in_parts(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound, curves = inputs_of(work).sound, []
    for seconds in (60, 2):
        monkeypatch.setattr("talkingdit.families.puppet.preview.PART_SECONDS", seconds)
        mouth = MouthCurves()
        mouth._openings.append(np.zeros(16 * SECONDS + 40, np.float32))  # also behind the end of the sound
        curves.append(mouth.curves(sound, 16)["mouth of the voice"])
    assert curves[0].std() > 0.01
    np.testing.assert_allclose(curves[1], curves[0], atol=1e-6)


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_too_little_memory_for_a_part_is_told_by_its_name(
    work: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint"))

    def told(error: BaseException, owner: type, name: str) -> str:
        def full(*_: Any, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(UserError) as raised:
                talkingdit.generate(work / "face.png", work / "voice.wav", work / "out.mp4", checkpoint=checkpoint)
        assert {path.name for path in work.iterdir()} == {"face.png", "voice.wav"}
        return str(raised.value)

    card = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    host = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")
    for error in (card, host, MemoryError()):
        said = told(error, SpeechFeatures, "features")
        assert "memory is too small for the speech encoder, which hears 9 s of the voice at once" in said
        assert "--sequential" not in said
        assert "what all clips share" in told(error, PromptEncoder, "encode")
    with pytest.raises(RuntimeError, match="another matter"):
        told(RuntimeError("another matter"), SpeechFeatures, "features")


CHILD = """
import resource, sys
import talkingdit
work, output, checkpoint, *voices = sys.argv[1:]
for voice in voices:
    talkingdit.generate(work + "/face.png", voice, output, checkpoint=checkpoint, sheet=output + ".png")
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_voice(work: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = make_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), steps=1, text_guidance=1.0, audio_guidance=1.0, clip_latents=8
    )
    voices = [str(work / "20.wav"), str(work / "240.wav")]
    for seconds, voice in zip((20, 240), voices, strict=True):
        soundfile.write(voice, 0.1 * np.random.default_rng(2).normal(size=16000 * seconds), 16000)
    command = [sys.executable, "-c", CHILD, str(work), str(work / "out.mp4"), str(checkpoint), *voices]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
    assert len(peaks) == 2
    assert peaks[1] < 1.2 * peaks[0], peaks
