# SPDX-License-Identifier: Apache-2.0
"""Long videos are judged part by part: in the memory of one part, with the values of all of them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from talkingdit.eval import parts
from talkingdit.eval.job import Pair, SpokenText
from talkingdit.eval.judge_video import Judged, JudgePlan, Tools, judge
from talkingdit.media.files import VideoWriter
from talkingdit.media.sound import SPEECH_RATE

FPS, SIDE = 2, 64


def draw(path: Path, seconds: int, seed: int = 0, fps: int = FPS) -> Path:
    """A dot that goes round before noise, and a tone."""
    rng = np.random.default_rng(seed)
    wall = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
    tone = (0.1 * np.sin(np.arange(seconds * SPEECH_RATE) * 0.1)).astype(np.float32)
    with VideoWriter(path, fps, (SIDE, SIDE), tone, SPEECH_RATE) as video:
        for i in range(seconds * fps):
            picture = wall.copy()
            x, y = (int(SIDE * (0.5 + 0.3 * f(i / fps / 7))) for f in (np.cos, np.sin))
            picture[y - 6 : y + 6, x - 6 : x + 6] = 230
            video.write(picture[None])
    return path


def judged(gen: Path, truth: Path | None, metrics: tuple[str, ...], protocol: str = "jwb") -> Judged:
    plan = JudgePlan(metrics, ("whole",), finder="drawn", protocol=protocol)  # type: ignore[arg-type]
    return judge(Pair("s", "v", gen, truth, SpokenText("")), Tools.of(plan))


def test_parts_make_what_the_whole_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts; the truth, of another rate, ends soon after the second."""
    gen, truth = draw(tmp_path / "gen.mp4", 25), draw(tmp_path / "truth.mp4", 18, seed=1, fps=4)
    metrics = ("ssim", "psnr")
    whole = judged(gen, truth, metrics)
    monkeypatch.setattr(parts, "PART_SECONDS", 10.0)
    some = judged(gen, truth, metrics)
    for key, value in whole.values.items():
        assert some.values[key]["curve"] == value["curve"], key
        assert some.values[key]["value"] == pytest.approx(value["value"], abs=1e-6)
    assert "3 parts of at most 10 s" in some.values["psnr|whole"]["note"]
    assert some.facts == whole.facts
    assert some.facts["compared"] == 36


def test_sound_of_parts_is_that_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gen = draw(tmp_path / "gen.mp4", 25)
    (whole,) = parts.read_parts(gen, None)
    monkeypatch.setattr(parts, "PART_SECONDS", 10.0)
    found = [part.clip.sound for part in parts.read_parts(gen, None)]
    assert [len(sound) for sound in found if sound is not None] == [
        17 * SPEECH_RATE // 2,
        17 * SPEECH_RATE // 2,
        8 * SPEECH_RATE,
    ]
    assert whole.clip.sound is not None
    joined, all_of_it = np.concatenate([s for s in found if s is not None]), parts.read_sound(gen)
    assert all_of_it is not None
    np.testing.assert_allclose(joined, all_of_it[: len(joined)], atol=1e-4)
    np.testing.assert_allclose(joined, whole.clip.sound[: len(joined)], atol=1e-4)


def test_published_formulas_look_at_the_first_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gen, truth = draw(tmp_path / "gen.mp4", 25), draw(tmp_path / "truth.mp4", 25, seed=1)
    whole = judged(gen, truth, ("psnr",), "jwb-compat").values
    monkeypatch.setattr(parts, "PART_SECONDS", 10.0)
    assert judged(gen, truth, ("psnr",), "jwb-compat").values == whole


def test_memory_does_not_grow_with_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times as long takes at most a tenth more; `tools/long_memory.py` does it with an hour."""
    monkeypatch.setattr(parts, "PART_SECONDS", 3.0)
    peaks = []
    for seconds in (6, 6, 60):  # the first loads what is loaded once
        gen = draw(tmp_path / "gen.mp4", seconds, fps=8)
        tracemalloc.start()
        try:
            found = judged(gen, gen, ("psnr",))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert found.facts["frames"] == seconds * 8
        assert found.values["psnr|whole"]["value"] == 100.0
    assert peaks[2] < 1.1 * peaks[1], peaks
