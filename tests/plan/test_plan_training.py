# SPDX-License-Identifier: Apache-2.0
"""Predictions of training against counts of the real step on fake tensors and a fake process group."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import scaling
from bench.counted_step import CountedStep, count
from talkingdit import families
from talkingdit.cli import main as cli
from talkingdit.plan import training as planner
from talkingdit.plan.clip import ClipShape
from talkingdit.plan.communication import communication
from talkingdit.plan.run import Cluster, MeshSizes, TrainingRun
from talkingdit.plan.training_memory import memory, states
from talkingdit.plan.transformer import Transformer
from talkingdit.plan.units import unit_sizes
from training.lora import add_adapters
from training.sections import LoraConfig, ModelConfig, OptimConfig, ParallelConfig

WIDTH = dict(dim=512, ffn_dim=1408, num_heads=8, text_dim=64, text_len=16, audio_dim=32, audio_layers=3)
SMALL = Transformer.of(families.get("wan_s2v"), {**WIDTH, "num_layers": 3, "audio_inject_layers": (0, 2)})
CLIP = ClipShape(704, 1024, 12, history=19, pose=True)
WHICH = {
    "all": lambda name: True,
    "lora": lambda name: ".lora_" in name,
    "audio": lambda name: name.startswith(("casual_audio_encoder.", "audio_injector.")),
}


def counted(run, layout, gpus):
    sizes = {name: getattr(layout, name) for name in ("replicate", "shard", "ring", "ulysses")}
    return count(
        CountedStep(
            SMALL.config,
            run.clip,
            ParallelConfig(**sizes, activation_checkpointing=run.checkpointing, inputs=run.inputs),
            layout.data * layout.context,
            gpus,
            OptimConfig(name=run.optimizer),
            model=ModelConfig(frozen=run.frozen),
            micro_batches=run.micro_batches // layout.data,
            averages=run.averages,
            trains=WHICH[run.trains],
            prepare=lambda model: add_adapters(model, LoraConfig(rank=32)) if run.trains == "lora" else None,
        )
    )


@pytest.mark.parametrize(
    ("run", "layout", "gpus"),
    [
        (TrainingRun(CLIP), MeshSizes(ulysses=8), 8),
        (TrainingRun(CLIP, 2, checkpointing="off", averages=False), MeshSizes(shard=2, ring=2, ulysses=4), 8),
        (TrainingRun(CLIP, 8, "muon", "selective"), MeshSizes(replicate=2, shard=2, ulysses=2), 4),
        (TrainingRun(CLIP, trains="lora"), MeshSizes(ring=2, ulysses=2), 4),
        (TrainingRun(CLIP, trains="audio"), MeshSizes(ulysses=8), 4),
        (TrainingRun(CLIP, trains="lora", frozen="bf16", inputs="bf16"), MeshSizes(ulysses=2), 2),
        (TrainingRun(CLIP, trains="lora", frozen="int8", inputs="bf16", averages=False), MeshSizes(), 1),
    ],
    ids=[
        *("ulysses", "fsdp-ring-ulysses-off", "hsdp-muon-selective-two-micro-batches", "lora", "audio-two-nodes"),
        *("lora-bf16", "lora-int8-one-card"),
    ],
)
def test_memory_and_communication_are_those_of_the_real_step(run, layout, gpus):
    real = counted(run, layout, gpus)
    sizes = unit_sizes(SMALL, run)
    assert sum(memory(SMALL, sizes, run, layout).values()) == pytest.approx(real.peak_bytes, rel=0.07)
    held = states(sizes, run, layout.sharded)
    assert held["weights"] == real.held["parameters"]
    assert held["optimiser"] == pytest.approx(real.held["optimiser"], rel=1e-3)
    assert held["averages"] == real.held.get("averages", 0)
    sent = communication(SMALL, sizes, run, layout, gpus)
    assert sum(part.bytes for part in sent.values()) == pytest.approx(sum(s.bytes for s in real.sent), rel=1e-3)
    assert sum(part.outside for part in sent.values()) == pytest.approx(sum(s.outside for s in real.sent), rel=1e-3)


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
