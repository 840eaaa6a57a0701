# SPDX-License-Identifier: Apache-2.0
"""What would spoil a run at its end, or has changed since it began, is said before its first step."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from talkingdit.data.sample import ClipRequest, Sample, Shape
from talkingdit.errors import UserError
from training.config import Config, read_json, read_toml, write_json
from training.differences import differences, in_words
from training.export import check_export
from training.loader import Loader
from training.sections import BatchConfig, StageConfig

TINY = {"dim": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 2, "audio_inject_layers": [0, 1]}


def wan(**settings: object) -> Config:
    config = Config()
    config.model.family, config.model.preset, config.model.text_encoder = "wan_s2v", "wan_s2v_14b", "none"
    config.model.settings = {**TINY, **settings}
    config.optim.name = "adamw"
    return config


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reference_time": 7}, "model.settings: the official layout has no place for reference_time 7, only for 30"),
        ({"zip_frame_buckets": [1, 2, 8]}, "has no place for zip_frame_buckets"),
        ({"motion_frames": [41, 11]}, r"has no place for motion_frames \[41, 11\], only for \(73, 19\)"),
    ],
)
def test_settings_that_the_export_has_no_place_for_are_refused(settings: dict[str, object], said: str) -> None:
    check_export(wan())
    with pytest.raises(UserError, match=said):
        check_export(wan(**settings))
    adapters = wan(**settings)  # which are all that such a run exports
    adapters.lora.rank = 2
    check_export(adapters)
    adapters.stage_tables = [{"train": ["*lora_*", "head.*"]}]  # merged into the whole model
    with pytest.raises(UserError, match=said):
        check_export(adapters)


def test_what_generation_would_not_take_is_refused(tmp_path: Path) -> None:
    config = Config()
    config.model.settings = dict(TINY)
    config.data.vae = tmp_path / "vae"
    with pytest.raises(UserError, match=r"data.vae: must be the folder of the autoencoder that is exported too, got"):
        check_export(config)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    check_export(config)
    config.data.size = 100
    with pytest.raises(UserError, match=r"generation would not take the model .* size must be a multiple of 16"):
        check_export(config)


def test_patterns_and_the_empty_prompt_of_every_stage_are_looked_at(tmp_path: Path) -> None:
    config = wan()
    config.stage_tables = [{"name": "one"}, {"name": "two", "train": ["audio_injektor.*"]}]
    with pytest.raises(ValueError, match=r"stages.two.train: 'audio_injektor.\*' matches no parameter"):
        check_export(config)
    config.stage_tables = [{"name": "one"}, {"name": "two", "conditions": {"empty_text": str(tmp_path / "gone")}}]
    with pytest.raises(ValueError, match=r"conditions.empty_text: .*gone cannot be read"):
        check_export(config)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[optim]\nlr = nan", "optim.lr must be a finite number, got nan"),
        ("[objective]\nshift = inf", "objective.shift must be a finite number, got inf"),
        ("[conditions]\nhistory_noise = [0.0, nan]", r"conditions.history_noise.1 must be a finite number"),
        ("[[stages]]\nsteps = 3\n[stages.optim]\nlr = inf", "stages.0.optim.lr must be a finite number, got inf"),
        ("[optim]\nlr = -1e-4", "stages.train.optim.lr must be at least 0, got -0.0001"),
        ("[optim]\nbetas = [0.9, 1.0]", "optim.betas.1 must be at least 0 and less than 1, got 1"),
        ("[optim]\neps = 0.0", "optim.eps must be over 0, got 0"),
        ("[[stages]]\nsteps = 3\nname = 'a'\n[stages.optim]\nema = 1.0", "stages.a.optim.ema must be at least 0 and"),
        ("[checkpoint]\nevery = 0", "checkpoint.every must be at least 1, got 0"),
        ("[log]\nevery = 0", "log.every must be at least 1, got 0"),
        ("[objective]\nsnr_gamma = 0.0", "objective.snr_gamma must be over 0, got 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.toml").write_text(text + "\n")
    with pytest.raises(ValueError, match=said):
        read_toml(tmp_path / "run.toml")


def test_the_record_of_a_run_is_json_that_any_program_reads(tmp_path: Path) -> None:
    write_json(Config(), tmp_path / "config.json")
    json.loads((tmp_path / "config.json").read_text(), parse_constant=lambda word: pytest.fail(word))


# ---- A run that goes on ----------------------------------------------------------------------------------------------


def recorded(config: Config, tmp_path: Path) -> Config:
    write_json(config, tmp_path / "config.json")
    return read_json(tmp_path / "config.json")


def test_other_data_seed_and_batch_are_said(tmp_path: Path) -> None:
    config = Config()
    before = recorded(config, tmp_path)
    assert differences(before, config) == []
    now = copy.deepcopy(config)
    now.run.seed, now.batch.count, now.optim.lr = 3, 8, 1e-4
    now.data.sources["puppets"].path = Path("elsewhere")
    assert differences(before, now) == [
        "run.seed 0 -> 3",
        "data.sources.puppets.path None -> elsewhere",
        "stages.train.batch.count 2 -> 8",
        "stages.train.optim.lr 0.002 -> 0.0001",
    ]


def test_what_may_change_is_not_said(tmp_path: Path) -> None:
    config = Config()
    before = recorded(config, tmp_path)
    config.run.out, config.run.threads, config.run.steps, config.run.minutes = Path("x"), 9, 7, 3.0
    config.parallel.ulysses, config.checkpoint.every, config.log.every, config.sample.every = 2, 3, 4, 5
    config.data.workers, config.data.prefetch = 3, 4
    assert differences(before, config) == []


def test_a_record_without_new_keys_has_their_defaults(tmp_path: Path) -> None:
    write_json(Config(), tmp_path / "config.json")
    record = json.loads((tmp_path / "config.json").read_text())
    del record["held_out"], record["stages"][0]["optim"]["decay"], record["stages"][0]["objective"]["weighting"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert differences(read_json(tmp_path / "config.json"), Config()) == []


def test_many_differences_are_one_line() -> None:
    assert in_words([f"k{i} 0 -> 1" for i in range(11)]).endswith("k7 0 -> 1; and 3 more")


class Clips:
    name = "a"

    def __init__(self, keys: str) -> None:
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def group(self, index: int) -> str:
        return self.keys[index]

    def shape(self, index: int) -> Shape:
        return Shape(8, 4, 6)

    def sample(self, index: int, rng: np.random.Generator, clip: ClipRequest) -> Sample:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("abcdef", []),
        ("abcdefg", ["source a had 6 samples and has 7 samples"]),
        ("abcdex", ["source a had 6 samples and has 6 samples, other ones"]),
    ],
)
def test_other_contents_of_a_source_are_told(keys: str, said: list[str]) -> None:
    stage = StageConfig(steps=9, mix={"a": 1.0}, batch=BatchConfig(frames=[8], size=1))
    state = json.loads(json.dumps(Loader({"a": Clips("abcdef")}, stage, 0).state_dict()))
    loader = Loader({"a": Clips(keys)}, stage, 0)
    loader.load_state_dict(state)
    assert loader.changed == said
    old = {key: value for key, value in state.items() if key != "contents"}  # of a checkpoint from before
    loader.load_state_dict(old)
    assert loader.changed == []
