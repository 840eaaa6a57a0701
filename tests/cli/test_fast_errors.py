# SPDX-License-Identifier: Apache-2.0
"""A mistake is told before anything large is imported, and what makes a video imports nothing that it does not use."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from talkingdit.models import default_checkpoint

HEAVY = {"torch", "diffusers", "transformers", "talkingdit._native"}
# What torch's compiler, sharding and training, and libraries of models bring: of no use to a video of a small model.
UNUSED = {
    *("diffusers", "transformers", "peft", "accelerate", "torchao", "huggingface_hub", "scipy", "sympy", "triton"),
    *("torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes"),
    *("torch.distributed.fsdp", "torch.distributed.tensor"),
}
FILES = ["--image", "nowhere.png", "--audio", "nowhere.wav", "-o", "out.mp4"]
CODE = """
import contextlib, io, json, os, sys
from talkingdit.cli.main import main
for words in (["generate"], ["plan"], ["precompute"]):  # what all need is imported once
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        main(words)
for line in sys.stdin:
    if child := os.fork():  # what the commands before have imported is not here
        os.waitpid(child, 0)
        continue
    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        try:
            status = main(json.loads(line))
        except SystemExit as stop:
            status = stop.code or 0
    print(json.dumps([status, said.getvalue(), told.getvalue(), [*sys.modules]]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def python() -> Iterator[subprocess.Popen[str]]:
    """A Python that has imported the command and no more."""
    with subprocess.Popen([sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        yield it


def run(python: subprocess.Popen[str], argv: list[str]) -> tuple[int, str, set[str]]:
    """Exit status, output and first line of the errors, and what was imported."""
    assert python.stdin is not None
    assert python.stdout is not None
    python.stdin.write(json.dumps(argv) + "\n")
    python.stdin.flush()
    status, said, told, modules = json.loads(python.stdout.readline())
    assert len(told.splitlines()) <= 1, told
    return status, said + told, set(modules)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["generate", *FILES], "image 'nowhere.png': expected an existing file"),
        (["generate", *FILES, "--checkpoint", str(default_checkpoint())], "image 'nowhere.png': expected an existing"),
        (["generate", *FILES, "--checkpoint", "nowhere"], "nowhere: the checkpoint must be a folder"),
        (["generate"], "the following arguments are required: --image, -o/--output"),
        (["eval"], "the following arguments are required: --generated, --out"),
        (["curate"], "the following arguments are required: --videos, -o/--out"),
        (["generate", *FILES, "--seed", "x"], "argument --seed: invalid integer value"),
        (["generate", *FILES, "--upscale", "1000"], "--upscale must be at most 64, got 1000"),
        (["generate", *FILES, "--steps", "1000000000"], "--steps must be at most 10000, got 1000000000"),
        (["generate", *FILES, "--threads", "1000000000"], "--threads must be at most 4096, got 1000000000"),
        (["precompute", "--manifest", "a.csv", "--checkpoint", ".", "-o", "b", "--fps", "1000000000"],
         "--fps must be at most 240, got 1000000000"),
        (["generate", *FILES, "--cover"], "--cover is for checkpoints of Wan-S2V"),
        (["generate", *FILES[:-2]], "the following arguments are required: -o/--output"),
        (["generate", *FILES[:-1], "out.avi"], "expected a name that ends in .mp4"),
        (["plan", "--preset", "nope"], "nope: neither a folder nor a preset"),
        (["plan", "--checkpoint", "nope"], "nope: the checkpoint must be a folder"),
        (["plan", "--preset", "wan_s2v_14b", "--frames", "81"], "a clip must have a multiple of 4 frames, got 81"),
        (["plan", "--preset", "wan_s2v_14b", "--size", "99x9"], "sides must be multiples of 16 pixels, got 99 x 9"),
        (["plan", "--preset", "wan_s2v_14b", "--seconds", "0"], "--seconds must be 0.1 to"),
        (["plan", "--preset", "wan_s2v_14b", "--audio", "none.wav"], "audio 'none.wav': expected an existing file"),
        (["plan"], "one of the arguments --checkpoint --preset is required"),
        (["plan", "--preset", "a", "--checkpoint", "b"], "argument --preset: not allowed with argument --checkpoint"),
        (["precompute", "--manifest", "a.csv"], "the following arguments are required: --checkpoint, -o/--out"),
        (["precompute", "--manifest", "a.csv", "--checkpoint", ".", "-o", "b", "--tokens", "9", "--max-area", "9"],
         "argument --tokens: not allowed with argument --max-area"),
        (["info", "--all"], "unrecognized arguments: --all"),
    ],
)  # fmt: skip
def test_mistakes(python: subprocess.Popen[str], argv: list[str], sentence: str) -> None:
    status, told, modules = run(python, argv)
    assert status == 2
    assert sentence in told
    assert not HEAVY & modules


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--help"], "generate"),
        (["generate", "--help"], "--audio-guidance"),
        (["generate", "--help", "--checkpoint", str(default_checkpoint())], "--audio-guidance"),
        (["plan", "--help"], "--micro-batches"),
        (["precompute", "--help"], "--openings"),
        (["info", "--help"], "--help"),
    ],
)
def test_help(python: subprocess.Popen[str], argv: list[str], word: str) -> None:
    status, told, modules = run(python, argv)
    assert status == 0
    assert word in told
    assert not (HEAVY | {"numpy", "av", "cv2"}) & modules


def test_planning_a_video_imports_no_models(python: subprocess.Popen[str]) -> None:
    status, told, modules = run(python, ["plan", "--preset", "puppet_tiny", "--seconds", "2"])
    assert status == 0, told
    assert not UNUSED & modules


def test_a_video_of_the_shipped_model_imports_what_it_uses_alone(python: subprocess.Popen[str], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "voice.wav", 0.1 * np.sin(np.arange(4000) / 9), 16000)
    portrait = default_checkpoint().parent / "portrait.png"
    files = ["--image", str(portrait), "--audio", str(tmp_path / "voice.wav"), "-o", str(tmp_path / "out.mp4")]
    status, told, modules = run(python, ["generate", *files, "--sheet", str(tmp_path / "out.png"), "--steps", "1"])
    assert status == 0, told
    assert (tmp_path / "out.mp4").stat().st_size > 0
    assert "torch" in modules
    assert not UNUSED & modules
