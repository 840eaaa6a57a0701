# SPDX-License-Identifier: Apache-2.0
"""`talkingdit generate` in several processes: the same video, one voice for messages, an end for all."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from forked import Ranks
from official import make_official
from test_generate_wan_s2v import arguments, frames_of, left, make_inputs
from tiny_checkpoint import make_checkpoint

from talkingdit.cli.main import main
from talkingdit.distributed.team import Team

PATIENCE = 240.0  # seconds; the first job of a process imports everything


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_official(tmp_path_factory.mktemp("checkpoint") / "Wan2.2-S2V-tiny", vae_dim=4)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    make_inputs(tmp_path)
    return tmp_path


@pytest.fixture
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for what processes say."""
    return tmp_path_factory.mktemp("said") / "messages"


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Said:
    """What one process makes."""
    work = tmp_path_factory.mktemp("whole")
    make_inputs(work)
    said = command(arguments(work, folder))
    assert said.status == 0
    return said._replace(video=frames_of(work / "out.mp4"))


def check_same(said: Said, whole: Said) -> None:
    """That the frames before compression are those of one process, but for values rounded the other way."""
    assert said.status == 0, said
    assert said.frames is not None
    assert whole.frames is not None
    assert said.frames.shape == whole.frames.shape
    assert whole.frames.std() > 5
    apart = np.abs(said.frames.astype(int) - whole.frames)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3


def check_near(file: Path, whole: Said) -> None:
    """That a file shows the video of one process. Its compression is not the same in every run."""
    video = frames_of(file)
    assert whole.video is not None
    assert video.shape == whole.video.shape
    assert np.abs(video.astype(int) - whole.video).mean() < 0.05 * whole.video.std()


class Left(BaseException):
    """Instead of the end of a process."""


class Said(NamedTuple):
    """What a process of the command leaves: exit status, output, messages, the frames it wrote, its file."""

    status: int
    out: str = ""
    messages: str = ""
    frames: np.ndarray | None = None
    video: np.ndarray | None = None


def command(argv: list[str], stop_at: int | None = None) -> Said:
    """One process of the command."""
    from talkingdit.families.wan_s2v.pipeline import WanS2VPipeline
    from talkingdit.media.files import VideoWriter

    left: list[int] = []
    written: list[np.ndarray] = []

    def leave(_: Team, status: int) -> None:
        left.append(status)
        raise Left

    def recorded(self: VideoWriter, frames: np.ndarray) -> None:
        written.append(frames)
        write(self, frames)

    denoise, leave_really, write = WanS2VPipeline._denoise, Team.exit, VideoWriter.write

    def stopped(self: WanS2VPipeline, conditions: Any, index: int, *rest: Any) -> Any:
        if index == stop_at and os.environ.get("RANK") == "1":
            self.parallel.team._interrupted = True
        return denoise(self, conditions, index, *rest)

    Team.exit, WanS2VPipeline._denoise = leave, stopped  # type: ignore[method-assign, assignment]
    VideoWriter.write = recorded  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as messages:
            try:
                status = main(argv)
            except SystemExit as end:
                status = int(str(end.code))
            except Left:
                status = left[0]
    finally:
        Team.exit, WanS2VPipeline._denoise = leave_really, denoise  # type: ignore[method-assign]
        VideoWriter.write = write  # type: ignore[method-assign]
    told = "".join(line for line in messages.getvalue().splitlines(True) if line.startswith("talkingdit"))
    return Said(status, out.getvalue(), told, np.concatenate(written) if written else None)


def test_two_processes_make_the_video_of_one(processes: Any, work: Path, folder: Path, whole: Said) -> None:
    first, others = processes(2, command, arguments(work, folder, "--sheet", str(work / "a.png")), timeout=PATIENCE)
    check_same(first, whole)
    assert first.messages == ""
    assert "out.mp4: 23 frames" in first.out
    assert others == Said(0)
    assert left(work) == {"out.mp4", "a.png"}
    check_near(work / "out.mp4", whole)


def test_what_three_processes_began_one_goes_on_with(processes: Any, work: Path, folder: Path, whole: Said) -> None:
    argv = arguments(work, folder)
    first, *others = processes(3, command, [*argv, "--parallel", "ring=3,vae=split"], 1, timeout=PATIENCE)
    kept = f"interrupted; 1 of 3 clips are kept in {work / 'out.mp4.parts'}; the same command goes on there."
    assert first._replace(frames=None) == Said(130, "", f"talkingdit: {kept}\n")
    assert others == [Said(130), Said(130)]
    rest = command(argv)
    assert "going on after 1 of 3 clips" in rest.messages
    check_same(rest, whole)


