# SPDX-License-Identifier: Apache-2.0
"""`talkingdit precompute` goes on after kills and interrupts, and shares its work among processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from precomputing import assert_same, make_job, run, samples

from talkingdit.cli.main import main
from talkingdit.data import workers
from talkingdit.data.encoders import CheckpointEncoders
from talkingdit.data.manifest import read_manifest
from talkingdit.data.precompute import FinishedVideo, PrecomputeJob, precompute, prepare
from talkingdit.data.shards import PrecomputedShards
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.clips import encoders as encoders_of


def die(job: PrecomputeJob, count: int) -> None:
    """A worker that is killed, without a chance to clean up, after some videos."""
    torch.set_num_threads(1)
    steps: list[FinishedVideo] = []

    def report(step: FinishedVideo) -> None:
        steps.append(step)
        if len(steps) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    precompute(job, report=report)


def test_a_killed_run_goes_on(videos: Path, whole: Path, encoders: CheckpointEncoders, tmp_path: Path) -> None:
    """It has finished a shard and begun another; nothing of the first is made again, nothing of the second counts."""
    clips = [about for _, about in PrecomputedShards(whole).clips]
    job = make_job(videos, encoders, tmp_path / "out", shard_bytes=sum(clip["size"] for clip in clips[:3]))
    prepare(job)
    worker = multiprocessing.get_context("fork").Process(target=die, args=(job, 2))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    kept = [about["key"] for _, about in PrecomputedShards(job.out).clips]
    assert kept == [clip["key"] for clip in clips[:3]]  # the fourth was in the shard that was open
    assert [path for path in job.out.iterdir() if path.name.startswith(".part-")]
    steps = run(job)
    assert sum(step.kept for step in steps) == len(kept)
    assert sum(step.clips + step.kept for step in steps) == len(clips)
    assert_same(samples(job.out), samples(whole))
    assert not [path for path in job.out.iterdir() if path.name.startswith(".part-")]
    assert sum(step.clips for step in run(job)) == 0


def test_an_interrupt_keeps_what_is_done(videos: Path, encoders: CheckpointEncoders, tmp_path: Path) -> None:
    job = make_job(videos, encoders, tmp_path / "out")
    prepare(job)

    def stop(step: FinishedVideo) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precompute(job, report=stop)
    assert len(PrecomputedShards(job.out)) == 1
    assert run(job)[0] == FinishedVideo(kept=1)


def test_a_scheduler_that_takes_the_machine_back_loses_nothing(
    videos: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(job: PrecomputeJob, rank: int, world: int, report: Any) -> None:
        precompute(job, rank, world, lambda step: (report(step), os.kill(os.getpid(), signal.SIGTERM)))

    monkeypatch.setattr(workers, "precompute", told)
    out = tmp_path / "out"
    before = signal.getsignal(signal.SIGTERM)
    files = ["--manifest", str(videos / "m.jsonl"), "--checkpoint", str(checkpoint), "-o", str(out)]
    assert main(["precompute", *files, "--clip-frames", "16", "--max-area", "48x32"]) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    assert f"interrupted; finished shards are kept in {out}; the same command goes on there." in capsys.readouterr().err
    assert len(PrecomputedShards(out)) == 1


def test_workers_that_are_interrupted_finish_their_shards(
    videos: Path, encoders: CheckpointEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(job: PrecomputeJob, rank: int, world: int, report: Any) -> None:
        precompute(job, rank, world, lambda step: (report(step), time.sleep(60)))

    def stop(step: FinishedVideo) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "START", "fork")  # saves imports
    monkeypatch.setattr(workers, "precompute", slow)
    job = make_job(videos, encoders, tmp_path / "out")
    prepare(job)
    with pytest.raises(KeyboardInterrupt):
        workers.run_workers(job, 0, 1, 2, stop)
    assert 1 <= len(list(job.out.glob("*.tar"))) <= 2
    assert not list(job.out.glob(".part-*"))


def test_a_worker_ends_at_its_next_report_where_a_library_dropped_the_interrupt(
    videos: Path, encoders: CheckpointEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dropped(job: PrecomputeJob, rank: int, world: int, report: Any) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        precompute(job, rank, world, report)

    monkeypatch.setattr(workers, "START", "fork")  # saves imports
    monkeypatch.setattr(workers, "precompute", dropped)
    job = make_job(videos, encoders, tmp_path / "out")
    prepare(job)
    steps: list[FinishedVideo] = []
    with pytest.raises(UserError, match="ended with status 130"):
        workers.run_workers(job, 0, 1, 2, steps.append)
    assert len(steps) == 2 < len(job.manifest.entries)  # one each
    assert len(PrecomputedShards(job.out)) == sum(step.clips for step in steps)
    assert not list(job.out.glob(".part-*"))


def test_an_interrupt_in_the_middle_of_a_clip_leaves_no_torn_shard(
    videos: Path, encoders: CheckpointEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(videos, encoders, tmp_path / "out")
    prepare(job)
    write = webdataset.TarWriter.write

    def torn(self: Any, members: dict[str, Any]) -> None:
        write(self, {"__key__": members["__key__"], "json": members["json"]})
        raise KeyboardInterrupt

    monkeypatch.setattr(webdataset.TarWriter, "write", torn)
    with pytest.raises(KeyboardInterrupt):
        precompute(job)
    assert {path.name for path in job.out.iterdir()} == {"precompute.json", "empty_text.safetensors"}


def test_parts_of_the_work_make_the_whole(
    videos: Path, whole: Path, encoders: CheckpointEncoders, tmp_path: Path
) -> None:
    """Also when the number of workers changes in between, and when the manifest has grown."""
    rows = (videos / "m.jsonl").read_text().splitlines()
    short = videos / "short.jsonl"
    short.write_text("\n".join(rows[1:3]) + "\n")
    job = make_job(videos, encoders, tmp_path / "out", manifest=read_manifest(short))
    assert [step.clips for step in run(job, rank=1, world=2)] == [2]
    full = make_job(videos, encoders, tmp_path / "out")
    made = [step for rank in range(3) for step in run(full, rank, world=3)]
    assert sum(step.kept for step in made) == 2
    assert_same(samples(full.out), samples(whole))


def test_under_torchrun_every_process_takes_its_part(
    videos: Path, whole: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["--manifest", str(videos / "m.jsonl"), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    counts = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main(["precompute", *files, "--clip-frames", "16", "--max-area", "48x32"]) == 0
        counts.append(len(PrecomputedShards(tmp_path / "out")))
    assert 0 < counts[0] < counts[1]
    assert_same(samples(tmp_path / "out"), samples(whole))


@pytest.mark.slow
def test_two_processes_share_the_work(videos: Path, whole: Path, encoders: CheckpointEncoders, tmp_path: Path) -> None:
    job = make_job(videos, encoders, tmp_path / "out")
    prepare(job)
    steps: list[FinishedVideo] = []
    workers.run_workers(job, 0, 1, 2, steps.append)
    assert len(steps) == 4
    assert {path.name for path in job.out.glob("*.tar")} == {"clips-0000-000000.tar", "clips-0001-000000.tar"}
    assert_same(samples(job.out), samples(whole))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            "vae",
            r"precompute: \S+: not a whole checkpoint, Wan2.1_VAE.pth, the autoencoder, is missing in it; finished",
        ),
        (
            "kill",
            r"precompute: worker \d+ ended with status -9; .*finished shards are kept, the same command goes on",
        ),
    ],
)
def test_workers_that_fail_say_why(
    videos: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, said: str
) -> None:
    monkeypatch.setattr(workers, "START", "fork")  # saves imports
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    job = make_job(videos, encoders_of(copy), tmp_path / "out")
    prepare(job)
    if damage == "vae":
        (copy / "Wan2.1_VAE.pth").unlink()
    else:
        monkeypatch.setattr(workers, "precompute", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=said):
        workers.run_workers(job, 0, 1, 2, lambda step: None)
