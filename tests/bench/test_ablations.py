# SPDX-License-Identifier: Apache-2.0
"""The table of ablations: rows change what they say, finished cells stay, clips are drawn once."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from bench import ablations, avatar_rows, drawn_voices, gloria_rows, gloria_silent
from bench.ablations import Budget, Claim, Row, Study, change, run, study
from bench.drawn_anchors import (
    SIZE,
    anchors_of,
    draw_clip,
    head_of,
    held_out_scene,
    other_shot,
    silent_words,
    still,
    talking,
)
from talkingdit.families.gloria.anchors import KINDS
from talkingdit.families.hunyuan_avatar.load import load as load_avatar
from talkingdit.models import PEOPLE_NAME, find_checkpoint
from talkingdit.puppets.measure import HeldOutVoice
from talkingdit.puppets.visemes import Visemes
from training.config import read_toml

QUICK = Budget(0.0, 0, 4, 0.02, 1, quick=True)


@pytest.mark.parametrize("name", list(ablations.STUDIES))
def test_every_row_is_a_configuration(name: str) -> None:
    chosen = study(name)
    for row in chosen.rows:
        config = read_toml(Path(ablations._ROOT) / "training" / "configs" / chosen.config)
        for key, value in row.config.items():
            change(config, key, value)
        assert config.stages
    with pytest.raises(ValueError, match=r"has no 'anchor\.of' in ConditionsConfig"):
        change(config, "conditions.anchor.of", "clip")
    for claim in chosen.claims:
        assert {chosen.row(name).name for name in claim.rows} == set(claim.rows)


def test_a_table_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(row: Row, model: Path, budget: Budget) -> dict[str, float]:
        if len(measured) == 1 and "stopped" not in measured:
            measured.append("stopped")
            raise KeyboardInterrupt
        measured.append(row.name)
        return {"value": float(len(row.name))}

    claim = Claim("c", "says", ("full", "without"), measure, {"value": True})
    fake = Study("fake", "", (Row("full"), Row("without", model="full")), (claim,), lambda folder, budget: None)
    monkeypatch.setattr(ablations, "STUDIES", {"fake": "nowhere"})
    monkeypatch.setattr(ablations, "study", lambda name: fake)
    finished(tmp_path / "fake_full", 70)
    with pytest.raises(KeyboardInterrupt):
        run((), tmp_path, QUICK, tmp_path / "results.json")
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["fake/c/full/0"]
    table = run((), tmp_path, QUICK, tmp_path / "results.json")
    assert measured == ["full", "stopped", "without"]
    assert table.cells == json.loads((tmp_path / "results.json").read_text())
    assert table.cells["fake/c/without/0"]["measured"] == {"value": 7.0}


def finished(folder: Path, steps: int) -> None:
    """A training that is over, as far as a table looks at it."""
    (folder / "model").mkdir(parents=True)
    logged = ((10, 5.0), (1, 2.0), (steps, 0.5))  # stopped after the tenth step, gone on from the first
    lines = [json.dumps({"step": step, "speed/seconds_per_step": seconds}) for step, seconds in logged]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")


def test_cells_say_how_long_their_model_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the table of two folders sees which numbers are of equal training; right videos are of none."""
    prepared: list[Path] = []

    def measure(row: Row, model: Path, budget: Budget) -> dict[str, float]:
        assert model.is_dir() == row.trained
        return {"value": 1.0}

    rows = (Row("full"), Row("weights_of_full", model="full"), Row("right_videos", trained=False))
    claim = Claim("c", "says", tuple(row.name for row in rows), measure, {"value": True})
    fake = Study("fake", "", rows, (claim,), lambda folder, budget: prepared.append(folder))
    monkeypatch.setattr(ablations, "STUDIES", {"fake": "nowhere"})
    monkeypatch.setattr(ablations, "study", lambda name: fake)
    finished(tmp_path / "fake_full", 1412)
    cells = run((), tmp_path, QUICK, None).cells
    assert [cell["steps"] for cell in cells.values()] == [1412, 1412, None]
    training = {"row": "full", "seconds": 2.0 + 9 * 5.0 + 1402 * 0.5}
    assert [cell["training"] for cell in cells.values()] == [training, training, None]
    assert all(cell["seconds"] >= 0 for cell in cells.values())
    assert len(prepared) == 2  # nothing is drawn to train what trains nothing


def test_a_copied_anchor_has_no_distance_and_a_right_video_has() -> None:
    scene, _ = held_out_scene(2000)
    rng = np.random.default_rng(0)
    shot = still(other_shot(scene, rng, viewpoint="front"), rng)
    face, first = head_of(shot), still(scene.with_viewpoint("back"), rng)
    right = talking(scene, rng.random(8).astype(np.float32), np.full(8, 0.5, np.float32), rng)
    anchors = [first, shot, face]
    copied = np.stack([shot, first, cv2.resize(face, (SIZE, SIZE))])
    assert gloria_silent.anchor_distance(copied, anchors) == 0
    assert gloria_silent.anchor_distance(right, anchors) > 0.02
    # Of the nearest one, in the range of pixels.
    assert gloria_silent.anchor_distance(
        np.zeros_like(right), [np.full((8, 8, 3), c, np.uint8) for c in (255, 51)]
    ) == (pytest.approx(0.2))


