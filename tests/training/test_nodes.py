# SPDX-License-Identifier: Apache-2.0
"""Two torchrun "nodes" on one machine: network namespaces joined by a cable that can be pulled out."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_signals import PATIENCE, TOY, environment, losses_of, wait_for_step

STEPS, EVERY = 24, 4
# What node.sh sets, and less patience.
SHARED = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}


class Nodes:
    """Two network namespaces with one address each, 10.77.0.1 and .2; the first also hosts the rendezvous."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"talkingdit-{os.getpid()}-{node}" for node in range(2)]
        self.cables = [f"td{os.getpid() % 100000}n{node}" for node in range(2)]
        self.agents: list[subprocess.Popen] = []
        self.logs: list[Path] = []
        ip("netns", "add", self.names[0])
        ip("netns", "add", self.names[1])
        ip(
            "link",
            "add",
            self.cables[0],
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            self.cables[1],
            "netns",
            self.names[1],
        )
        for node, (name, cable) in enumerate(zip(self.names, self.cables, strict=True)):
            ip("-n", name, "addr", "add", f"10.77.0.{node + 1}/24", "dev", cable)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", cable, "up")

    def start(self, node: int, *torchrun: object) -> subprocess.Popen:
        command = [
            *("ip", "netns", "exec", self.names[node], "torchrun", "--nnodes", 2, "--nproc-per-node", 1),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "run"),
            # Both nodes have the name of this machine, by which torchrun would tell who hosts and what an address is.
            *("--rdzv-conf", f"is_host={1 - node},keep_alive_interval=1", "--local-addr", f"10.77.0.{node + 1}"),
            *torchrun,
            *(TOY, self.folder, "--steps", STEPS, "--every", EVERY, "--seconds", 0.05, "--timeout", 4),
        ]
        self.logs.append(self.folder.with_name(f"log-{len(self.logs)}"))
        with self.logs[-1].open("w") as log:
            agent = subprocess.Popen(
                [str(word) for word in command],
                env={**environment(), **SHARED, "GLOO_SOCKET_IFNAME": self.cables[node]},
                stderr=log,
            )
        self.agents.append(agent)
        return agent

    def cable(self, state: str) -> None:
        ip("-n", self.names[1], "link", "set", self.cables[1], state)

    def kill(self, node: int) -> None:
        """Everything on it at once, as when a machine is switched off."""
        for line in ip("netns", "pids", self.names[node]).split():
            os.kill(int(line), signal.SIGKILL)

    def close(self) -> None:
        for node, name in enumerate(self.names):
            self.kill(node)
            ip("netns", "del", name)
        for agent, log in zip(self.agents, self.logs, strict=True):
            print(f"status {agent.wait()}\n{log.read_text()}")  # shown where the test fails


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def nodes(tmp_path) -> Iterator[Nodes]:
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    try:
        made = Nodes(tmp_path / "run")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    yield made
    made.close()


@pytest.mark.slow
def test_a_cut_cable_and_a_dead_node_cost_the_steps_since_the_last_checkpoint(nodes, processes, tmp_path):
    """Both restarts are torchrun's; only the dead node's agent is started anew, as a scheduler would."""
    first = nodes.start(0, "--max-restarts", 5)
    nodes.start(1, "--max-restarts", 5)
    wait_for_step(nodes.folder, EVERY + 1, first)
    nodes.cable("down")
    time.sleep(6)  # longer than the 4 s that a process waits for another
    nodes.cable("up")
    assert wait_for_restart(nodes.folder, first) % EVERY == 0
    wait_for_step(nodes.folder, 2 * EVERY + 1, first)
    nodes.kill(1)
    second = nodes.start(1, "--max-restarts", 5)
    assert (first.wait(PATIENCE), second.wait(PATIENCE)) == (0, 0)
    errors = nodes.logs[0].read_text()
    reports = [line for line in errors.splitlines() if line.startswith("training: ")]
    assert "lost another process (Timed out waiting 4000ms" in reports[0]
    assert any("lost another process (Connection" in report for report in reports[1:])
    assert "Traceback" not in errors
    losses = losses_of(nodes.folder)
    assert min(losses) % EVERY == 0
    assert max(losses) == STEPS - 1
    undisturbed = processes(1, undisturbed_run, tmp_path / "alone")[0]
    assert losses == pytest.approx({step: undisturbed[step] for step in losses}, rel=1e-5)


def undisturbed_run(folder: Path) -> dict:
    from toy_run import train

    return train(folder, STEPS)


def wait_for_restart(folder: Path, agent: subprocess.Popen) -> int:
    """The step at which the run continues, after it stood still."""
    before = (folder / "rank-0").stat().st_mtime
    deadline = time.monotonic() + PATIENCE
    while agent.poll() is None and time.monotonic() < deadline:
        if (folder / "rank-0").stat().st_mtime != before and (step := (folder / "rank-0").read_text()):
            return int(step)
        time.sleep(0.01)
    raise AssertionError(f"the run did not continue:\n{agent.communicate(timeout=5)[1]}")