def test_what_one_process_began_two_go_on_with(
    processes: Any, work: Path, folder: Path, whole: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    from talkingdit.pipelines import job

    made = job.to_frames
    seen = []

    def stop(video: Any) -> np.ndarray:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(video)
        return made(video)

    with monkeypatch.context() as patch:
        patch.setattr(job, "to_frames", stop)
        assert main(arguments(work, folder)) == 130
    rest, _ = processes(2, command, arguments(work, folder), timeout=PATIENCE)
    assert "going on after 2 of 3 clips" in rest.messages
    check_same(rest, whole)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--image", "nowhere.png"), "image 'nowhere.png': expected an existing file"),
        (("--parallel", "ulysses=4"), "guidance=1, ulysses=4 and ring=1 are for 4 processes, got 2."),
        (("--parallel", "guidance=2", "--guidance", "1"), "guidance must be at most the number of predictions"),
        (("--parallel", "speed=2"), "the words are guidance, ulysses, ring and vae, got 'speed'"),
        (("--device", "toaster"), "the device 'toaster' cannot be used"),
        (("--solver", "heun"), "invalid choice: 'heun'"),
        (("--pose", "nowhere.mp4"), "pose 'nowhere.mp4': expected an existing file"),
    ],
)
def test_a_mistake_is_told_once_and_ends_all(
    processes: Any, work: Path, folder: Path, options: tuple[str, str], sentence: str
) -> None:
    first, others = processes(2, command, arguments(work, folder, *options), timeout=PATIENCE)
    assert (first.status, first.out) == (2, "")
    assert sentence in first.messages
    assert len(first.messages.splitlines()) == 1
    assert others == Said(2)
    assert left(work) == set()


def full_disk(argv: list[str]) -> Said:
    from talkingdit.pipelines import resume as parts

    write = parts._write_lossless

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    parts._write_lossless = fail
    try:
        return command(argv)
    finally:
        parts._write_lossless = write


def test_a_full_disk_ends_all(processes: Any, work: Path, folder: Path) -> None:
    first, others = processes(2, full_disk, arguments(work, folder), timeout=PATIENCE)
    assert first.status == 2
    assert "clip 0 cannot be written (No space left on device)" in first.messages
    assert others == Said(2)
    assert left(work) == set()


def test_drawn_characters_in_two_processes(
    processes: Any, work: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make_checkpoint(tmp_path_factory.mktemp("puppets"))
    files = ["--image", str(work / "face.png"), "--audio", str(work / "voice.wav"), "--checkpoint", str(folder)]
    alone = command(["generate", *files, "-o", str(work / "one.mp4")])
    argv = ["generate", *files, "-o", str(work / "two.mp4")]
    first, others = processes(2, command, argv, timeout=PATIENCE)
    check_same(first, alone)
    assert "two.mp4: 23 frames" in first.out
    assert first.messages.count("only its middle square is used") == 1
    assert others == Said(0)


def torchrun(*command: str) -> subprocess.Popen[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    more["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # scripts lie elsewhere
    return subprocess.Popen(
        [*start, *command], env=os.environ | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_torchrun_makes_the_video_of_one_process(work: Path, folder: Path, whole: Said) -> None:
    run = torchrun("-m", "talkingdit", *arguments(work, folder))
    out, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert out.count("out.mp4: 23 frames") == 1
    assert left(work) == {"out.mp4"}
    check_near(work / "out.mp4", whole)


def at_the_second_clip(rank: str, what: Callable[[], object]) -> None:
    """Does something to one process when it comes to the second clip."""
    from talkingdit.families.wan_s2v.pipeline import WanS2VPipeline

    denoise = WanS2VPipeline._denoise

    def stopped(self: WanS2VPipeline, conditions: Any, index: int, *rest: Any) -> Any:
        if index == 1 and os.environ["RANK"] == rank:
            what()
        return denoise(self, conditions, index, *rest)

    WanS2VPipeline._denoise = stopped  # type: ignore[method-assign]


def killed(words: list[str]) -> int:
    at_the_second_clip("1", lambda: os.kill(os.getpid(), signal.SIGKILL))
    return main(words)


def test_the_death_of_a_process_ends_the_run_and_finished_clips_stay(
    work: Path, folder: Path, whole: Said, said: Path
) -> None:
    statuses, messages = Ranks(2, killed, arguments(work, folder), said=said).wait(PATIENCE)
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] not in (0, -signal.SIGKILL), messages  # it ended by itself
    assert left(work) == {"out.mp4.parts"}
    rest = command(arguments(work, folder))
    assert "going on after 1 of 3 clips" in rest.messages
    check_same(rest, whole)


def slow(words: list[str], mark: Path) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may run its jobs deaf to Ctrl-C

    def wait() -> None:
        mark.touch()
        time.sleep(2)

    at_the_second_clip("0", wait)
    return main(words)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_processes_at_the_same_step(
    work: Path, folder: Path, said: Path, number: signal.Signals
) -> None:
    """A terminal sends it to all; so does torchrun with one that it gets."""
    mark = said.with_name("reached")
    ranks = Ranks(2, slow, arguments(work, folder), mark, said=said)
    deadline = time.monotonic() + PATIENCE
    while not mark.exists() and time.monotonic() < deadline and ranks.running():
        time.sleep(0.1)
    ranks.send_signal(number)
    began = time.monotonic()
    statuses, messages = ranks.wait(100)
    assert time.monotonic() - began < 25  # before torchrun loses its patience, which is 30 s
    assert 130 in statuses, messages
    assert all(statuses), messages
    assert messages.count("talkingdit: interrupted; 1 of 3 clips are kept in") == 1
    assert left(work) == {"out.mp4.parts"}
