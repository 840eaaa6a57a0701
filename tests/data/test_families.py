# SPDX-License-Identifier: Apache-2.0
"""Any family's videos are precomputed and read: one without history, speech and text encoder needs a few lines."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import silent_clips
import torch
from clip_files import draw, write_video
from tiny_checkpoint import make_vae

from talkingdit import families
from talkingdit.autoencoders.streaming import encode, to_video
from talkingdit.data import ClipRequest
from talkingdit.data.cutting import Cutting
from talkingdit.data.manifest import read_manifest
from talkingdit.data.on_the_fly import OnTheFly
from talkingdit.data.precompute import FinishedVideo, PrecomputeJob, prepare
from talkingdit.data.shards import PrecomputedShards
from talkingdit.data.workers import run_workers
from talkingdit.errors import UserError
from talkingdit.families.family import Family
from talkingdit.media.files import read_video

CUTTING = Cutting(clip_frames=8, min_frames=8, max_area=32 * 48, multiple=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("silent")
    torch.manual_seed(0)
    make_vae().save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number, frames in enumerate((20, 9)):
        write_video(folder / f"{number}.mp4", draw(frames), 16)
    file = folder / "m.csv"
    file.write_text("video,audio,caption\n0.mp4,none,a person\n1.mp4,none,another\n")
    return file


@pytest.mark.parametrize("workers", [1, 2])
def test_a_family_without_history_voice_and_words(
    checkpoint: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])  # worker processes get it, too
    forked.context()
    monkeypatch.setattr("talkingdit.data.workers.START", "forkserver")  # saves imports
    clips = Family("silent", "silent models", "silent_clips").clips
    encoders = clips.encoders(checkpoint)
    assert encoders.what == ("latents",)
    job = PrecomputeJob(read_manifest(manifest), encoders, clips.encode_clip, tmp_path / "out", CUTTING, "float32")
    steps: list[FinishedVideo] = []
    prepare(job)
    run_workers(job, 0, 1, workers, steps.append)
    assert sorted(step.clips for step in steps) == [1, 2]  # one at every stride, as there is no history
    kept = PrecomputedShards(job.out)
    assert kept.empty_text is None
    assert sorted(about["key"][-7:] for _, about in kept.clips) == ["000000b", "000000b", "000008b"]
    sample = kept.sample(0, np.random.default_rng(0), ClipRequest())
    assert sample.text is sample.audio is sample.history is None


def test_clips_without_history_are_encoded_behind_the_reference(checkpoint: Path, manifest: Path) -> None:
    encoders = silent_clips.encoders(checkpoint)
    source = OnTheFly(manifest, encoders, silent_clips.encode_clip, CUTTING)
    shape = source.shape(0)
    assert (shape.frames, shape.history) == (2, 0)
    sample = source.sample(1, np.random.default_rng(0), ClipRequest(history=True))  # there is none to be had
    video = to_video(read_video(manifest.parent / "1.mp4")[0])
    vae = encoders.loaded.vae
    assert sample.history is None
    assert sample.key[-1] == "b"
    assert sample.reference is not None
    start = int(sample.key[-7:-1])
    alone = [encode(vae, image)[0] for image in video.split(1, dim=2)]
    drawn = min(range(9), key=lambda i: float((alone[i] - sample.reference).abs().max()))
    together = torch.cat([video[:, :, drawn : drawn + 1], video[:, :, start : start + 8]], dim=2)
    torch.testing.assert_close(sample.latents, encode(vae, together)[0, :, 1:], rtol=1e-4, atol=1e-4)


def test_what_a_family_does_not_have_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"what: expected latents, got 'latents,audio'"):
        silent_clips.encoders(checkpoint, ("latents", "audio"))
    with pytest.raises(UserError, match="expected latents, and text or audio beside them, got 'text'"):
        families.get("wan_s2v").clips.encoders(checkpoint, ("text",))


def test_encoders_and_families_go_to_other_processes_unloaded(checkpoint: Path) -> None:
    encoders = silent_clips.encoders(checkpoint, fps=8)
    assert encoders.settings.fps == 8
    assert encoders.loaded.vae.device.type == "cpu"
    assert "loaded" not in vars(pickle.loads(pickle.dumps(encoders)))
    family = families.get("wan_s2v")
    assert family.presets
    assert pickle.loads(pickle.dumps(family)) == family
