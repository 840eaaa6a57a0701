# SPDX-License-Identifier: Apache-2.0
"""The command: mistakes of a configuration are told before anything heavy is imported; runs of before go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.config import Config, read_json, write_json
from training.family import family_of, train_run

ROOT = Path(__file__).parents[2]
COMMAND = """
import json, sys
import training.train
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    status = training.train.main()
    print(status, sorted({"diffusers", "transformers"} & sys.modules.keys()))
"""
MISTAKES = {
    "--batch.count 0": "stages.train.batch.count must be at least 1, got 0",
    "--model.preset nope": "nope: neither a folder nor a preset",
    "--model.family nope": "family: expected one of puppet, wan_s2v",
    "--conditions.tasks edit 1": "models of drawn characters do not have the task 'edit'",
}


def test_mistakes_are_told_before_diffusers_is_imported() -> None:
    command = [sys.executable, "-c", COMMAND, json.dumps([words.split() for words in MISTAKES])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["2 []"] * len(MISTAKES), done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("training: ")]
    assert len(told) == len(MISTAKES)
    for line, message in zip(told, MISTAKES.values(), strict=True):
        assert message in line


@pytest.mark.parametrize(
    ("preset", "text_encoder", "family"),
    [
        ("puppet_tiny", "prompt", "puppet"),
        ("puppet_tiny", "none", "wan_s2v"),
        ("wan_s2v_14b", "none", "wan_s2v"),
    ],
)
def test_a_record_from_before_families_had_names_is_of_the_family_it_was(
    tmp_path: Path, preset: str, text_encoder: str, family: str
) -> None:
    config = Config()
    config.model.preset, config.model.text_encoder = preset, text_encoder
    write_json(config, tmp_path / "config.json")
    record = json.loads((tmp_path / "config.json").read_text())
    del record["model"]["family"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    again = read_json(tmp_path / "config.json")
    assert family_of(again).name == family
    assert train_run(again).data["voices"] == Path("data/voices")
