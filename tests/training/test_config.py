# SPDX-License-Identifier: Apache-2.0
"""A run's configuration: the file, its stages, the overrides, and what a typo gets."""

import json
from pathlib import Path

import pytest

from training.config import Config, parse, read_toml, write_json
from training.sections import at

CONFIGS = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.toml"))

TWO_STAGES = """
[run]
out = "elsewhere"
steps = 7
[data.sources.speech]
kind = "manifest"
path = "speech.jsonl"
column = "video"
[data.sources.film]
kind = "shards"
[optim]
lr = 1e-3
[conditions.anchors]
types = { view = ["front", "back"] }
[[stages]]
name = "speech"
steps = 100
mix = { speech = 1 }
[stages.optim]
lr = 2e-3
[[stages]]
name = "film"
minutes = 1.5
train = ["*.audio_injector.*"]
mix = { speech = 1.0, film = [0.0, 3] }
[stages.conditions]
drop_text = [0.0, 0.5]
anchors = { single = 0.5 }
"""


def written(tmp_path, text):
    file = tmp_path / "run.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_shipped_configurations_have_only_known_keys(file):
    assert isinstance(read_toml(file), Config)


def test_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    file = written(tmp_path, '[run]\nout = "elsewhere"\nsteps = 7\n[batch]\nsize = 3\n')
    config = parse(["--config", str(file), "--batch.size", "5"])
    assert (config.run.out, config.run.steps, config.batch.size) == (Path("elsewhere"), 7, 5)
    assert config.optim.ema == Config().optim.ema


def test_without_stages_there_is_one_made_of_the_sections():
    config = Config()
    config.run.steps, config.optim.lr = 11, 0.5
    (stage,) = config.stages
    assert (stage.name, stage.steps, stage.train, stage.optim.lr) == ("train", 11, ["*"], 0.5)
    assert stage.mix == {"puppets": 1.0}


def test_a_stage_changes_what_it_says_and_has_the_sections_for_the_rest(tmp_path):
    speech, film = read_toml(written(tmp_path, TWO_STAGES)).stages
    assert (speech.steps, speech.minutes, speech.optim.lr, speech.mix) == (100, 0.0, 2e-3, {"speech": 1.0})
    assert (film.steps, film.minutes, film.optim.lr) == (0, 1.5, 1e-3)
    assert film.mix == {"speech": 1.0, "film": (0.0, 3.0)}
    assert film.conditions.anchors.single == 0.5
    assert film.conditions.anchors.types == {"view": ["front", "back"]}  # of the section: a stage adds to a table
    assert speech.conditions.drop_text == Config().conditions.drop_text
    assert [at(film.conditions.drop_text, p) for p in (0, 0.5, 1)] == [0.0, 0.25, 0.5]


def test_options_of_a_source_that_are_its_own_come_through(tmp_path):
    source = read_toml(written(tmp_path, TWO_STAGES)).data.sources["speech"]
    assert (source.kind, source.path, source.options) == ("manifest", Path("speech.jsonl"), {"column": "video"})


def test_an_override_of_a_section_reaches_the_stages_that_do_not_say_otherwise(tmp_path):
    config = parse(["--config", str(written(tmp_path, TWO_STAGES)), "--optim.lr", "5", "--data.workers", "3"])
    assert [stage.optim.lr for stage in config.stages] == [2e-3, 5.0]
    assert config.data.workers == 3


def test_an_override_of_a_stage_by_number_or_name_changes_it_alone(tmp_path):
    options = ["--stages.0.steps", "10", "--stages.film.optim.lr", "4", "--optim.clip-norm", "9"]
    options += ["--stages.film.conditions.drop-text", "0.3", "0.4", "--stages.film.mix.film", "2"]
    config = parse(["--config", str(written(tmp_path, TWO_STAGES)), *options])
    speech, film = config.stages
    assert (speech.steps, speech.optim.lr, speech.optim.clip_norm) == (10, 2e-3, 9.0)
    assert (film.optim.lr, film.optim.clip_norm, film.conditions.drop_text) == (4.0, 9.0, (0.3, 0.4))
    assert film.mix == {"speech": 1.0, "film": 2.0}
    assert film.conditions.anchors.single == 0.5
    assert parse(["--stages.train.steps", "3"]).stages[0].steps == 3


