# SPDX-License-Identifier: Apache-2.0
"""The benchmark of training steps runs every build in its own tree, with the configuration that ships."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import puppet_steps
from bench.puppet_steps import Way
from training.config import parse

# A build whose steps take 0.5 s with one process, and 0.3 s with two, and that goes on where its log ends.
FAKE = """
import json, os, sys, tomllib
from pathlib import Path
config = tomllib.load(open(sys.argv[sys.argv.index("--config") + 1], "rb"))
if "--broken" in Path(__file__).read_text().splitlines()[-1]:
    sys.exit("it broke")
log = Path(config["run"]["out"]) / "log.jsonl"
if os.environ.get("RANK", "0") == "0":
    log.parent.mkdir(parents=True, exist_ok=True)
    done = len(log.read_text().splitlines()) if log.exists() else 0
    took = 0.5 if os.environ.get("WORLD_SIZE", "1") == "1" else 0.3
    with log.open("a") as file:
        for step in range(done, config["run"]["steps"]):
            file.write(json.dumps({"step": step + 1, "speed/seconds_per_step": took}) + "\\n")
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "old" / "training").mkdir(parents=True)
    (tmp_path / "old" / "training" / "__init__.py").touch()
    (tmp_path / "old" / "training" / "train.py").write_text(FAKE)
    return tmp_path / "old"


def test_a_build_is_measured_in_its_own_tree_by_what_it_adds_to_its_log(tree: Path, tmp_path: Path) -> None:
    config, log = tmp_path / "way.toml", tmp_path / "out" / "log.jsonl"
    for steps, processes, expected in ((2, 1, [0.5, 0.5]), (5, 2, [0.3, 0.3, 0.3])):
        config.write_text(f'[run]\nout = "{log.parent}"\nsteps = {steps}\n')
        assert puppet_steps.measure(tree, Way("old", processes, 1), config, log) == expected
    (tree / "training" / "train.py").write_text(FAKE + "# --broken\n")
    with pytest.raises(RuntimeError, match="it broke"):
        puppet_steps.measure(tree, Way("old", 1, 1), config, log)


def test_the_configuration_is_the_one_that_ships_but_for_its_length_and_places(tmp_path: Path) -> None:
    file = tmp_path / "way.toml"
    file.write_text(puppet_steps.configuration(tmp_path / "voices", tmp_path, Way("new", 2, 1), 200))
    ours = parse(["--config", str(file)])
    ships = parse(["--config", str(Path(puppet_steps.__file__).parents[1] / "training" / "configs" / "puppets.toml")])
    for same in ("model", "batch", "optim", "objective", "conditions"):
        assert getattr(ours, same) == getattr(ships, same)
    # The processes that are left, said so that older builds understand it.
    assert (ships.parallel.shard, ships.parallel.replicate) == (1, 0)
    assert ours.parallel == replace(ships.parallel, replicate=2)
    assert (ours.run.steps, ours.run.minutes, ours.run.threads) == (200, 0.0, 1)
    assert ours.run.out == tmp_path / "new-2"


def test_ratios_are_against_the_first_way() -> None:
    rows = [
        {"build": "old", "processes": 1, "seconds": 10.0},
        {"build": "new", "processes": 1, "seconds": 9.0},
        {"build": "new", "processes": 2, "seconds": 6.5},
    ]
    assert puppet_steps.ratios(rows) == {"new_1_to_old": 0.9, "new_2_to_old": 0.65}
    assert [way.name for way in puppet_steps.ways(["old", "new"], 2)] == ["old-1", "new-1", "new-2"]
    assert [way.name for way in puppet_steps.ways(["new"], 1)] == ["new-1"]
    json.dumps(rows)
