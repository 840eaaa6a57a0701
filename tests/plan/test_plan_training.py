# SPDX-License-Identifier: Apache-2.0
"""Predictions of training against counts of the real step on fake tensors and a fake process group."""

import json
import math
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from bench import one_card, scaling
from bench.counted_step import CountedStep, as_on_the_host, count
from talkingdit import families
from talkingdit.cli import main as cli
from talkingdit.plan import training as planner
from talkingdit.plan.cards import needed
from talkingdit.plan.clip import ClipShape
from talkingdit.plan.communication import communication
from talkingdit.plan.run import CHECKPOINTING, FLOAT8, FROZEN, INPUTS, OPTIMIZERS, Cluster, MeshSizes, TrainingRun
from talkingdit.plan.training_memory import host, memory, states
from talkingdit.plan.transformer import Transformer
from talkingdit.plan.units import unit_sizes
from training import plan as command
from training.config import read_toml
from training.host import HOST
from training.lora import add_adapters
from training.sections import LoraConfig, ModelConfig, OptimConfig, ParallelConfig

WIDTH = dict(dim=512, ffn_dim=1408, num_heads=8, text_dim=64, text_len=16, audio_dim=32, audio_layers=3)
SMALL = Transformer.of(families.get("wan_s2v"), {**WIDTH, "num_layers": 3, "audio_inject_layers": (0, 2)})
ALONE = MeshSizes()
CLIP = ClipShape(704, 1024, 12, history=19, pose=True)
WHICH = {
    "all": lambda name: True,
    "lora": lambda name: ".lora_" in name,
    "audio": lambda name: name.startswith(("casual_audio_encoder.", "audio_injector.")),
}


def step_of(run, layout=ALONE, gpus=1, config=SMALL.config):
    sizes = {name: getattr(layout, name) for name in ("replicate", "shard", "ring", "ulysses")}
    switches = {name: getattr(run, name) for name in ("inputs", "offload", "float8")}
    return CountedStep(
        config,
        run.clip,
        ParallelConfig(**sizes, precision="bf16", activation_checkpointing=run.checkpointing, **switches),
        layout.data * layout.context,
        gpus,
        OptimConfig(name=run.optimizer),
        model=ModelConfig(frozen=run.frozen, swap=run.swap),
        micro_batches=run.micro_batches // layout.data,
        averages=run.averages,
        trains=WHICH[run.trains],
        prepare=lambda model: add_adapters(model, LoraConfig(rank=run.lora_rank)) if run.trains == "lora" else None,
    )


ADAPTERS = replace(TrainingRun(CLIP, asynchronous=False, validates=False), trains="lora")
ONE_CARD = {
    "lora-int8-one-card": replace(ADAPTERS, frozen="int8", inputs="bf16", averages=False),
    "as-proposed-for-24-gb": replace(
        ADAPTERS, frozen="int8", inputs="host_bf16", swap=2, optimizer="adamw8bit", micro_batches=2
    ),
    "exact-offloaded": replace(ADAPTERS, frozen="bf16", inputs="host", offload=True),
    "fp8-swapped-selective": replace(ADAPTERS, frozen="fp8", inputs="host", swap=5, checkpointing="selective"),
    "fp8-offloaded-two-micro-batches": replace(ADAPTERS, frozen="fp8", offload=True, micro_batches=2),
    "lora-selective-low-rank": replace(ADAPTERS, checkpointing="selective", lora_rank=8, optimizer="adamw8bit"),
    "float8-rowwise": replace(ADAPTERS, float8="rowwise"),
    "float8-forward-off": replace(ADAPTERS, float8="forward", checkpointing="off", frozen="bf16"),
    "muon-offloaded": TrainingRun(CLIP, optimizer="muon", offload=True, asynchronous=False, validates=False),
}


