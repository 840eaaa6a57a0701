# SPDX-License-Identifier: Apache-2.0
"""The measuring must call a perfect speaker perfect, and see each fault that it exists to see."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from talkingdit.encoders.log_mel import normalise_loudness
from talkingdit.errors import UserError
from talkingdit.families.puppet.evaluate import insert_report, main, read_voices
from talkingdit.puppets.measure import HeldOutVoice, MeasureJob, evaluate, measure_round_trip, sync, table, truth_of
from talkingdit.puppets.render import Image, render
from talkingdit.puppets.world import Character, FloatArray, Motion, Scene

RATE = 16000


def speech(seconds: float, seed: int) -> FloatArray:
    """Sound that opens and closes the mouth as syllables do: harmonics of a gliding voice with two moving formants."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    knots = np.arange(0, seconds + 0.5, 0.11)

    def curve(low: float, high: float) -> np.ndarray:
        return np.interp(t, knots, rng.uniform(low, high, len(knots)))

    loud = np.interp(t, knots, rng.uniform(0, 1, len(knots)) * (rng.random(len(knots)) > 0.35))
    first, second = curve(250, 900), curve(900, 2300)
    phase = 2 * np.pi * np.cumsum(curve(90, 160)) / RATE
    pitch = np.gradient(phase) * RATE / (2 * np.pi)
    sound = np.zeros_like(t)
    for k in range(1, 25):
        gain = np.exp(-(((k * pitch - first) / 150) ** 2)) + 0.5 * np.exp(-(((k * pitch - second) / 250) ** 2))
        sound += gain * np.sin(k * phase)
    return normalise_loudness((loud * sound).astype(np.float32))


@pytest.fixture(scope="module")
def voices() -> list[HeldOutVoice]:
    return [HeldOutVoice(f"speaker{i}", "xx", speech(6.0, i)) for i in range(2)]


def draw(job: MeasureJob, late: int = 0, share: float = 1.0, who: Character | None = None) -> Image:
    """The true video, or one whose mouth is late, small, or somebody else's."""
    truth = truth_of(job.voice, job.frames)
    opening = share * np.concatenate([np.zeros(late, np.float32), truth.opening])[: job.frames]
    scene = job.scene
    if who is not None:
        scene = Scene((who,), scene.expressions, scene.viewpoint, scene.background, scene.moving_background)
    motion = [Motion.random(np.random.default_rng(job.seed), job.frames)]
    return render(scene, opening[None].astype(np.float32), truth.width[None], motion)


@pytest.fixture(scope="module")
def perfect(voices: list[HeldOutVoice]) -> dict:
    return evaluate(draw, voices, HeldOutVoice("speaker0", "xx", speech(9.0, 7)))


def test_a_perfect_speaker_is_called_perfect(perfect: dict) -> None:
    for row in [*perfect["rows"], perfect["long"]]:
        assert row["r"] > 0.97
        assert row["slope"] == pytest.approx(1.0, abs=0.06)
        assert row["lag"] == 0
        assert row["identity"] > 0.99
        assert row["expression"] > 0.9
    assert abs(perfect["total"]["shuffled"]) < 0.35
    assert [row["frames"] for row in perfect["rows"]] == [96, 96]
    assert all(third["identity"] > 0.99 and third["r"] > 0.95 for third in perfect["long"]["thirds"])


def test_a_late_picture_shows_as_lag(voices: list[HeldOutVoice]) -> None:
    job = evaluate_one(voices, lambda job: draw(job, late=3))
    assert job["lag"] == 3
    assert job["r_at_lag"] > 0.95 > job["r"]


def test_a_mouth_that_opens_half_as_far_shows_as_slope(voices: list[HeldOutVoice]) -> None:
    row = evaluate_one(voices, lambda job: draw(job, share=0.5))
    assert row["slope"] == pytest.approx(0.5, abs=0.05)
    assert row["r"] > 0.97