def test_measures_of_right_videos_are_what_a_perfect_row_would_have() -> None:
    """Through the same code as rows that are trained; what the autoencoder costs, a frame of 17, is all they lack."""
    rows = {row.name: row for row in gloria_silent.STUDY.rows}
    for one in (gloria_rows.STUDY, gloria_silent.STUDY):
        assert all("right_videos" in claim.rows for claim in one.claims)
    found = gloria_silent.tell_apart(rows["right_videos"], Path("nowhere"), QUICK)
    assert found["identity"] == 1
    assert found["copy_rate"] == 0
    assert min(found["logo_right"], found["expression_right"]) > 0.9
    assert found["anchor_distance"] == found["right_distance"] > 0.02
    held = gloria_rows.hold_identity(rows["right_videos"], Path("nowhere"), QUICK)
    assert held["identity_start"] == held["identity_end"] == 1
    assert min(held["background_start"], held["background_end"]) > 0.95


def test_a_row_that_copies_an_anchor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def copies(row: Row, model: Path) -> Any:
        return lambda ask: np.repeat(ask.anchors[1].image[None], ask.frames, axis=0)

    monkeypatch.setattr(gloria_silent, "maker", copies)
    found = gloria_silent.use_anchors(Row("full"), Path("nowhere"), QUICK)
    assert found["copy_rate"] == 1
    assert found["anchor_distance"] == 0 < 0.02 < found["right_distance"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "nonsense"], r"--only must name studies or claims \(gloria, .*got 'nonsense'"),
        (["--only", "gloria", "dub"], r"--only must name studies or claims .*got 'dub'"),
        (["--train", "foo/bar"], r"--train must be STUDY/ROW with a study of gloria, .*got 'foo/bar'"),
        (["--train", "gloria"], r"must name a row to train \(full, .*got 'gloria'"),
        (["--train", "gloria/right_videos"], r"must name a row to train \(full, .*got 'gloria/right_videos'"),
        (["--train", "skyreels_audio/hybrid"], r"must name a row to train \(full, .*got 'skyreels_audio/hybrid'"),
        (["--train", ""], r"--train must be STUDY/ROW .*got ''"),
        (["--cases", "0"], r"--cases must be at least 1, got 0"),
        (["--video-minutes", "-1"], r"--video-minutes must be a number over 0, got -1"),
        (["--minutes", "nan"], r"--minutes must be a number over 0, got nan"),
        (["--folder", __file__], r"--folder must be a folder, got the file .*test_ablations\.py"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablations, "run", None)  # never come to
    assert ablations.main(["--folder", str(tmp_path / "none"), *words]) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(f"ablations: .*{says}\n", line), line
    assert not (tmp_path / "none").exists()


def test_drawn_clips_have_anchors_of_every_kind_in_the_clip_and_out_of_it() -> None:
    rng = np.random.default_rng(0)
    opening = rng.random(60).astype(np.float32)
    kinds = {kind for group in KINDS.values() for kind in group}
    turned = 0
    for _ in range(6):
        clip = draw_clip(rng, Visemes(opening, opening), 2)
        anchors = anchors_of(clip, rng)
        assert set(anchors) == kinds
        view = anchors[clip.scene.viewpoint]
        assert [own for _, own in view] == [False, True]
        assert any(np.array_equal(view[1][0], frame) for frame in clip.frames[1:])
        assert not any(np.array_equal(view[0][0], frame) for frame in clip.frames)
        turned += clip.before != clip.scene
    assert 0 < turned < 6
    scene, _ = held_out_scene(3)
    assert scene.characters[0].held_out
    assert other_shot(scene, rng).background != scene.background


def test_captions_say_nothing_of_looks() -> None:
    """Else a row that never reads an anchor would turn people round to the right shirt and logo, as the words say."""
    text: Any = gloria_rows.shipped().text_encoder
    one, other = (held_out_scene(seed)[0] for seed in (3, 4))
    assert one.characters != other.characters
    other = replace(other, expressions=one.expressions, moving_background=one.moving_background)
    assert silent_words(one) == silent_words(other) != silent_words(one.with_viewpoint("back"))
    assert text.unknown_words(silent_words(one)) == []
    assert {one.viewpoint, *one.expressions} <= set(text.words(silent_words(one)))