def test_with_adapters_stages_train_these_alone_unless_they_say_otherwise(tmp_path):
    config = read_toml(written(tmp_path, "[lora]\nrank = 8\n[[stages]]\nname = 'a'\n[[stages]]\ntrain = ['*']"))
    assert [stage.train for stage in config.stages] == [["*lora_*"], ["*"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlearning_rat = 1", r"unknown key optim\.learning_rat; known here: betas, .*weight_decay"),
        ("[optm]\nlr = 1", "unknown key optm; known here: batch, "),
        ("[optim]\nlr = 'fast'", r"optim\.lr must be a number, got 'fast'"),
        ("[optim]\nbetas = [0.9]", r"optim\.betas must be \[a number, a number\], got \[0\.9\]"),
        ("[batch]\nsize = 1.5", r"batch\.size must be a whole number, got 1\.5"),
        ("[batch]\nsize = true", r"batch\.size must be a whole number, got True"),
        ("[parallel]\nprecision = 'fp8'", r"parallel\.precision must be one of 'auto', 'bf16', 'fp32', got 'fp8'"),
        ("[data.sources]\na = 3", r"data\.sources\.a must be a table, got 3"),
        ("[data]\nsources = { a = { kind = 'zip' } }", r"data\.sources\.a\.kind must be one of 'puppets', "),
        ("optim = 3", "optim must be a table, got 3"),
        ("stages = 3", r"stages must be \[\[stages\]\] tables"),
        ("[[stages]]\nname = 'a'\n[stages.optim]\nlar = 1", r"unknown key stages\.a\.optim\.lar; known here"),
        ("[[stages]]\nname = 'a'\n[[stages]]\nname = 'a'", r"stages\.1\.name must differ .* got 'a' twice"),
        ("[[stages]]\nname = 'a b'", r"stages\.a b\.name must be letters, digits, - and _"),
        ("[[stages]]\nsteps = 0", r"stages\.train\.steps or stages\.train\.minutes must be over 0"),
        ("[[stages]]\nmix = { film = 1 }", r"mix\.film is no source; \[data\.sources\] has: puppets"),
        ("[[stages]]\nmix = { puppets = [1, 0] }", r"mix must have a share over 0 at both ends"),
        ("[conditions]\ndrop_text = [0, 1.5]", r"stages\.train\.conditions\.drop_text must be 0 to 1, got 1\.5"),
        ("[batch]\nmode = 'pack'", r"batch\.tokens must be over 0 with mode = \"pack\""),
        ("[[conditions.joint]]\nconditions = ['text']", r"joint\.0\.conditions must name two or more"),
        ("[[conditions.joint]]\nconditions = ['text', 'smell']", r"conditions\.joint\.0\.conditions\.1 must be one of"),
        ("[conditions.anchors]\nalways = ['global']", "always names 'global', which is no type; types: none"),
        ("[objective]\nshift = 0", r"objective\.shift and std must be over 0"),
    ],
)
def test_a_mistake_is_named_by_file_table_and_key(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"run\.toml: .*{message}"):
        read_toml(written(tmp_path, text))


def test_a_stage_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with pytest.raises(ValueError, match=r"--stages\.sft: there is no such stage; stages: speech, film"):
        parse(["--config", str(written(tmp_path, TWO_STAGES)), "--stages.sft.steps", "3"])


def test_a_file_that_is_not_toml_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"run\.toml cannot be read"):
        read_toml(written(tmp_path, "[optim\n"))


def test_the_record_beside_a_checkpoint_has_the_stages_filled_in(tmp_path):
    write_json(read_toml(written(tmp_path, TWO_STAGES)), tmp_path / "config.json")
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["objective"]["shift"] == Config().objective.shift
    assert [stage["optim"]["lr"] for stage in record["stages"]] == [2e-3, 1e-3]
    assert "stage_tables" not in record
