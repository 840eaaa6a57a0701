# SPDX-License-Identifier: Apache-2.0
"""The table of ablations: rows change what they say, finished cells stay, clips are drawn once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import ablations
from bench.ablations import Budget, Claim, Row, Study, change, run, study
from bench.drawn_anchors import anchors_of, draw_clip, held_out_scene, other_shot
from talkingdit.families.gloria.anchors import KINDS
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
    monkeypatch.setattr(ablations, "train", lambda *_: tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run((), tmp_path, QUICK, tmp_path / "results.json")
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["fake/c/full/0"]
    table = run((), tmp_path, QUICK, tmp_path / "results.json")
    assert measured == ["full", "stopped", "without"]
    assert table.cells == json.loads((tmp_path / "results.json").read_text())
    assert table.cells["fake/c/without/0"]["measured"] == {"value": 7.0}


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
