# SPDX-License-Identifier: Apache-2.0
"""The script for the GPU works before there is one: its steps, their limits, and what it notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import block, cases, gpu, gpu_checks, gpu_job, harness
from bench.cases import SmallCase

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


LACKING = (
    *("diffusers", "tyro", "docstring_parser", "typeguard", "soundfile", "av", "soxr", "ftfy", "webdataset"),
    "expecttest",
)
HIDE = f"""
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {LACKING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {LACKING!r} else find(name, package)
"""


@pytest.mark.slow
def test_a_dry_run_does_every_step_that_needs_no_gpu(tmp_path, capsys):
    out, archive = tmp_path / "out", tmp_path / "gpu.tar.gz"
    assert gpu.main(["--dry-run", "--out", str(out), "--archive", str(archive)]) == 0, capsys.readouterr().out
    written = {path.name: json.loads(path.read_text()) for path in out.iterdir()}
    with tarfile.open(archive) as tar:
        assert set(tar.getnames()) == written.keys()
    assert written["problems.json"] == []
    chosen = {name: step for name, step in gpu.steps().items() if step.dry}
    assert chosen.keys() == {name.split("-", 1)[1][:-5] for name in written if name.startswith("step-")}
    assert written["small.json"]["errors"]
    for op in cases.names():
        assert written[f"cpu-{op}.json"]["quick"]
        assert written[f"cpu-{op}.json"]["rows"]
    (step,) = written["cpu-block.json"]["steps"]
    assert step["moved_bytes"] < step["official_moved_bytes"]
    assert step["peak_bytes"] < step["official_peak_bytes"]
    assert step["official"]["kinds_us"]["matrix product"] > 0
    ways = {str(variant): variant for variant in block.VARIANTS}
    assert {name for name in ways if name in step} | step["left_out"].keys() == ways.keys()
    for name, variant in ways.items():
        if variant.attention == "auto":
            assert step[name]["error"] < variant.limit(torch.float32)
    assert "flash-attn-3, which is not installed" in step["left_out"]["ours, fp8, flash3 attention"]
    assert written["cpu-train_step.json"]["steps"]


@pytest.mark.slow
def test_a_machine_without_the_other_packages_measures_all_ops(tmp_path):
    """Such as one with a GPU, torch and pytest, and no network."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(HIDE)
    environment = os.environ | {"PYTHONPATH": str(hidden)}
    run = partial(subprocess.run, env=environment, cwd=ROOT, capture_output=True, text=True)
    done = run([sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(tmp_path / "out")])
    assert not done.stderr.count("Traceback"), done.stderr
    problems = json.loads((tmp_path / "out" / "problems.json").read_text())
    assert [line.split(":")[0] for line in problems] == [name for name, step in gpu.steps().items() if step.needs]
    assert all("left out, it needs diffusers" in line for line in problems)
    for op in (name for name in cases.names() if not cases.load(name).block):
        assert json.loads((tmp_path / "out" / f"cpu-{op}.json").read_text())["rows"]
    # And the tests for a GPU are found there.
    done = run([sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "cuda", *gpu_checks.TESTS])
    assert done.returncode == 0, done.stdout
    assert " error" not in done.stdout


def test_every_op_has_a_small_case():
    small = {case.name.split()[0] for case in cases.small_cases(torch.float32, CPU)}
    measured = set()
    for name in cases.names():
        benchmark = cases.load(name)
        if not benchmark.block:
            measured |= {case.op for case in benchmark.cases(benchmark.shapes["quick"][0], torch.float32, CPU)}
    assert measured <= small


def test_steps_are_chosen_by_name_and_part():
    def chosen(*arguments):
        return list(gpu.choose(gpu._parse(list(arguments))))

    assert "tests" in chosen("--part", "2")
    assert not set(chosen()) & set(chosen("--part", "2"))
    assert set(chosen()) | set(chosen("--part", "2")) == gpu.steps().keys()
    assert chosen("--only", "ops,tests") == ["ops", "tests"]
    assert "ops" not in chosen("--skip", "ops")
    assert sum(step.cap for step in gpu.steps().values() if step.part == 2) <= 60 * 3
    with pytest.raises(SystemExit):
        chosen("--only", "opss")


def test_without_a_gpu_and_not_dry_it_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "no CUDA device was found" in capsys.readouterr().err


def test_a_step_runs_in_a_process_of_its_own(tmp_path):
    ended = gpu.run_child("build", gpu.steps()["build"], CPU, tmp_path, 60.0)
    assert ended == {"failed": []} == json.loads((tmp_path / "step-build.json").read_text())
    assert "cuda" in json.loads((tmp_path / "build.json").read_text())


def test_a_process_that_takes_too_long_is_ended_with_all_it_started(tmp_path):
    mark = tmp_path / "mark"
    inner = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    outer = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {inner!r}])"
    result = gpu_job.run_command([sys.executable, "-c", outer], 1.0)
    assert result["skipped"] == "stopped after 1 s"
    assert not mark.exists()


