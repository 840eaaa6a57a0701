# SPDX-License-Identifier: Apache-2.0
"""What configurations take as they ship, and that the pages say what the formulas do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench import scaling
from talkingdit import families
from talkingdit.cli import main as cli
from talkingdit.plan import training as planner
from talkingdit.plan.cards import COMMUNICATOR, card_of
from talkingdit.plan.clip import ClipShape
from talkingdit.plan.report import training_report
from talkingdit.plan.run import Cluster, MeshSizes, TrainingRun
from talkingdit.plan.training_memory import margins
from talkingdit.plan.transformer import Transformer
from talkingdit.plan.units import unit_sizes
from training import plan as command
from training.config import Config, read_toml

ROOT = Path(__file__).parents[2]
RELEASED = scaling.transformer()
CLIP = ClipShape(448, 832, 20, history=19, pose=True)
SMALL = Transformer.of(
    families.get("wan_s2v"),
    dict(dim=512, ffn_dim=1408, num_heads=8, num_layers=3, audio_inject_layers=(0, 2), text_dim=64, text_len=16,
         audio_dim=32, audio_layers=3),
)  # fmt: skip


def rows_of(page: str) -> dict[str, list[str]]:
    """Rows of the table of configurations: file to cells."""
    text = (ROOT / "docs" / page).read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| `wan" in line]
    return {row[0].strip("`"): row[1:] for row in cells if row[0].endswith(".toml`") and len(row) == 7}


ROWS = rows_of("scaling.md")


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(ROWS))
def test_the_page_says_what_the_formula_does(file: str) -> None:
    gpus, name, *numbers = ROWS[file]
    memory, speed = card_of("h100" if int(gpus) > 1 else "rtx4090")
    assert speed is not None
    config = read_toml(ROOT / "training" / "configs" / file)
    assert (config.model.preset, config.model.settings) == ("wan_s2v_14b", {})
    stage, plan = command.planned(config, Cluster(1, int(gpus), memory, speed), RELEASED)
    host = sum(plan.host.values()) * int(gpus)
    found = (plan.peak, sum(plan.validation.values()), plan.needed, host)
    assert (stage.name, [f"{value / 1e9:.1f}" for value in found]) == (name, numbers)
    assert plan.needed < memory


@pytest.mark.slow
def test_the_page_has_what_was_counted_and_what_is_predicted_now() -> None:
    results = json.loads((ROOT / "bench" / "results" / "scaling.json").read_text())
    assert scaling.table(results["rows"]) in (ROOT / "docs" / "scaling.md").read_text()


def test_every_wan_s2v_configuration_is_in_the_table() -> None:
    assert set(ROWS) == {path.name for path in (ROOT / "training" / "configs").glob("wan_s2v*.toml")}


def test_adapters_of_the_14b_model_fit_24_gb_and_less_than_half_the_host() -> None:
    before = TrainingRun(CLIP, checkpointing="full", trains="lora", offload=True, asynchronous=False, validates=False)
    old = planner.predict(RELEASED, unit_sizes(RELEASED, before), before, Cluster(1, 1), MeshSizes())
    assert old.needed > 47e9
    config = read_toml(ROOT / "training" / "configs" / "wan_s2v_lora_24gb.toml")
    _, new = command.planned(config, Cluster(1, 1, 24 * 2**30, 165), RELEASED)
    assert new.needed <= 24e9
    assert sum(new.host.values()) <= 0.5 * sum(old.host.values())


# ---- What is beside tensors ------------------------------------------------------------------------------------------


def plan_of(run: TrainingRun, mesh: MeshSizes) -> planner.TrainPlan:
    return planner.predict(SMALL, unit_sizes(SMALL, run), run, Cluster(), mesh)


@pytest.mark.parametrize(
    ("mesh", "axes"),
    [
        (MeshSizes(), 0),
        (MeshSizes(shard=8), 1),
        (MeshSizes(ulysses=8), 2),  # parameters, the sequence
        (MeshSizes(ring=2, ulysses=4), 4),
        (MeshSizes(replicate=2, ulysses=4), 3),
    ],
)
def test_every_axis_that_talks_has_a_communicator(mesh: MeshSizes, axes: int) -> None:
    assert plan_of(TrainingRun(CLIP, 2), mesh).margins["communicators"] == axes * COMMUNICATOR


def test_pools_are_what_two_streams_cannot_lend_each_other() -> None:
    """Kept in the main stream 5 then 0, gradients in the other 0 then 4: together never over 6, of their own 9."""
    moments = [{"kept": 5.0, "gradients": 0.0, "gathered": 1.0}, {"kept": 0.0, "gradients": 4.0, "gathered": 1.0}]
    assert margins(MeshSizes(), moments)["pools"] == 10 - 6
    assert margins(MeshSizes(), moments[:1])["pools"] == 0


def test_validation_has_the_weights_twice_and_checkpoints_are_copied() -> None:
    mesh, run = MeshSizes(ulysses=8), TrainingRun(CLIP, 2)
    plan = plan_of(run, mesh)
    assert plan.validation["weights that wait"] == plan.memory["averages"] == plan.memory["weights"]
    saved = plan.memory["weights"] + plan.memory["optimiser"] + plan.memory["averages"]
    assert plan.host == {"copy of a checkpoint": saved}
    quiet = plan_of(replace(run, asynchronous=False, validates=False), mesh)
    assert (quiet.host, quiet.validation) == ({}, {})
    alone = plan_of(replace(run, averages=False), mesh)
    assert alone.validation["weights that wait"] == 0
    assert plan.needed >= max(plan.peak, sum(plan.validation.values())) + plan.margins["communicators"]


def test_a_machine_with_too_little_memory_beside_its_cards_is_no_fit() -> None:
    run = TrainingRun(CLIP, trains="lora")
    roomy, fits = planner.best(RELEASED, run, Cluster(1, 1, 24 * 2**30, 165))
    assert fits
    assert (roomy.run.frozen, roomy.run.inputs, roomy.run.offload) == ("bf16", "host", True)  # exact
    tight, fits = planner.best(RELEASED, run, Cluster(1, 1, 24 * 2**30, 165, host=36e9))
    assert fits
    assert (tight.run.frozen, tight.run.inputs) == ("int8", "host_bf16")
    assert sum(tight.host.values()) < 36e9 < sum(roomy.host.values())
    _, fits = planner.best(RELEASED, run, Cluster(1, 1, 24 * 2**30, 165, host=5e9))
    assert not fits


def test_swapping_takes_as_few_blocks_as_it_must() -> None:
    run = TrainingRun(CLIP, trains="lora", optimizer="adamw8bit", frozen="int8", inputs="host_bf16")
    sizes = [plan_of(replace(run, swap=swap), MeshSizes()) for swap in (0, 1, 3, 5)]
    assert [p.needed for p in sizes] == sorted((p.needed for p in sizes), reverse=True)
    moved = [p.host.get("swapped weights", 0.0) for p in sizes]
    assert moved == sorted(moved)
    held = {round(p.memory["weights"] + m) for p, m in zip(sizes, moved, strict=True)}
    assert len(held) == 1


# ---- Words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "missing"),
    [
        (TrainingRun(CLIP, trains="lora"), "lora"),
        (TrainingRun(CLIP, averages=False), "averages"),
        (TrainingRun(CLIP, trains="lora", averages=False), "averages"),
    ],
)
def test_no_advice_that_was_followed_already(run: TrainingRun, missing: str) -> None:
    last = training_report(plan_of(run, MeshSizes()), False, SMALL, Cluster()).splitlines()[-1]
    assert last.startswith("does not fit:")
    assert missing not in last
    given = training_report(
        plan_of(replace(run, offload=True, optimizer="adamw8bit"), MeshSizes()), False, SMALL, Cluster(), given=True
    ).splitlines()[-1]
    assert not re.search("offload|adamw8bit|checkpointing full", given)


def test_what_was_not_tried_is_offered() -> None:
    last = training_report(plan_of(TrainingRun(CLIP), MeshSizes()), False, SMALL, Cluster()).splitlines()[-1]
    assert last.endswith("take more GPUs, a smaller or shorter clip, --no-averages, or --train-only lora")


def test_the_command_plans_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    command_line = ["plan", "--train", "--preset", "wan_s2v_14b", "--size", "832x448", "--card", "rtx4090"]
    command_line += ["--gpus", "1", "--train-only", "lora", "--host", "36GB"]
    assert cli.main(command_line) == 0
    said = capsys.readouterr().out
    assert "--model.frozen int8 --model.swap 26" in said
    assert "--parallel.inputs host_bf16" in said
    assert re.search(r"host +inputs of blocks +17\.\d+ GB of memory per node", said)
    assert said.rstrip().endswith("fits")


def test_a_configuration_is_planned_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "training" / "configs" / "puppets_tiny.toml")
    command.main(["--config", file, "--card", "24GB", "--tflops", "100", "--gpus", "1"])
    said = capsys.readouterr().out
    assert said.startswith("stage ")
    assert "--parallel.replicate 1 --parallel.shard 1" in said
    assert said.rstrip().endswith("fits")
    with pytest.raises(ValueError, match="--gpus: expected a whole number of at least 1, got 'many'"):
        command.main(["--config", file, "--gpus", "many"])


def test_the_clip_fills_the_budget_of_tokens() -> None:
    config = Config()
    config.model.preset, config.model.text_encoder = "wan_s2v_14b", "none"
    for tokens in (8000, 44544):
        config.batch.mode, config.batch.tokens, config.batch.frames = "pack", tokens, [20, 8]
        clip = command.clip_of(config, config.stages[0], RELEASED)
        assert 0.9 * tokens < RELEASED.tokens(clip)[1] <= tokens


@pytest.mark.parametrize(("kind", "checkpointing", "share"), [("forward", "off", 1), ("rowwise", "full", 3)])
def test_a_configuration_in_float8_takes_half_the_time_where_it_multiplies_so(
    kind: str, checkpointing: str, share: int
) -> None:
    config = read_toml(ROOT / "training" / "configs" / "wan_s2v.toml")
    config = replace(config, parallel=replace(config.parallel, activation_checkpointing=checkpointing))
    cluster, stage = Cluster(1, 8), config.stages[0]
    plain = command.predict_stage(config, stage, RELEASED, cluster)
    config = replace(config, parallel=replace(config.parallel, float8=kind))
    rounded = command.predict_stage(config, stage, RELEASED, cluster)
    products = RELEASED.flops(plain.run.clip) - RELEASED.cost.attention_flops(RELEASED.config, plain.run.clip)
    speed = cluster.tflops * 1e12 * cluster.efficiency
    saved = share * products / 2 * plain.run.per_rank(plain.mesh) / plain.mesh.context / speed
    assert plain.seconds["computing"] - rounded.seconds["computing"] == pytest.approx(saved)
    assert rounded.peak > plain.peak
    assert f"--parallel.float8 {kind}" in training_report(rounded, True, RELEASED, cluster, given=True)
