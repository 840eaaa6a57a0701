# SPDX-License-Identifier: Apache-2.0
"""Whole runs, from data to an exported model: any layout, resumed anywhere, stage after stage."""

from __future__ import annotations

import copy
import itertools
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from distributed import JobFailed
from safetensors.torch import load_file
from small_run import killed, make_world, read_log, save_config, train

from talkingdit.models import load_checkpoint
from training import export, parallel
from training.config import Config
from training.loop import Trainer
from training.model_state import gather_state

WEIGHTS = "model/transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(world: Config, tmp_path_factory: pytest.TempPathFactory, processes: Any) -> Path:
    """A run of one process that nothing disturbs."""
    out = tmp_path_factory.mktemp("straight")
    processes(1, train, copy.deepcopy(world), out)
    return out


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone, gone afterwards."""
    yield
    parallel.stop()


def same_curve(a: list[dict[str, float]], b: list[dict[str, float]]) -> None:
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for mine, other in zip(a, b, strict=True):
        for name in ("loss", "gradient_norm", "loss/source_puppets"):
            assert mine[name] == pytest.approx(other[name], rel=1e-5), (mine["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (2, {}),
        (2, {"ulysses": 2}),
        (2, {"replicate": 0, "shard": 1}),
        (4, {"replicate": 2}),
        (4, {"ring": 2, "ulysses": 2}),
    ],
)
def test_every_layout_trains_like_one_process(
    world: Config, straight: Path, processes: Any, tmp_path: Path, size: int, layout: dict[str, int]
) -> None:
    logs = processes(size, train, copy.deepcopy(world), tmp_path, layout, timeout=120)
    same_curve(logs[0], read_log(straight))
    ours, theirs = load_file(tmp_path / WEIGHTS), load_file(straight / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():  # exported in bfloat16: a last bit may fall the other way
        torch.testing.assert_close(weight, theirs[name], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_killed_while_saving_goes_on_with_another_layout(
    world: Config, straight: Path, processes: Any, tmp_path: Path, asynchronous: bool
) -> None:
    config = copy.deepcopy(world)
    config.checkpoint.asynchronous = asynchronous
    file = save_config(config, tmp_path)
    assert forked.run(killed, 4, "--config", str(file)) == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000002", "step-00000003", "step-00000004.tmp"]
    logs = processes(2, train, copy.deepcopy(config), tmp_path, timeout=120)
    same_curve(logs[0], read_log(straight))
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_finishes(world: Config, straight: Path, tmp_path: Path) -> None:
    config = copy.deepcopy(world)
    config.checkpoint.every = 1000
    config.stage_tables[1]["steps"] = 4000
    file = save_config(config, tmp_path)
    program = forked.start(forked.training, "--config", str(file))
    deadline = time.monotonic() + 90
    while (
        time.monotonic() < deadline
        and program.is_alive()
        and (not (tmp_path / "log.jsonl").exists() or len(read_log(tmp_path)) < 5)
    ):
        time.sleep(0.2)
    program.terminate()
    program.join(60)
    assert program.exitcode == 0
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert int(saved[-1].name.removeprefix("step-")) == len(read_log(tmp_path)) > 3  # the end of a stage is saved, too


@pytest.mark.slow
def test_stages_train_what_they_name_and_follow_each_other(world: Config, tmp_path: Path, alone: None) -> None:
    config = copy.deepcopy(world)
    config.run.out = tmp_path
    trainer = Trainer(config, parallel.start(config.parallel, "cpu"))
    weights = [gather_state(trainer.networks)]
    for stage in ("speak", "listen"):
        assert trainer.stage.name == stage
        for _ in range(3):
            trainer.train_step()
            trainer.progress.advance()
        trainer.begin_stage(trainer.loader.state_dict())
        weights.append(gather_state(trainer.networks))
    first, second = (
        {name for name, value in before.items() if not torch.equal(value, after[name])}
        for before, after in itertools.pairwise(weights)
    )
    # A video model's keys have no use for a bias: its gradient is only rounding.
    assert {name for name in weights[0] if not name.endswith(".k.bias")} <= first
    assert second
    assert all(name.startswith(("transformer.casual_audio_encoder.", "transformer.audio_injector.")) for name in second)


@pytest.mark.slow
def test_a_run_that_goes_on_says_once_what_is_not_as_it_was(
    world: Config, tmp_path: Path, alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copy.deepcopy(world)
    config.run.out, config.stage_tables = tmp_path, [{"name": "speak"}]
    said = []
    for steps, seed in ((1, 0), (2, 5), (3, 5)):
        config.stage_tables[0]["steps"], config.run.seed = steps, seed
        Trainer(config, parallel.start(config.parallel, "cpu")).run()
        parallel.stop()
        said.append(capsys.readouterr().out)
    assert "is not as it was" not in said[0]
    assert said[1].count("what trains is not as it was at step-00000001: run.seed 0 -> 5") == 1
    assert "is not as it was" not in said[2]
    parallel.start(config.parallel, "cpu")


@pytest.mark.slow
def test_without_averages_there_are_none_and_those_of_before_are_kept(
    world: Config, tmp_path: Path, alone: None
) -> None:
    config = copy.deepcopy(world)
    config.stage_tables = [{"name": "speak", "steps": 1}]
    for decays, expected in (((0.0,), 0), ((0.9, 0.0), 118)):
        config.run.out = tmp_path / str(expected)
        for steps, config.optim.ema in enumerate(decays, 1):
            config.stage_tables[0]["steps"] = steps
            trainer = Trainer(config, parallel.start(config.parallel, "cpu"))
            trainer.run()
            parallel.stop()
        assert len(trainer.ema.state_dict()) == expected
        export.main(export.ExportFlags(config.run.out, tmp_path / f"model{expected}"))
    parallel.start(config.parallel, "cpu")


def test_a_step_that_is_not_finite_is_left_out_counted_and_its_sample_named(
    world: Config, tmp_path: Path, alone: None, caplog: pytest.LogCaptureFixture
) -> None:
    config = copy.deepcopy(world)
    config.run.out = tmp_path
    trainer = Trainer(config, parallel.start(config.parallel, "cpu"))
    trainer.train_step()
    before = gather_state(trainer.networks)
    good = next(trainer.loader)
    good[0].samples[0].latents[0, 0, 0, 0] = float("nan")
    trainer.loader = iter([good])  # type: ignore[assignment]
    trainer.train_step()
    assert all(torch.equal(value, before[name]) for name, value in gather_state(trainer.networks).items())
    assert (trainer.guard.not_finite, trainer.guard.spikes) == (1, 0)
    key = good[0].samples[0].key
    assert f"step 1 is left out, the loss of puppets: {key} is not finite" in caplog.text


@pytest.mark.slow
def test_exported_weights_are_the_averages_and_generate_finds_all_it_needs(
    straight: Path, world: Config, tmp_path: Path, alone: None
) -> None:
    export.main(export.ExportFlags(straight, tmp_path / "averaged"))
    export.main(export.ExportFlags(straight, tmp_path / "last", averages=False))
    named = "transformer/diffusion_pytorch_model.safetensors"
    averaged, last, at_the_end = (
        load_file(folder / named) for folder in (tmp_path / "averaged", tmp_path / "last", straight / "model")
    )
    assert all(torch.equal(value, at_the_end[name]) for name, value in averaged.items())
    assert any(not torch.equal(value, last[name]) for name, value in averaged.items())
    checkpoint = load_checkpoint(tmp_path / "averaged", torch.float32, "cpu")
    assert checkpoint.settings.clip_latents == world.model.clip_latents


def test_a_later_stage_that_does_not_divide_over_the_ranks_is_refused_at_once(
    world: Config, processes: Any, tmp_path: Path
) -> None:
    config = copy.deepcopy(world)
    config.stage_tables[1]["batch"] = {"count": 3}
    with pytest.raises(JobFailed, match=r"stages\.listen\.batch\.count must be a multiple of the 2 data ranks, got 3"):
        processes(2, train, config, tmp_path)
    assert not (tmp_path / "log.jsonl").exists()
