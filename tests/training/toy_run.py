# SPDX-License-Identifier: Apache-2.0
"""A small sharded trainer for tests of checkpoints, signals and restarts; also a program for torchrun.

The samples of a step depend on its number alone. Stage 0 trains everything but `embed`, with SGD and AdamW; stage 1
begins at step STAGE_1 and trains everything with AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from talkingdit.distributed.restart import arguments_of_restart
from training.checkpoint import Checkpoints
from training.model_state import ModelState, OptimizerState
from training.signals import Stop, run_guarded

STAGE_1, SAMPLES, WIDTH = 7, 12, 6


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)
        self.register_buffer("scale", torch.full((3,), 0.5))
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


class Averages:
    """Sharded moving averages of the parameters."""

    def __init__(self, networks: nn.Module) -> None:
        self.networks, self.updates = networks, 0
        self.values = {name: p.detach().clone() for name, p in networks.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        for name, parameter in self.networks.named_parameters():
            self.values[name].lerp_(parameter.detach(), 0.2)

    def state_dict(self) -> dict:
        return {"values": self.values, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.values, self.updates = state["values"], state["updates"]


def build(stage: int, networks: nn.Module) -> list[torch.optim.Optimizer]:
    networks.embed.requires_grad_(stage == 1)
    trained = [p for p in networks.parameters() if p.requires_grad]
    if stage == 1:
        return [torch.optim.AdamW(trained, lr=0.01)]
    matrices = [block.weight for block in networks.blocks]
    rest = [p for p in trained if not any(p is m for m in matrices)]
    return [torch.optim.AdamW(rest, lr=0.01), torch.optim.SGD(matrices, lr=0.002, momentum=0.9)]


def shard(networks: nn.Module, replicate: int) -> None:
    world = dist.get_world_size()
    if replicate > 1:
        mesh = init_device_mesh("cpu", (replicate, world // replicate), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    for block in networks.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(networks, mesh=mesh)


def step_losses(networks: nn.Module, step: int) -> Tensor:
    """Sum of the losses of this rank's samples, over the number of all."""
    generator = torch.Generator().manual_seed(1000 + step)
    x, y = (torch.randn(SAMPLES, size, generator=generator) for size in (5, 2))
    rank, world = dist.get_rank(), dist.get_world_size()
    return (networks(x[rank::world]) - y[rank::world]).square().sum() / SAMPLES


def train(
    folder: Path,
    until: int,
    *,
    replicate: int = 1,
    asynchronous: bool = False,
    every: int = 3,
    before_step: Callable[[int], None] | None = None,
    stop: Stop | None = None,
) -> dict[int, float]:
    """Losses by step, from the newest checkpoint (or the start) to step `until`, where the last checkpoint is made."""
    networks = Toy()
    shard(networks, replicate)
    checkpoints = Checkpoints(folder, asynchronous=asynchronous)
    peeked = checkpoints.peek()
    stage, step = (0, 0) if peeked is None else (peeked["progress"]["stage"], 0)
    optimizers = build(stage, networks)
    averages = Averages(networks)
    data = {"next": 0, "order": [3, 1, 2]}

    def state() -> dict:
        return {
            "networks": ModelState(networks),
            "optimizers": OptimizerState(networks, optimizers),
            "averages": averages,
            "progress": {"stage": stage},
            "data": data,
        }

    loaded = state()
    if (resumed := checkpoints.load(loaded)) is not None:
        step, data = resumed, loaded["data"]
        assert data["next"] == step * SAMPLES
        assert averages.updates == step
    losses = {}
    while step < until and not (stop is not None and stop.agree()):
        if before_step is not None:
            before_step(step)
        if step == STAGE_1 and stage == 0:
            stage = 1
            optimizers = build(stage, networks)
        loss = step_losses(networks, step)
        (loss * dist.get_world_size()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        averages.update()
        whole = loss.detach()
        dist.all_reduce(whole)
        losses[step] = whole.item()
        step += 1
        data = {**data, "next": step * SAMPLES}
        if step % every == 0 or step == until:
            checkpoints.save(step, state())
    if stop is not None and stop.requested:
        checkpoints.save(step, state())
    checkpoints.close()
    average = averages.values["head.weight"]
    losses["average"] = float((average.full_tensor() if isinstance(average, DTensor) else average).sum())
    return losses


def command(*words: str) -> int:
    """This file as a program, in the process that calls it."""
    sys.argv[1:] = words
    return run_guarded(main)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.0, help="length of a step")
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--kill", type=int, nargs=2, metavar=("RANK", "STEP"), help="once")
    args = parser.parse_args()
    torch.set_num_threads(1)
    alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    patience = timedelta(seconds=120)  # some start late on a busy machine
    dist.init_process_group("gloo", timeout=patience, **(alone or arguments_of_restart(patience)))
    distributed_c10d._set_pg_timeout(timedelta(seconds=args.timeout))
    rank = dist.get_rank()

    def before_step(step: int) -> None:
        time.sleep(args.seconds)
        (args.folder / f"rank-{rank}").write_text(str(step))
        if args.kill == [rank, step] and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            os.kill(os.getpid(), 9)

    args.folder.mkdir(parents=True, exist_ok=True)
    with Stop(timeout=args.timeout) as stop:
        losses = train(args.folder, args.steps, every=args.every, before_step=before_step, stop=stop)
    if rank == 0:
        with (args.folder / "losses.jsonl").open("a") as file:
            file.write(json.dumps(losses) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(main))
