# SPDX-License-Identifier: Apache-2.0
"""The web app as a person uses it, with the model that ships: a new user's road, and memory over many runs.

    python -m bench.app [--runs 30] [--steps 8] [--seconds 1] [--reload] [--json FILE]

The server is a process of its own, with an empty folder; a browser (Chromium, by Playwright) asks it for one video
after the other in one tab. The road is from the empty page to the first frame that plays. Memory is what the server and
its worker hold themselves (PSS of /proc, which divides shared pages), after every run. Ends with status 1 where it grew
by more than 5 % from the third run to the last.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import soundfile
import torch

from bench import record
from talkingdit.models import default_checkpoint

FLAGS = ["--no-sandbox", "--headless", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
SETTLED = 3  # runs until everything has been loaded once
GROWTH = 0.05
PATIENT = 300_000  # milliseconds
PLAYING = "() => { const video = document.querySelector('#video video'); return video && video.currentTime > 0; }"


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The app -> its address and its process."""
    words = [sys.executable, "-m", "talkingdit", "app", "--port", "0", "--folder", str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip(), server
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


def held(pid: int) -> float:
    """MB that a process holds."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def workers(pid: int) -> list[int]:
    """The processes that a server has started, whichever of its threads did."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def fill(page: Any, portrait: Path, voice: Path, steps: int) -> None:
    """Give an empty form what a video needs."""
    page.get_by_role("textbox", name=re.compile("^Seed")).wait_for()
    for name, file, shown in (("picture", portrait, "img"), ("voice", voice, "[aria-label*=Play]")):
        page.locator(f"#{name} input[type=file]").set_input_files(str(file))
        page.locator(f"#{name} {shown}").first.wait_for()
    page.get_by_role("textbox", name=re.compile("^Steps")).fill(str(steps))


def measured(runs: int, steps: int, seconds: float, reload: bool = False) -> dict[str, Any]:
    """Make videos -> seconds of the road, and MB after each run.

    Args:
        runs: how many.
        steps: denoising steps of each clip.
        seconds: that each video lasts.
        reload: load the page anew for each and bring the files again.
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    shipped = default_checkpoint().parent
    with tempfile.TemporaryDirectory() as name, sync_playwright() as player:
        folder, road = Path(name), 0.0
        server_mb: list[float] = []
        worker_mb: list[float] = []
        sound, rate = soundfile.read(shipped / "voice.flac")
        soundfile.write(folder / "voice.wav", sound[: round(seconds * rate)], rate)
        with served(folder / "data") as (address, server):
            browser = player.chromium.launch(executable_path=chromium, args=FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.set_default_timeout(PATIENT)
            for number in range(1, runs + 1):
                begun = time.monotonic()
                if number == 1 or reload:
                    page.goto(address)
                    fill(page, shipped / "portrait.png", folder / "voice.wav", steps)
                page.get_by_role("button", name="Make the video").click()
                if number == 1:
                    page.wait_for_function(PLAYING)
                    road = time.monotonic() - begun
                _done(page, folder / "data", number)
                server_mb.append(round(held(server.pid), 1))
                worker_mb.append(round(sum(map(held, workers(server.pid))), 1))
            browser.close()
    memory = [sum(both) for both in zip(server_mb, worker_mb, strict=True)]
    growth = memory[-1] / memory[min(SETTLED, runs) - 1] - 1
    return {"road_s": round(road, 1), "server_mb": server_mb, "worker_mb": worker_mb, "growth": round(growth, 4)}


def _done(page: Any, data: Path, number: int) -> None:
    """Wait until so many runs are done, and the page says so of the last."""
    until = time.monotonic() + PATIENT / 1000
    while sum('"state": "done"' in file.read_text() for file in data.glob("runs/*/run.json")) < number:
        if time.monotonic() > until:
            raise TimeoutError(f"run {number} is not done after {PATIENT / 1000:.0f} s: {_status(page)}")
        page.wait_for_timeout(100)
    page.locator("#status .done").wait_for()


def _status(page: Any) -> str:
    return f"{page.locator('#status').inner_text()} {page.locator('#wrong').inner_text()}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.app", description="The app: its road and its memory.")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="that each video lasts")
    parser.add_argument("--reload", action="store_true", help="load the page anew for each, and bring the files again")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    flags = parser.parse_args(argv)
    if flags.runs < 1:
        parser.error(f"argument --runs: expected at least 1, got {flags.runs}")
    found = measured(flags.runs, flags.steps, flags.seconds, flags.reload)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    if flags.json is not None:
        result = record.header("app", torch.device("cpu"), quick=False) | {"runs": flags.runs, **found}
        flags.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if found["growth"] <= GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