def test_what_a_stopped_step_had_written_is_kept(tmp_path, monkeypatch):
    def stopped(command, seconds):
        (tmp_path / "cuda-rope3d.json").write_text('{"rows": [1]}')
        return {"failed": [], "skipped": "stopped after 5 s", "output": ""}

    monkeypatch.setattr(gpu, "run_command", stopped)
    ended = gpu.run_child("ops", gpu.steps()["ops"], torch.device("cuda"), tmp_path, 5.0)
    assert ended == {"failed": [], "skipped": "stopped after 5 s"}
    assert json.loads((tmp_path / "cuda-rope3d.json").read_text()) == {"rows": [1]}


def test_a_step_that_dies_says_how(tmp_path, monkeypatch):
    died = {"failed": ["exit status -11"], "output": "Segmentation fault"}
    monkeypatch.setattr(gpu, "run_command", lambda command, seconds: died)
    ended = gpu.run_child("ops", gpu.steps()["ops"], torch.device("cuda"), tmp_path, 5.0)
    assert ended == {"failed": ["exit status -11: Segmentation fault"]}


def test_failures_and_steps_that_no_longer_fit_are_named(tmp_path):
    def fails(job):
        raise ValueError("broken")

    steps = {"first": gpu.GpuStep(fails, 10.0), "second": gpu.GpuStep(lambda job: None, 10.0)}
    first, second = gpu.run_steps(steps, CPU, tmp_path, 0.1, gpu.run_step, least=0.0), None
    assert len(first) == 1
    assert "ValueError: broken" in first[0]
    (second,) = gpu.run_steps({"second": steps["second"]}, CPU, tmp_path, 0.1, gpu.run_step, least=60.0)
    assert second.startswith("second: left out, ")


def test_an_op_that_leaves_its_result_unwritten_is_noticed():
    def half(x):
        y = torch.empty_like(x) + 0 * x
        return torch.cat([2 * x[:4], y[4:]])

    kept = torch.zeros(8)
    case = SmallCase("half", half, lambda x: 2 * x, (kept,))
    assert not gpu_checks.error(case, torch.float32) < gpu_checks.TOLERANCE[torch.float32]
    whole = SmallCase("whole", lambda x: 2 * x, lambda x: 2 * x, (torch.rand(8),))
    assert gpu_checks.error(whole, torch.float32) < gpu_checks.TOLERANCE[torch.float32]
    assert not torch.are_deterministic_algorithms_enabled()


def case(**changes):
    given = {
        "ours": lambda x, out=None: torch.mul(x, 2, out=out),
        "baselines": {"eager": lambda x: x + x},
    } | changes
    return cases.Case("double", "tiny", 4, torch.float32, "forward", 32, lambda: (torch.ones(4),), **given)


def refuses(x):
    raise RuntimeError("no kernel for four numbers")


def test_a_baseline_that_refuses_is_left_out_with_its_reason():
    row = harness.run_case(case(optional={"sdpa-flash": refuses}), harness.Setting(CPU, quick=True))
    assert row["left_out"] == {"sdpa-flash": "RuntimeError: no kernel for four numbers"}
    assert row["baselines"].keys() == {"eager"}
    with pytest.raises(RuntimeError, match="no kernel for four numbers"):
        harness.run_case(case(baselines={"eager": refuses}), harness.Setting(CPU, quick=True))


def one_that_fails(shape, dtype, device):
    yield case(ours=refuses) if shape == "first" else case()


DOUBLE = cases.Benchmark({"quick": ["first", "second"]}, one_that_fails)


def test_a_case_that_fails_does_not_take_the_others_along():
    setting = harness.Setting(CPU, quick=True, dtypes=(torch.float32,), keep_going=True)
    seen = []
    result = harness.run("double", DOUBLE, setting, seen.append)
    assert len(result["rows"]) == len(seen) == 1
    assert result["failed"] == ["double tiny float32 forward: RuntimeError: no kernel for four numbers"]


def test_cases_behind_the_deadline_are_named():
    result = harness.run("double", DOUBLE, harness.Setting(CPU, quick=True, dtypes=(torch.float32,), deadline=0.0))
    assert result["rows"] == []
    assert result["failed"] == ["double tiny float32 forward: no time was left"] * 2


def test_small_inputs_rotate_through_several_caches(monkeypatch):
    class Properties:
        L2_cache_size = 100 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cuda = torch.device("cuda")
    assert harness.sets_of_inputs(50 << 20, cuda) == 8
    assert harness.sets_of_inputs(1 << 30, cuda) == 1
    assert harness.sets_of_inputs(1, cuda) == 64
    assert harness.sets_of_inputs(1, CPU) == 1
