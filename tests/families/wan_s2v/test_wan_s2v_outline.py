# SPDX-License-Identifier: Apache-2.0
"""Files of a Wan-S2V video: which frame is seen while which sound is heard, and how long it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import soundfile
import torch
from tiny_s2v import make_s2v

from talkingdit import families
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.checkpoint import WanS2VSettings
from talkingdit.families.wan_s2v.options import Options
from talkingdit.families.wan_s2v.outline import VideoLength, video_length, video_size
from talkingdit.families.wan_s2v.pipeline import VideoConditions, WanS2VPipeline
from talkingdit.media.files import VideoWriter, read_video
from talkingdit.pipelines.inputs import Job, read_inputs
from talkingdit.pipelines.job import Talk, make_video
from talkingdit.pipelines.long_video import GeneratedClip

CLICKS = (9, 17, 25)  # audio frames, of 1000 samples at 16 kHz


def numbered(
    pipeline: WanS2VPipeline, conditions: VideoConditions, index: int, carry: Any, *, last: bool, progress: Any
) -> GeneratedClip:
    """A clip whose frames show the number of their audio frame: grey 20 + 6 n."""
    sampling, size = conditions.sampling, conditions.sampling.clip_frames
    begin = sampling.dropped if index == 0 else index * size
    numbers = torch.arange(begin, min(conditions.audio_frames, (index + 1) * size)).float()
    greys = ((20 + 6 * numbers) / 127.5 - 1).view(1, 1, -1, 1, 1)
    return GeneratedClip(index, greys.expand(1, 3, -1, *conditions.pixels.shape[3:]), {"history": torch.zeros(1)})


def shown(path: Path) -> list[int]:
    """Which audio frame each picture of the video belongs to."""
    return [round((float(picture.mean()) - 20) / 6) for picture in read_video(path)[0]]


def heard(path: Path) -> list[float]:
    """Which picture is seen when each click begins, in pictures from the beginning of the video."""
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        parts = [(float(frame.time), frame.to_ndarray().mean(0)) for frame in container.decode(audio=0)]
    sound = np.concatenate([values for _, values in parts])
    times = np.concatenate([begin + np.arange(len(values)) / rate for begin, values in parts])
    loud = times[np.abs(sound) > 0.3]
    starts = loud[np.diff(loud, prepend=-1.0) > 0.2]
    return [float(start) * 16 for start in starts]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(WanS2VPipeline, "clip", numbered)
    cv2.imwrite(str(tmp_path / "face.png"), np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    sound = 1e-3 * np.random.default_rng(1).normal(size=30500)
    for click in CLICKS:
        sound[click * 1000 : click * 1000 + 300] = 0.9 * np.sign(np.sin(np.arange(300) * 0.4))
    soundfile.write(tmp_path / "voice.wav", sound, 16000)
    return tmp_path


def make(work: Path, said: list[str] | None = None, **options: Any) -> Path:
    job = Job(image=work / "face.png", audio=work / "voice.wav", output=work / "out.mp4")
    family, checkpoint = families.get("wan_s2v"), make_s2v()
    inputs = read_inputs(job)
    outline = family.outline.outline(inputs, checkpoint.settings, Options(**{"clip_frames": 16} | options))
    talk = None if said is None else Talk(warn=said.append)
    result = make_video(inputs, outline, family.pipeline.open_pipeline(checkpoint), talk=talk)
    assert result.frames == len(shown(result.path))
    return result.path


def seen_while_heard(path: Path) -> list[int]:
    pictures = shown(path)
    return [pictures[int(place + 0.1)] for place in heard(path)]


def test_every_picture_is_seen_while_its_sound_is_heard(work: Path) -> None:
    path = make(work)
    assert shown(path) == [3, 3, 3, *range(3, 31)]
    assert seen_while_heard(path) == list(CLICKS)


def test_the_beginning_is_cut_from_sound_and_video_alike(work: Path) -> None:
    path = make(work, opening="cut")
    assert shown(path) == list(range(3, 31))
    assert seen_while_heard(path) == list(CLICKS)
    assert heard(path) == pytest.approx([click - 3 for click in CLICKS], abs=0.1)


def test_officially_pictures_are_three_early(work: Path) -> None:
    path = make(work, official_timing=True)
    assert shown(path) == list(range(3, 32))
    assert seen_while_heard(path) == [click + 3 for click in CLICKS]
    assert heard(path) == pytest.approx(CLICKS, abs=0.1)


def test_a_video_that_starts_from_the_portrait_lacks_nothing(work: Path) -> None:
    path = make(work, start_from_reference=True)
    assert shown(path) == list(range(31))
    assert seen_while_heard(path) == list(CLICKS)


def test_a_voice_can_be_cut_short_by_frames_or_clips(work: Path) -> None:
    assert shown(make(work, frames=12)) == [3, 3, 3, *range(3, 12)]
    assert shown(make(work, clips=1)) == [3, 3, 3, *range(3, 16)]
    assert shown(make(work, clips=1, frames=7, opening="cut")) == list(range(3, 7))


LENGTHS: dict[str, tuple[tuple[int, int, int, int], dict[str, Any], VideoLength]] = {
    # samples, fps, clip frames, dropped
    "ten seconds": ((160000, 16, 80, 3), {}, VideoLength(160, 160, repeated_frames=3)),
    "a sample more is a picture more": ((160001, 16, 80, 3), {}, VideoLength(161, 161, repeated_frames=3)),
    "cut": ((160000, 16, 80, 3), {"opening": "cut"}, VideoLength(160, 157, skipped_frames=3)),
    "nothing dropped": ((160000, 16, 80, 0), {"opening": "cut"}, VideoLength(160, 160)),
    "a tenth of a second": ((1600, 16, 80, 3), {}, VideoLength(4, 4, repeated_frames=3)),
    # The official program makes int(features / 150) + 1 clips: 499 hidden states are 299 features, so two.
    "official, ten seconds": ((160000, 16, 80, 3), {"official_timing": True}, VideoLength(160, 157)),
    "official, seven seconds": ((112000, 16, 80, 3), {"official_timing": True}, VideoLength(115, 112)),
    "official, one clip": ((112000, 16, 80, 3), {"official_timing": True, "clips": 1}, VideoLength(80, 77)),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(name: str) -> None:
    voice, options, wanted = LENGTHS[name]
    assert video_length(*voice, Options(**options)) == wanted


def test_the_size_is_chosen_or_asked_for() -> None:
    image = np.zeros((720, 1280, 3), np.uint8)
    assert video_size(image, WanS2VSettings(), Options()) == (640, 1088)
    assert video_size(image, WanS2VSettings(), Options(max_area=480 * 832)) == (448, 832)
    assert video_size(image, WanS2VSettings(), Options(size=(512, 512))) == (512, 512)
    with pytest.raises(UserError, match="multiples of 64, got 840 x 480; the nearest is 832 x 512"):
        video_size(image, WanS2VSettings(), Options(size=(480, 840)))


def test_a_device_without_enough_memory_is_told(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(WanS2VPipeline, "clip", full)
    with pytest.raises(UserError, match="not enough memory for clips of 16 frames of 64 x 64; try `--sequential`"):
        make(work)
    assert {path.name for path in work.iterdir()} == {"face.png", "voice.wav"}


def test_a_pose_without_layers_for_it_is_told(work: Path) -> None:
    inputs = read_inputs(Job(image=work / "face.png", audio=work / "voice.wav", output=work / "out.mp4"))
    with VideoWriter(work / "pose.mp4", 16, (64, 64)) as writer:
        writer.write(np.zeros((4, 64, 64, 3), np.uint8))
    checkpoint = make_s2v(cond_dim=0)
    family = families.get("wan_s2v")
    for pose, count in ((work / "pose.mp4", 1), (None, 0)):
        outline = family.outline.outline(inputs, checkpoint.settings, Options(clip_frames=16, pose=pose))
        found = family.pipeline.open_pipeline(checkpoint).warnings(inputs, outline)
        assert [("`--pose` has no effect" in sentence) for sentence in found] == [True] * count


def test_a_portrait_that_does_not_fill_the_video_is_told(work: Path) -> None:
    said: list[str] = []
    make(work, said, size=(64, 128), frames=4)
    assert said == [f"{work / 'face.png'}: 64 of the video's rows or columns are black; `--cover` avoids that."]


@pytest.mark.parametrize(("options", "sentence"), [({"opening": "fade"}, "must be one of hold, cut, got 'fade'")])
def test_impossible_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Options(**options)
