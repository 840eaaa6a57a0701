# SPDX-License-Identifier: Apache-2.0
"""How a run ends: it saves when it is asked to, together, and says in one sentence when another process is gone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
import toy_run

from talkingdit.errors import UserError
from training import signals
from training.signals import Stop, lost_peer, run_guarded

TOY = Path(__file__).parent / "toy_run.py"
ROOT = Path(__file__).parents[2]
PATIENCE = 180  # seconds; starting Python with torch takes long on a busy machine


def environment() -> dict:
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        **os.environ,
        "PATH": paths,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TOY.parent)]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def launch(*command: object) -> subprocess.Popen:
    return subprocess.Popen([str(word) for word in command], env=environment(), stderr=subprocess.PIPE, text=True)


def step_of(folder: Path) -> int:
    file = folder / "rank-0"
    return int(file.read_text() or -1) if file.exists() else -1


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if step_of(folder) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached:\n{process.communicate(timeout=5)[1]}")


def losses_of(folder: Path) -> dict[int, float]:
    """Of all parts of a run, later parts before earlier ones."""
    parts = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return {int(step): loss for part in parts for step, loss in part.items() if step != "average"}


@pytest.mark.parametrize("number", Stop.SIGNALS)
def test_a_signal_asks_to_stop_and_the_handler_goes_with_the_block(number, capsys):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.agree()
        os.kill(os.getpid(), number)
        assert not stop.requested
        assert stop.agree()
        assert stop.agree()
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err == f"training: {number.name}: saves and ends\n"


def test_another_reason_stops_without_a_message(capsys):
    with Stop() as stop:
        assert stop.agree(also=True)
    assert capsys.readouterr().err == ""


def test_a_second_interrupt_soon_is_torchruns_and_later_a_persons(monkeypatch):
    clock = iter([100.0, 100.5, 106.0])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agree()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def steps_until_stop(receiver: int) -> int:
    with Stop() as stop:
        for step in range(10):
            if stop.agree():
                return step
            if step == 3 and dist.get_rank() == receiver:
                os.kill(os.getpid(), signal.SIGUSR1)
    return -1


def test_all_processes_stop_at_the_step_after_one_was_asked(processes):
    assert processes(3, steps_until_stop, 1) == [4, 4, 4]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:4222"
            ),
            "Connection closed by peer [10.0.0.2]:4222",
        ),
        (
            RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"),
            "Timed out waiting 5000ms for recv operation",
        ),
        (
            dist.DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp:2005, remote process exited or there was a network error\n"
                "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting."
            ),
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting",
        ),
        (dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0"), "timeout after 300000ms"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), None),
        (RuntimeError("DataLoader timed out after 60 seconds"), None),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), None),
        (OSError(104, "Connection reset by peer"), None),
    ],
)
def test_only_what_the_backends_say_of_others_counts_as_a_lost_process(error, reason):
    found = lost_peer(error)
    assert (found is None) if reason is None else (found is not None and found.startswith(reason))


def test_errors_become_a_status_and_a_sentence(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def raising(error):
        def main():
            raise error

        return main

    assert run_guarded(lambda: None) == 0
    assert run_guarded(lambda: 7) == 7
    assert capsys.readouterr().err == ""
    assert run_guarded(raising(UserError("data.path: must exist, got 'x'."))) == 2
    assert capsys.readouterr().err == "training: data.path: must exist, got 'x'.\n"
    assert run_guarded(raising(KeyboardInterrupt())) == 130
    assert "the same command continues from the last checkpoint" in capsys.readouterr().err
    assert run_guarded(raising(RuntimeError("a bug"))) == 1
    assert capsys.readouterr().err.startswith("Traceback")
    assert run_guarded(raising(RuntimeError("gloo: Connection closed by peer [10.0.0.2]:1"))) == 3
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "lost another process (Connection closed by peer [10.0.0.2]:1) and ends" in message


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torchrun's, whose output pytest has taken
@pytest.mark.parametrize(("local_rank", "waits"), [("0", False), ("1", True)])
def test_a_mistake_that_every_process_sees_is_told_by_the_first_of_a_machine(capsys, monkeypatch, local_rank, waits):
    """The others give torchrun the time to end them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    said_before_waiting = []
    monkeypatch.setattr(signals.time, "sleep", lambda seconds: said_before_waiting.append(capsys.readouterr().err))
    monkeypatch.setattr(signals.os, "_exit", sys.exit)
    handler = signal.getsignal(signal.SIGTERM)

    def main():
        raise UserError("data.path: must exist, got 'x'.")

    with pytest.raises(SystemExit) as status:
        run_guarded(main)
    signal.signal(signal.SIGTERM, handler)
    assert status.value.code == 2
    assert said_before_waiting == ([""] if waits else [])
    assert capsys.readouterr().err == "training: data.path: must exist, got 'x'.\n"


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_0(tmp_path):
    said = tmp_path.with_name("said")
    options = [str(tmp_path), "--steps", "400", "--every", "1000", "--seconds", "0.05"]
    process = forked.start(toy_run.command, *options, said=said)
    deadline = time.monotonic() + PATIENCE
    while process.is_alive() and time.monotonic() < deadline and not step_of(tmp_path) >= 4:
        time.sleep(0.05)
    process.terminate()
    process.join(PATIENCE)
    errors = said.read_text()
    assert process.exitcode == 0, errors
    assert "training: SIGTERM: saves and ends" in errors
    stopped = max(losses_of(tmp_path)) + 1
    assert stopped < 400
    assert [path.name for path in tmp_path.glob("step-*")] == [f"step-{stopped:08d}"]