def test_a_row_without_view_anchors_is_not_given_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []

    def looks(row: Row, model: Path) -> Any:
        def make(ask: gloria_rows.VideoCase) -> Any:
            given.append([anchor.name for anchor in ask.anchors])
            return np.repeat(ask.first[None], ask.frames, axis=0)

        return make

    monkeypatch.setattr(gloria_silent, "maker", looks)
    for name in ("full", "no_view_anchor"):
        gloria_silent.use_anchors(gloria_silent.STUDY.row(name), Path("nowhere"), QUICK)
    assert given == [["global", "view/front"], ["global"]]


def test_rows_are_compared_at_equal_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row takes the time that it is given; the others take its steps, however busy the machine is then."""
    from training import loop, parallel

    seen = []

    class Trainer:
        def __init__(self, config: Any, mesh: Any) -> None:
            seen.append((config.run.minutes, config.run.steps))

        def run(self) -> None: ...

    monkeypatch.setattr(loop, "Trainer", Trainer)
    monkeypatch.setattr(parallel, "start", lambda *arguments: None)
    monkeypatch.setattr(parallel, "stop", lambda: None)
    chosen, budget = ablations.study("skyreels_audio"), ablations.Budget(minutes=3.0)
    for row in chosen.rows[:2]:
        ablations.run_training(chosen, row, tmp_path, budget)
        folder = tmp_path / f"skyreels_audio_{row.name}"
        folder.mkdir()
        (folder / "log.jsonl").write_text('{"step": 10}\n{"step": 1412}\n')
    assert seen[0][0] == 3.0
    assert seen[1] == (0.0, 1412)


def test_results_of_another_folder_stay(tmp_path: Path) -> None:
    """A machine that begins anew must not throw away what was measured elsewhere."""
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"fake/other/full/0": {"measured": {"value": 1.0}}}))
    table = ablations.Table.open(tmp_path / "new", results)
    (tmp_path / "new").mkdir()
    table.add("fake/c/full/0", {"measured": {}})
    assert list(json.loads(results.read_text())) == ["fake/other/full/0", "fake/c/full/0"]
    newer = {"fake/other/full/0": {"measured": {"value": 2.0}}}
    results.write_text(json.dumps(newer))  # by a run in another folder
    table.add("fake/c/full/0", {"measured": {}})
    assert json.loads(results.read_text())["fake/other/full/0"] == newer["fake/other/full/0"]


def test_two_runs_in_one_folder_keep_the_cells_of_each_other(tmp_path: Path) -> None:
    """A cell may have taken hours of training."""
    results = tmp_path / "results.json"
    one, other = (ablations.Table.open(tmp_path, results) for _ in range(2))
    one.add("fake/a/full/0", {"measured": {}})
    other.add("fake/b/full/0", {"measured": {}})
    one.add("fake/c/full/0", {"measured": {}})
    for file in (tmp_path / "cells.json", results):
        assert set(json.loads(file.read_text())) == {f"fake/{name}/full/0" for name in "abc"}


def test_rows_of_injections_begin_without_the_picture(tmp_path: Path) -> None:
    """Else a row would be ahead by what the shipped model has learned of its own way."""
    chosen, shipped = study("hunyuan_avatar"), load_avatar(find_checkpoint(PEOPLE_NAME))
    for row in chosen.rows:
        ways = {way: row.config[avatar_rows.SETTINGS + way] for way in avatar_rows.WAYS}
        avatar_rows.save_start(tmp_path / row.name, ways)
        model = load_avatar(tmp_path / row.name / "transformer")
        assert {way: model.config[way] for way in ways} == ways
        if ways["reference_channels"]:
            assert not model.img_in.proj.weight[:, 16:].any()
        if ways["reference_projection"]:
            assert not torch.equal(model.before_proj.weight, shipped.before_proj.weight)
            assert torch.equal(model.ref_in.proj.weight, model.img_in.proj.weight[:, :16])
        else:
            assert model.ref_in is None


def test_a_quick_run_needs_no_network_for_its_voices(tmp_path: Path) -> None:
    assert len(drawn_voices.trained(tmp_path, QUICK, 16)) == 1
    assert [len(one) for one in drawn_voices.held_out(tmp_path, QUICK, 2.0, 3)] == [32000] * 3


def test_another_language_is_none_of_the_language_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the same speaker's own words count as another language."""

    def read(folder: Path, seconds: float, count: int, rng: np.random.Generator) -> list[HeldOutVoice]:
        return [HeldOutVoice("a", ("it", "ru")[i % 2], np.full(2, i, np.float32)) for i in range(count)]

    monkeypatch.setattr(drawn_voices, "fetch", lambda folder, budget: folder)
    monkeypatch.setattr(drawn_voices, "read_held_out", read)
    found = drawn_voices.held_out(Path(), QUICK, 2.0, 3, but="it")
    assert [int(samples[0]) for samples in found] == [1, 3, 5]