def test_another_character_shows_as_identity(voices: list[HeldOutVoice]) -> None:
    def impostor(job: MeasureJob) -> Image:
        true = job.scene.characters[0]
        shirt = "red" if true.shirt != "red" else "green"
        return draw(
            job, who=Character(true.skin, true.hair_style, true.hair, shirt, true.logo, true.logo_colour, true.eyes)
        )

    assert evaluate_one(voices, impostor)["identity"] < 0.05


def test_a_colour_that_drifts_away_shows_in_the_thirds(voices: list[HeldOutVoice]) -> None:
    def fading(job: MeasureJob) -> Image:
        frames = draw(job).astype(np.float32)
        return np.clip(frames - 12 * np.linspace(0, 1, len(frames))[:, None, None, None], 0, 255).astype(np.uint8)

    shifts = [third["colour_shift"] for third in evaluate(fading, voices, voices[0])["long"]["thirds"]]
    assert shifts[2] > shifts[0] + 4


def evaluate_one(voices: list[HeldOutVoice], generate) -> dict:  # type: ignore[no-untyped-def]
    return evaluate(generate, voices, voices[0])["rows"][0]


def test_the_round_trip_of_an_autoencoder_that_keeps_everything_is_perfect(voices: list[HeldOutVoice]) -> None:
    kept: list[int] = []

    def keep(frames: Image) -> Image:
        kept.append(len(frames))
        return frames

    result = measure_round_trip(voices, keep, 96, 0)
    assert result["r"] > 0.97
    assert result["lags"] == [0]
    assert all(frames % 4 == 1 for frames in kept)


def test_lag_is_positive_when_the_picture_is_late() -> None:
    truth = np.random.default_rng(0).random(200).astype(np.float32)
    assert sync(truth, np.roll(truth, 2))["lag"] == 2
    assert sync(truth, np.roll(truth, -4))["lag"] == -4


def test_a_mouth_that_never_moves_has_no_correlation() -> None:
    truth = np.random.default_rng(0).random(50).astype(np.float32)
    assert sync(truth, np.full(50, 0.3, np.float32))["r"] == 0.0


def test_the_table_goes_between_the_marks_of_the_page(perfect: dict, tmp_path: Path) -> None:
    result = {**perfect, "probe": {"r": 0.99, "slope": 1.0, "identity": 1.0, "expression": 0.99}}
    page = tmp_path / "puppets.md"
    page.write_text("before\n<!-- puppets:start -->\nold\n<!-- puppets:end -->\nafter\n")
    for _ in range(2):
        insert_report(page, table(result))
    text = page.read_text()
    assert text.startswith("before\n<!-- puppets:start -->\n| |")
    assert text.endswith("<!-- puppets:end -->\nafter\n")
    assert text.count("**all**") == 1
    assert "old" not in text
    page.write_text("no marks\n")
    with pytest.raises(UserError, match="has no lines <!-- puppets:start -->"):
        insert_report(page, "table")


def test_only_held_out_voices_are_read_and_joined_to_the_length(tmp_path: Path) -> None:
    lines = []
    for name, split in (("a", "held_out"), ("b", "train"), ("c", "held_out")):
        soundfile.write(tmp_path / f"{name}.flac", 0.3 * speech(1.5, ord(name)), RATE)
        lines.append(json.dumps({"path": f"{name}.flac", "speaker": name, "language": "xx", "split": split}))
    (tmp_path / "index.jsonl").write_text("\n".join(lines) + "\n")
    found = read_voices(tmp_path, 2.5, 4, np.random.default_rng(0))
    assert [voice.speaker for voice in found] == ["a", "c", "a", "c"]
    assert all(len(voice.samples) == 2.5 * RATE for voice in found)


def test_a_folder_without_voices_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--voices", str(tmp_path), "--out", str(tmp_path / "out.json")]) == 2
    assert "index.jsonl: not a readable list of voices" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
