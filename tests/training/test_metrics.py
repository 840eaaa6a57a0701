# SPDX-License-Identifier: Apache-2.0
"""What a run tells of itself: means over ranks, files that go on where the run does, steps left out, profiles."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from talkingdit import families
from talkingdit.data.sample import Sample
from talkingdit.distributed.team import from_rank_0
from talkingdit.errors import UserError
from talkingdit.plan.clip import ClipShape
from talkingdit.plan.transformer import Transformer
from training.batching import MicroBatch
from training.guard import ENOUGH, PATIENCE, WINDOW, Guard
from training.metrics import Means, Writer, sum_over_ranks, work_of
from training.profiling import Profile
from training.sections import LogConfig

QUIET = LogConfig(tensorboard=False)


def means(rank_sums: list[dict[str, tuple[float, float]]]) -> list[Any]:
    rank = torch.distributed.get_rank()
    mean = Means()
    for name, (total, count) in rank_sums[rank].items():  # in two halves, as two micro-batches bring them
        for _ in range(2):
            mean.add({name: (torch.tensor(total / 2), count / 2)})
    found = mean.collect()
    return [found, mean.collect(), sum_over_ranks({"a": 1.0 + rank}, 2), from_rank_0(lambda: 7.0 + rank)]


def test_means_are_over_the_samples_of_all_ranks(processes: Any) -> None:
    mine = {"loss": (6.0, 2.0), "with_audio": (1.0, 1.0)}
    theirs = {"loss": (1.0, 5.0), "without_audio": (9.0, 3.0), "never": (0.0, 0.0)}
    for found, after, sums, first in processes(2, means, [mine, theirs]):
        assert found == pytest.approx({"loss": 1.0, "with_audio": 1.0, "without_audio": 3.0})
        assert after == {}
        assert (sums, first) == ({"a": 1.5}, 7.0)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_log_goes_on_behind_the_checkpoint_and_forgets_a_lost_end(tmp_path: Path) -> None:
    config = LogConfig(tensorboard=True)
    writer = Writer(tmp_path, 0, config, {})
    for step in (1, 2, 3, 4):
        writer.scalars({"loss": float(step)}, step)
    writer.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a line
    writer = Writer(tmp_path, 2, config, {})
    for step in (3, 4):
        writer.scalars({"loss": 10.0 * step}, step)
    writer.frames("validation/frames", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 4)
    writer.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")][-3:] == [(2, 2.0), (3, 30.0), (4, 40.0)]
    assert board.Images("validation/frames")[0].step == 4


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_every_line_is_json_that_any_program_reads(tmp_path: Path, number: float) -> None:
    writer = Writer(tmp_path, 0, QUIET, {})
    writer.scalars({"loss": number, "gradient_norm": 2.0}, 1)
    writer.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    [line] = [json.loads(text, parse_constant=refuse) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert line == {"step": 1, "loss": None, "gradient_norm": 2.0}


@pytest.mark.parametrize("wreck", ["\n", "null\n", "[1]\n", '{"loss": 1}\n', "\x00\x00\n"])
def test_lines_of_no_use_do_not_stop_a_run(tmp_path: Path, wreck: str) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n' + wreck)
    Writer(tmp_path, 1, QUIET, {}).close()
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_the_work_of_a_micro_batch_is_that_of_its_clips_as_planned() -> None:
    transformer = Transformer.of(families.get("wan_s2v"), {})
    first = Sample("a", "s", torch.zeros(16, 4, 6, 8), reference=torch.zeros(16, 1, 6, 8))
    later = Sample("b", "s", torch.zeros(16, 2, 8, 8), history=torch.zeros(16, 19, 8, 8))
    clips = [ClipShape(48, 64, latents=4, history=0), ClipShape(64, 64, latents=2, history=19)]
    found = work_of(MicroBatch([first, later], [0, 1], True), transformer)
    assert found["tokens"] == sum(transformer.tokens(clip)[1] for clip in clips)
    assert found["frames"] == 24
    assert found["flops"] == 3 * sum(transformer.flops(clip) for clip in clips)
    stands_in = work_of(MicroBatch([first, later], [0, 1], True, [1.0, 0.0]), transformer)
    assert stands_in["tokens"] == transformer.tokens(clips[0])[1]


def test_spikes_and_numbers_that_are_none_are_left_out_and_counted() -> None:
    guard = Guard(factor=10)
    assert guard.allows(1000.0)  # nothing to compare with yet
    assert all(guard.allows(1 + 0.01 * i) for i in range(ENOUGH))
    assert not guard.allows(20.0)
    assert not guard.allows(math.nan)
    assert not guard.allows(math.inf)
    assert guard.allows(5.0)
    assert (guard.spikes, guard.not_finite, guard.in_a_row) == (1, 2, 0)
    other = Guard(factor=10)
    other.load_state_dict(guard.state_dict())
    assert (other.spikes, other.not_finite, list(other.norms)) == (1, 2, list(guard.norms))
    careless = Guard()
    assert all(careless.allows(norm) for norm in [1.0] * ENOUGH + [1e6])
    assert not careless.allows(math.nan)


def test_a_gradient_that_stays_large_is_accepted_after_a_while() -> None:
    guard = Guard(factor=10)
    for _ in range(WINDOW):
        guard.allows(1.0)
    refused = 0
    while not guard.allows(50.0):
        refused += 1
    assert refused < PATIENCE
    assert statistics.median(guard.norms) > 5


def test_a_run_that_goes_nowhere_ends_with_a_sentence() -> None:
    guard = Guard()
    for _ in range(PATIENCE - 1):
        assert not guard.allows(math.nan)
    with pytest.raises(UserError, match=rf"{PATIENCE} steps in a row .*\(the last norm was nan\); try a smaller"):
        guard.allows(math.nan)


def named(marks: range, at: int, steps: int, folder: Path, begin: int = 0) -> set[str]:
    """The steps that a profile saw, of those that ran."""
    with Profile(LogConfig(profile_at=at, profile_steps=steps), folder, begin) as profile:
        for step in marks:
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(2) + 1
            profile.step()
    file = folder / "profile" / "rank0.json"
    if not file.exists():
        return set()
    events = json.loads(file.read_text())["traceEvents"]
    return {event["name"] for event in events if str(event.get("name")).startswith("step ")}


def test_a_profile_has_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    assert named(range(6), 2, 2, tmp_path / "middle") == {"step 2", "step 3"}
    assert named(range(2), 0, 5, tmp_path / "short") == {"step 0", "step 1"}
    assert named(range(4, 8), 4, 1, tmp_path / "resumed", begin=4) == {"step 4"}
    assert named(range(4, 8), 2, 3, tmp_path / "passed", begin=4) == set()
    assert named(range(3), 1, 0, tmp_path / "none") == set()


@pytest.mark.slow
def test_weights_and_biases_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = LogConfig(tensorboard=False, wandb="talkingdit-test")
    name = None
    for step in (1, 2):
        writer = Writer(tmp_path, step - 1, config, {"run": {"seed": 1}})
        writer.scalars({"loss": 1.0}, step)
        writer.close()
        now = (tmp_path / "wandb_id").read_text()
        assert name in (None, now)
        name = now
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))) >= 1


def test_weights_and_biases_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb needs wandb, which is not installed: pip install 'talkingdit\[wa"):
        Writer(tmp_path, 0, LogConfig(tensorboard=False, wandb="project"), {})