def test_every_switch_has_a_counted_row():
    """A new value of a switch would else be planned by a formula that nothing holds to the program."""
    counted = [parameters[0] for parameters in CASES.values()]
    switches = {
        "optimizer": OPTIMIZERS,
        "checkpointing": CHECKPOINTING,
        "frozen": FROZEN,
        "inputs": INPUTS,
        "float8": FLOAT8,
        "offload": (False, True),
        "averages": (False, True),
        "trains": WHICH,
    }
    for name, values in switches.items():
        assert {getattr(run, name) for run in counted} == set(values), name
    assert {bool(run.swap) for run in counted} == {False, True}
    fixed = {"clip", "micro_batches", "swap", "lora_rank", "asynchronous", "validates"}
    assert {entry.name for entry in fields(TrainingRun)} == fixed | set(switches)


CASES = {
    "ulysses": (TrainingRun(CLIP), MeshSizes(ulysses=8), 8),
    "fsdp-ring-ulysses-off": (
        *(TrainingRun(CLIP, 2, checkpointing="off", averages=False), MeshSizes(shard=2, ring=2, ulysses=4), 8),
    ),
    "hsdp-muon-selective-two-micro-batches": (
        *(TrainingRun(CLIP, 8, "muon", "selective"), MeshSizes(replicate=2, shard=2, ulysses=2), 4),
    ),
    "lora": (TrainingRun(CLIP, trains="lora"), MeshSizes(ring=2, ulysses=2), 4),
    "audio-two-nodes": (TrainingRun(CLIP, trains="audio"), MeshSizes(ulysses=8), 4),
    "lora-bf16": (TrainingRun(CLIP, trains="lora", frozen="bf16", inputs="bf16"), MeshSizes(ulysses=2), 2),
    **{name: (run, ALONE, 1) for name, run in ONE_CARD.items()},
}


@pytest.mark.parametrize(("run", "layout", "gpus"), CASES.values(), ids=CASES)
def test_memory_and_communication_are_those_of_the_real_step(run, layout, gpus):
    real = count(step_of(run, layout, gpus))
    sizes = unit_sizes(SMALL, run)
    assert sum(memory(SMALL, sizes, run, layout).values()) == pytest.approx(real.peak_bytes, rel=0.07)
    waits = host(SMALL, sizes, replace(run, asynchronous=False, validates=False), layout)
    # A few numbers that are no part of a card's work lie there too, such as an optimiser's count of steps.
    assert sum(waits.values()) == pytest.approx(sum(real.host.values()), rel=0.07, abs=3e5)
    assert real.host.get("parameters", 0) == (held := states(sizes, run, layout.sharded))["weights"] * run.offload + (
        sizes.eight_bytes(True)
    )
    place = real.host if run.offload else real.held
    assert held["optimiser"] == pytest.approx(place["optimiser"], rel=1e-3)
    assert held["averages"] == place.get("averages", 0)
    assert real.held.get("parameters", 0) == (0 if run.offload else held["weights"])
    sent = communication(SMALL, sizes, run, layout, gpus)
    assert sum(part.bytes for part in sent.values()) == pytest.approx(sum(s.bytes for s in real.sent), rel=1e-3)
    assert sum(part.outside for part in sent.values()) == pytest.approx(sum(s.outside for s in real.sent), rel=1e-3)


# ---- Executed --------------------------------------------------------------------------------------------------------