@pytest.mark.slow
def test_the_node_script_turns_sigterm_into_a_checkpoint_and_status_0(tmp_path):
    process = launch(
        *(ROOT / "training" / "launch" / "node.sh", "--standalone", "--nproc-per-node", 2),
        *(TOY, tmp_path, "--steps", 400, "--every", 1000, "--seconds", 0.05),
    )
    wait_for_step(tmp_path, 2, process)
    process.terminate()
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, errors
    assert errors.count("training: SIGUSR1: saves and ends") == 1
    stopped = max(losses_of(tmp_path)) + 1
    assert [path.name for path in tmp_path.glob("step-*")] == [f"step-{stopped:08d}"]


STAND_INS = {  # Slurm and torchrun, as far as the script sees them
    "scontrol": """[ "$1" = show ] && printf 'node-01\\nnode-02\\n' || echo "$@" >> requeued""",
    "scancel": """echo "$@" >> cancelled; kill -USR1 $(cat step)""",
    "srun": """shift; echo $$ > step; exec "$@" """,
    "torchrun": """echo "$@" > arguments
python3 -c "import signal, time; signal.signal(signal.SIGUSR1, lambda *_: exit(0)); time.sleep(60); exit(1)"
exit $? """,
}


@pytest.mark.parametrize(("ends", "requeued"), [("warned", True), ("done", False), ("failed", False)])
def test_the_slurm_script_saves_before_the_time_is_up_and_goes_back_into_the_queue(tmp_path, ends, requeued):
    shutil.copytree(ROOT / "training" / "launch", tmp_path / "training" / "launch")
    stand_ins = dict(STAND_INS)
    if ends != "warned":
        stand_ins["torchrun"] = f"exit {int(ends == 'failed')}"
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "70001",
        "SLURM_JOB_NODELIST": "node-[01-02]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_PER_NODE": "h100:4",
    }
    paths = os.pathsep.join([str(tmp_path), environment()["PATH"]])
    script = tmp_path / "training" / "launch" / "slurm.sbatch"
    process = subprocess.Popen(
        ["bash", script, "--config", "run.toml"], cwd=tmp_path, env={**os.environ, **slurm, "PATH": paths}
    )
    if ends == "warned":
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "arguments").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == int(ends == "failed")
    assert (tmp_path / "requeued").exists() == requeued
    if ends == "warned":
        assert (tmp_path / "requeued").read_text() == "requeue 70001\n"
        assert (tmp_path / "cancelled").read_text() == "--signal=USR1 70001\n"
        words = (tmp_path / "arguments").read_text().split()
        assert words[words.index("--nnodes") + 1] == "2"
        assert words[words.index("--nproc-per-node") + 1] == "4"
        assert words[words.index("--rdzv-endpoint") + 1] == "node-01:30001"
        assert words[-4:] == ["-m", "training.train", "--config", "run.toml"]


@pytest.mark.slow
def test_a_killed_process_is_reported_by_the_others_and_torchrun_continues_from_the_last_checkpoint(tmp_path):
    process = launch(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1),
        *(TOY, tmp_path, "--steps", 12, "--every", 4, "--kill", 1, 6),
    )
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, errors
    reports = [line for line in errors.splitlines() if line.startswith("training: ")]
    assert len(reports) == 1
    assert reports[0].startswith("training: rank 0 on ")
    assert "Traceback" not in errors
    assert sorted(losses_of(tmp_path)) == list(range(4, 12))  # the part that ended normally, from the checkpoint on
