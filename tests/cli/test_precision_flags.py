# SPDX-License-Identifier: Apache-2.0
"""`generate --precision` and `--attention`: videos made so, and what is refused."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile
from tiny_checkpoint import make_checkpoint

from talkingdit.cli.generate import prepare
from talkingdit.cli.main import main
from talkingdit.media.files import read_video
from talkingdit.nn.eight_bit import EightBitLinear


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a small video."""
    work = tmp_path_factory.mktemp("work")
    checkpoint = make_checkpoint(work / "checkpoint")
    cv2.imwrite(str(work / "portrait.png"), np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8))
    soundfile.write(work / "voice.wav", 0.1 * np.random.default_rng(1).normal(size=8000), 16000)
    files = ["--image", str(work / "portrait.png"), "--audio", str(work / "voice.wav"), "--steps", "2"]
    return [*files, "--checkpoint", str(checkpoint)]


def video(arguments: list[str], path: Path, *more: str) -> np.ndarray:
    assert main(["generate", *arguments, *more, "-o", str(path)]) == 0
    return read_video(path)[0].astype(np.float64)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_video_in_eight_bits_is_nearly_the_same(
    arguments: list[str], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = EightBitLinear.forward
    monkeypatch.setattr(EightBitLinear, "forward", lambda self, x: calls.append(self.kind) or forward(self, x))
    want = video(arguments, tmp_path / "a.mp4")
    assert not calls
    got = video(arguments, tmp_path / "b.mp4", "--precision", precision)
    assert set(calls) == {precision}
    assert got.shape == want.shape
    assert 0 < np.abs(got - want).mean() < 12


def test_a_kernel_may_be_named(arguments: list[str], tmp_path: Path) -> None:
    want, got = (video(arguments, tmp_path / f"{name}.mp4", "--attention", name) for name in ("auto", "math"))
    assert np.abs(got - want).mean() < 2


def test_clips_of_another_precision_are_not_gone_on_from(arguments: list[str], tmp_path: Path) -> None:
    def variant(*more: str) -> str:
        return prepare([*arguments, "-o", str(tmp_path / "c.mp4"), *more]).tuning.variant

    assert variant() == variant("--attention", "math") == ""
    assert len({variant("--precision", "int8"), variant("--precision", "fp8"), variant("--attention", "sage"), ""}) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--precision", "int4"], "invalid choice"),
        (["--attention", "sage"], "generate: --attention: backend sage"),
        (["--attention", "flash3"], "generate: --attention: backend flash3"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: list[str], more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *arguments, *more, "-o", str(tmp_path / "d.mp4")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "d.mp4").exists()
