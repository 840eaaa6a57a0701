# SPDX-License-Identifier: Apache-2.0
"""What is done aside: it changes no bit, loses nothing that was finished, and tells what went wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny_families
import torch
from PIL import Image
from tiny_checkpoint import make_checkpoint

import talkingdit
from talkingdit.autoencoders.strips import SharedStream
from talkingdit.errors import UserError
from talkingdit.families.gloria.pipeline import GloriaPipeline
from talkingdit.families.puppet.pipeline import PuppetPipeline
from talkingdit.media.writer import VideoWriter
from talkingdit.pipelines.aside import Aside, half_of_the_threads, report
from talkingdit.pipelines.resume import ClipStore


def test_half_of_the_threads_is_given_back_however_it_is_nested() -> None:
    torch.set_num_threads(6)
    inside: list[int] = []
    with half_of_the_threads() as whole:
        inside.append(torch.get_num_threads())

        def beside() -> None:
            with half_of_the_threads():
                inside.append(torch.get_num_threads())

        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
        with half_of_the_threads() as again:
            inside.append(torch.get_num_threads())
        inside.append(torch.get_num_threads())
    assert (whole, again) == (6, 6)
    assert inside == [3, 3, 3, 3]
    assert torch.get_num_threads() == 6
    torch.set_num_threads(1)
    with half_of_the_threads():
        assert torch.get_num_threads() == 1


def test_people_are_told_what_threads_do() -> None:
    torch.set_num_threads(6)
    assert report() == {
        "threads": "6; drawn characters and Gloria: 3 each, one clip is decoded while the next is denoised"
    }
    torch.set_num_threads(1)
    assert report() == {"threads": "1; drawn characters and Gloria: 1, one clip is decoded when it is denoised"}


def test_two_videos_at_once_take_no_threads_from_each_other_nor_from_who_begins_meanwhile() -> None:
    torch.set_num_threads(6)
    entered, leave, found = threading.Event(), threading.Event(), []

    def beside() -> None:
        with half_of_the_threads():
            found.append(torch.get_num_threads())
            entered.set()
            leave.wait(60)
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=beside)
    with half_of_the_threads():  # the first to enter is the first to leave
        thread.start()
        entered.wait(60)
        begun = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        begun.start()
        begun.join()
    here = torch.get_num_threads()
    leave.set()
    thread.join()
    assert here == torch.get_num_threads() == 6
    assert found == [3, 6, 6]


@pytest.mark.parametrize("really", [False, True])
def test_work_is_done_in_order_and_its_errors_are_raised(really: bool) -> None:
    done: list[int] = []
    with Aside(really) as aside:
        for number in range(5):
            aside.do(lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == [0, 1, 2, 3, 4]

    def fails() -> None:
        raise UserError("the disk is full")

    def ask(*works: Callable[[], None]) -> None:
        with Aside(really) as aside:
            for work in works:
                aside.do(work)

    for works in ((fails,), (fails, lambda: done.append(5))):
        with pytest.raises(UserError, match="the disk is full"):
            ask(*works)
    assert done == [0, 1, 2, 3, 4]


def test_what_stops_the_caller_waits_for_what_is_done_aside() -> None:
    begun, done = threading.Event(), []

    def slow() -> None:
        begun.wait(60)
        done.append(True)

    def ask() -> None:
        with Aside(True) as aside:
            aside.do(slow)
            threading.Timer(0.1, begun.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask()
    assert done == [True]


def test_whatever_interrupts_the_waiting_nothing_goes_on_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()
    shutdown, interruptions = ThreadPoolExecutor.shutdown, [True, True]

    def interrupted(self: ThreadPoolExecutor, *given: Any, **more: Any) -> None:
        if interruptions:
            interruptions.pop()
            raise KeyboardInterrupt
        shutdown(self, *given, **more)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", interrupted)

    def ask() -> None:
        with Aside(True) as aside:

            def endless() -> None:
                begun.set()
                for _ in range(6000):
                    if aside.given_up:
                        ended.set()
                        return
                    time.sleep(0.01)

            aside.do(endless)
            begun.wait(60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask()
    assert ended.is_set()


def test_what_goes_wrong_aside_is_told_before_the_next_piece_of_work() -> None:
    def fails() -> None:
        raise UserError("the disk is full")

    def ask() -> None:
        with Aside(True) as aside:
            aside.do(fails)
            for _ in range(6000):
                aside.check()
                time.sleep(0.01)

    started = time.monotonic()
    with pytest.raises(UserError, match="the disk is full"):
        ask()
    assert time.monotonic() - started < 30


def test_autocast_of_the_caller_holds_aside() -> None:
    seen: list[torch.dtype] = []
    one = torch.ones(2, 2)
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, autocast), Aside(True) as aside:
            aside.do(lambda: seen.append((one @ one).dtype))
    assert seen == [torch.bfloat16, torch.float32]


def test_inference_mode_of_the_caller_holds_aside() -> None:
    seen: list[bool] = []
    for mode in (True, False):
        with torch.inference_mode(mode), Aside(True) as aside:
            aside.do(lambda: seen.append(torch.is_inference_mode_enabled()))
    assert seen == [True, False]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    Image.fromarray(np.full((64, 64, 3), 180, np.uint8)).save(tmp_path / "face.png")
    soundfile.write(tmp_path / "voice.wav", np.sin(np.arange(32_000) / 9) * 0.3, 16_000)
    make_checkpoint(tmp_path / "model")
    return tmp_path


def make(work: Path, model: str = "model") -> Any:
    return talkingdit.generate(work / "face.png", work / "voice.wav", work / "out.mp4", checkpoint=work / model)


@pytest.mark.parametrize("pipeline", [PuppetPipeline, GloriaPipeline])
def test_clips_are_denoised_and_kept_by_two_threads_where_there_are_two(
    work: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Any
) -> None:
    model = "model"
    if pipeline is GloriaPipeline:
        tiny_families.gloria(work / "gloria")
        model = "gloria/model"
    denoised, add, at = pipeline.denoised, ClipStore.add, []

    def watched(self: Any, *given: Any, **more: Any) -> Any:
        at.append((threading.current_thread().name, torch.get_num_threads()))
        return denoised(self, *given, **more)

    def kept(self: Any, *given: Any) -> None:
        at.append((threading.current_thread().name, torch.get_num_threads()))
        add(self, *given)

    ready: list[tuple[str, int]] = []
    monkeypatch.setattr(pipeline, "denoised", watched)
    monkeypatch.setattr(ClipStore, "add", kept)
    monkeypatch.setattr(
        pipeline,
        "get_ready_to_decode",
        lambda self, conditions, index, carry: ready.append((threading.current_thread().name, index)),
    )
    main = threading.current_thread().name
    torch.set_num_threads(1)
    make(work, model)
    assert set(at) == {(main, 1)}
    assert not ready
    at.clear()
    torch.set_num_threads(4)
    make(work, model)
    assert set(at) == {(main, 2), ("aside_0", 2)}
    assert ready == [("aside_0", 0)]  # while the first clip is denoised
    assert torch.get_num_threads() == 4


def test_a_decoder_that_is_ready_goes_through_the_past_once(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resume, past = SharedStream.resume, []
    monkeypatch.setattr(
        SharedStream, "resume", lambda self, x: past.append(threading.current_thread().name) or resume(self, x)
    )
    frames = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        make(work)
        frames.append((work / "out.mp4").read_bytes())
    assert past == [threading.current_thread().name, "aside_0"]
    assert frames[0] == frames[1]


def test_who_watches_sees_the_first_frames_before_the_next_clip_begins(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoised, write, order = PuppetPipeline.denoised, VideoWriter.write, []

    def begun(self: Any, conditions: Any, index: int, *given: Any, **more: Any) -> Any:
        order.append(f"clip {index}")
        return denoised(self, conditions, index, *given, **more)

    def shown(self: Any, frames: Any) -> None:
        order.append(f"{len(frames)} frames by {threading.current_thread().name}")
        write(self, frames)

    monkeypatch.setattr(PuppetPipeline, "denoised", begun)
    monkeypatch.setattr(VideoWriter, "write", shown)
    torch.set_num_threads(2)
    talkingdit.generate(work / "face.png", work / "voice.wav", work / "out.mp4", checkpoint=work / "model", live=True)
    assert order[:2] == ["clip 0", f"4 frames by {threading.current_thread().name}"]
    assert {"clip 1", "4 frames by aside_0"} == set(order[2:4])


def test_a_disk_that_is_full_aside_ends_the_work_and_keeps_what_was_finished(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ClipStore.add

    def full(self: Any, *given: Any) -> None:
        if self.finished == 2:
            raise UserError("no space left")
        add(self, *given)

    torch.set_num_threads(2)
    with monkeypatch.context() as patch:
        patch.setattr(ClipStore, "add", full)
        with pytest.raises(UserError, match="no space left"):
            make(work)
    assert {path.name for path in work.iterdir()} == {"face.png", "voice.wav", "model", "out.mp4.parts"}
    said: list[str] = []
    talkingdit.generate(
        work / "face.png", work / "voice.wav", work / "out.mp4", checkpoint=work / "model", warn=said.append
    )
    assert said[0].startswith("going on after 2 of 4 clips")
    assert {path.name for path in work.iterdir()} == {"face.png", "voice.wav", "model", "out.mp4"}


def test_a_full_disk_is_told_within_the_clip_that_is_denoised_meanwhile(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, steps = threading.Event(), []

    def full(self: Any, *given: Any) -> None:
        failed.set()
        raise UserError("no space left")

    def progress(done: int, total: int) -> None:
        steps.append(done)
        if done == 5:  # the first step of the second clip
            failed.wait(60)
            time.sleep(0.2)

    monkeypatch.setattr(ClipStore, "add", full)
    torch.set_num_threads(2)
    with pytest.raises(UserError, match="no space left"):
        talkingdit.generate(
            work / "face.png",
            work / "voice.wav",
            work / "out.mp4",
            checkpoint=work / "model",
            steps=4,
            progress=progress,
        )
    assert max(steps) == 5
