# SPDX-License-Identifier: Apache-2.0
"""A run's configuration: the file, the overrides, and what a typo gets."""

import json
from pathlib import Path

import pytest

from training.config import Config, parse, read_toml, write_json

CONFIGS = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.toml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_shipped_configurations_have_only_known_keys(file):
    assert isinstance(read_toml(file), Config)


def test_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[run]\nout = "elsewhere"\nsteps = 7\n[optim]\nbatch = 3\n')
    config = parse(["--config", str(file), "--optim.batch", "5"])
    assert (config.run.out, config.run.steps, config.optim.batch) == (Path("elsewhere"), 7, 5)
    assert config.optim.ema == Config().optim.ema


def test_a_misspelt_key_is_named_with_the_known_ones(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[optim]\nlearning_rat = 1\n")
    with pytest.raises(ValueError, match=r"unknown key optim\.learning_rat; known here: batch, .*weight_decay"):
        read_toml(file)


def test_a_file_that_is_not_toml_is_named(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[optim\n")
    with pytest.raises(ValueError, match=r"run\.toml cannot be read"):
        read_toml(file)


def test_the_record_beside_a_checkpoint_reads_back(tmp_path):
    write_json(Config(), tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["objective"]["shift"] == Config().objective.shift
