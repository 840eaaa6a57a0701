# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a training step on a tiny model: both steps are the same mathematics, and the file can be used."""

import json

import pytest
import torch

from bench import train_step
from talkingdit.plan.run import Cluster, measured
from training import parallel


def test_both_steps_agree_and_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the other tests
    assert train_step.main(["--device", "cpu", "--shape", "tiny", "--repeats", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cpu-train_step.json").read_text())
    assert [row["shape"] for row in result["steps"]] == [f"tiny, checkpointing {mode}" for mode in train_step.MODES]
    assert all(row["median_us"] > 0 and row["official_us"] > 0 and row["tokens"] == 72 for row in result["steps"])
    assert "constants" not in result  # nobody states the speed of a CPU


def test_steps_that_differ_are_not_measured(monkeypatch):
    real = train_step.build

    def other(*args):
        model = real(*args)
        with torch.no_grad():
            model.head.head.bias += 1
        return model

    theirs = train_step.official(train_step.SHAPES["tiny"], 1, torch.device("cpu"))
    monkeypatch.setattr(train_step, "official", lambda *args: theirs)
    monkeypatch.setattr(train_step, "build", other)
    try:
        with pytest.raises(RuntimeError, match="loss of both steps must agree within"):
            train_step.run(train_step.SHAPES["tiny"], torch.device("cpu"), 1, 1, ["off"])
    finally:
        parallel.stop()


def test_the_plan_reads_the_share_of_the_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "stated_tflops", lambda device: 1e-3)
    result = train_step.run(train_step.SHAPES["tiny"], torch.device("cpu"), 1, 1, ["full"])
    file = tmp_path / "step.json"
    file.write_text(json.dumps(result))
    cluster = measured(Cluster(), file)
    assert cluster.efficiency == result["constants"]["efficiency"] > 0
    assert cluster.measured == {"efficiency"}
    assert result["steps"][0]["utilisation"] < cluster.efficiency  # what is computed twice counts once