def allocated(step):
    """The most bytes at once that PyTorch's allocator has given out while a step, and all before it, really runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ran = count(step, HOST, nullcontext)
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most, ran


@pytest.mark.parametrize("name", ["as-proposed-for-24-gb", "exact-offloaded", "lora-int8-one-card"])
def test_what_is_counted_without_storage_is_what_a_step_allocates(name):
    """On the processor, which is host and card in one: what waits for a card stays where it is, in both."""
    run = replace(ONE_CARD[name], clip=ClipShape(128, 192, 8, history=19, pose=True), lora_rank=8)
    step = step_of(run, config={**SMALL.config, "dim": 128, "ffn_dim": 352, "num_heads": 4})
    without = count(step, HOST, as_on_the_host)
    most, ran = allocated(step)
    assert (ran.peak, ran.held, ran.moment) == (without.peak, without.held, without.moment)
    assert without.peak_bytes == pytest.approx(most, rel=0.03)  # the rest are what kernels need inside


# ---- Released size ---------------------------------------------------------------------------------------------------

ROWS = json.loads((Path(__file__).parents[2] / "bench" / "results" / "scaling.json").read_text())["rows"]


RELEASED = scaling.transformer()


@pytest.fixture(scope="module")
def released_sizes():
    found = {}

    def get(run):
        key = (run.optimizer, run.trains)
        if key not in found:
            found[key] = unit_sizes(RELEASED, run)
        return found[key]

    return get


@pytest.mark.parametrize("row", ROWS, ids=[f"{r['world']}-{i}" for i, r in enumerate(ROWS)])
def test_predictions_of_the_14b_model_are_what_was_counted(row, released_sizes):
    case = scaling.case_of(row)
    sizes = released_sizes(case.run)
    assert sum(memory(RELEASED, sizes, case.run, case.mesh).values()) == pytest.approx(
        sum(row["peak"].values()), rel=0.03
    )
    sent = communication(RELEASED, sizes, case.run, case.mesh, scaling.GPUS)
    for what in ("bytes", "outside"):
        predicted = sum(getattr(part, what) for part in sent.values())
        assert predicted == pytest.approx(sum(entry[what] for entry in row["sent"]), rel=1e-3)


ONE_CARD_ROWS = json.loads(one_card.RESULTS.read_text())["rows"]


@pytest.mark.parametrize("row", ONE_CARD_ROWS, ids=[row["what"] for row in ONE_CARD_ROWS])
def test_predictions_of_adapters_on_one_card_are_what_was_counted(row):
    card, beside = one_card.predicted(one_card.case_of(row))
    assert card == pytest.approx(sum(row["peak"].values()), rel=0.03)
    assert beside == pytest.approx(sum(row["host"].values()), rel=0.03)


def test_what_is_proposed_for_24_gb_was_counted():
    """Of the plan for a card, and of the configuration that ships: no row of other switches stands for them."""
    counted = [one_card.case_of(row).run for row in ONE_CARD_ROWS]
    assert [one_card.case_of(row) for row in ONE_CARD_ROWS] == list(one_card.cases())
    clip = ClipShape(448, 832, 20, history=19)
    cluster = Cluster(1, 1, 24 * 2**30, 165)
    for limit in (math.inf, 36e9):
        found, fits = planner.best(RELEASED, TrainingRun(clip, trains="lora"), replace(cluster, host=limit))
        assert fits
        assert replace(found.run, asynchronous=False, validates=False) in counted
    config = read_toml(Path(__file__).parents[2] / "training" / "configs" / "wan_s2v_lora_24gb.toml")
    _, shipped = command.planned(config, cluster, RELEASED)
    assert replace(shipped.run, asynchronous=False, validates=False) in counted


def test_adapters_take_half_the_host_of_what_they_took_and_24_gb():
    """Counted: the step of the configuration that ships against float32 on the host."""
    before, *_, shipped = ONE_CARD_ROWS
    assert needed(sum(shipped["peak"].values())) <= 24e9
    assert sum(shipped["host"].values()) <= 0.5 * sum(before["host"].values())


@pytest.mark.parametrize("frames", [48, 80])
def test_full_training_of_the_14b_model_at_704x1024_fits_8_cards_of_80_gb(frames):
    row = next(r for r in ROWS if (r["world"], r["ulysses"], r["frames"], r["checkpointing"]) == (8, 8, frames, "full"))
    assert sum(row["peak"].values()) < 60e9
    run = TrainingRun(ClipShape(704, 1024, frames // 4, history=19))
    found, fits = planner.best(RELEASED, run, Cluster())
    assert fits
    assert found.needed < 80 * 2**30


def test_switches_are_taken_in_the_order_of_what_they_cost():
    run = TrainingRun(ClipShape(704, 1024, 12, history=19))
    roomy, _ = planner.best(SMALL, run, Cluster(memory=80e9))
    assert roomy.run.checkpointing == "off"
    needed = [roomy.needed]
    taken = [roomy.run]
    while True:
        found, fits = planner.best(SMALL, run, Cluster(memory=needed[-1] - 1))
        if not fits:
            break
        assert found.needed < needed[-1]
        needed.append(found.needed)
        taken.append(found.run)
    assert taken[-1].offload
    assert not any(one.offload for one in taken if one.checkpointing != "full")


def test_given_switches_are_kept():
    run = TrainingRun(ClipShape(704, 1024, 12, history=19), optimizer="muon", checkpointing="selective")
    found, fits = planner.best(SMALL, run, Cluster(memory=1e9), frozenset({"optimizer", "checkpointing", "offload"}))
    assert not fits
    assert (found.run.optimizer, found.run.checkpointing, found.run.offload) == ("muon", "selective", False)


def test_layouts_use_every_gpu_and_divide_heads_and_micro_batches():
    found = list(planner.layouts(12, TrainingRun(CLIP, 4), Cluster(nodes=2)))
    assert len(set(found)) == len(found) > 10
    for layout in found:
        assert layout.data * layout.context == 16
        assert 12 % layout.ulysses == 0
        assert 4 % layout.data == 0
    assert not any(layout.ulysses == 8 for layout in found)


def test_long_sequences_go_over_ulysses_within_a_node():
    found, _ = planner.best(RELEASED, TrainingRun(ClipShape(704, 1024, 20, history=19), 4), Cluster(nodes=4))
    assert found.mesh.ulysses * found.mesh.ring <= 8
    ring = planner.predict(
        *(RELEASED, unit_sizes(RELEASED, found.run), found.run),
        *(Cluster(nodes=4), MeshSizes(ring=4, ulysses=8)),
    )
    assert ring.seconds["context parallelism"] > found.seconds["context parallelism"]


@pytest.mark.parametrize(("name", "value"), [("optimizer", "sgd"), ("checkpointing", "some"), ("trains", "head")])
def test_unknown_names_are_refused(name, value):
    with pytest.raises(ValueError, match=f"plan: {name} must be one of .*, got '{value}'"):
        unit_sizes(SMALL, replace(TrainingRun(CLIP), **{name: value}))


TRAIN = ["plan", "--train", "--preset", "wan_s2v_14b", "--size", "1024x704", "--frames", "48"]


def test_command_prints_the_layout_and_says_that_time_is_an_estimate(capsys):
    assert cli.main([*TRAIN, "--card", "h100"]) == 0
    said = capsys.readouterr().out
    assert "--parallel.replicate 1 --parallel.shard 1 --parallel.ring 1 --parallel.ulysses 8" in said
    assert "--parallel.activation-checkpointing selective --optim.name adamw" in said
    assert "an estimate" in said
    assert said.count(": assumed") == 3
    assert said.rstrip().endswith("fits")


def test_command_says_in_one_sentence_that_nothing_fits(capsys):
    assert cli.main([*TRAIN, "--card", "24GB", "--tflops", "165", "--gpus", "1"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("does not fit: the layout and switches that need least still take")
    assert "of the card's 25.77 GB; take more GPUs" in last


def test_command_takes_measured_constants(capsys, tmp_path):
    file = tmp_path / "step.json"
    file.write_text(json.dumps({"constants": {"efficiency": 0.25}}))
    assert cli.main([*TRAIN, "--card", "h100", "--measured", str(file), "--inside", "200"]) == 0
    said = capsys.readouterr().out
    assert f"25% of 989 TFLOP/s while it computes: measured ({file})" in said
    assert "200 GB/s within a node: assumed" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--card", "24GB"], "--train needs the speed of the card"),
        (["--card", "h100", "--optimizer", "sgd"], "optimizer must be one of adamw, adamw8bit, muon, got 'sgd'"),
        (["--card", "h100", "--measured", "nowhere.json"], "--measured must be a file that bench/train_step.py wrote"),
        (["--card", "h100", "--train-only", "head"], "trains must be one of all, lora, audio, got 'head'"),
    ],
)
def test_command_refuses_what_it_cannot_plan(more, message, capsys):
    assert cli.main([*TRAIN, *more]) == 2
    assert message in capsys.readouterr().err
