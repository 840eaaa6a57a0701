# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it goes on: losses by condition, throughput, utilisation, memory; to TensorBoard and W&B."""

from __future__ import annotations

import errno
import json
import math
import resource
import secrets
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from talkingdit.atomic import append_line, write_whole
from talkingdit.distributed.team import from_all_ranks
from talkingdit.errors import UserError
from talkingdit.plan.cards import CARDS
from talkingdit.plan.clip import ClipShape
from talkingdit.plan.transformer import Transformer
from training.batching import MicroBatch
from training.sections import LogConfig

GIB = 2**30


def peak_memory(device: torch.device) -> float:
    """Most bytes that this process held at once: of the GPU's allocator, or of the whole process on the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def stated_speed(device: torch.device) -> float | None:
    """Dense bfloat16 operations per second that the maker states for this GPU, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "").replace("-", "")
    found = [key for key in CARDS if key.split("-")[0] in name]
    return CARDS[found[0]][1] * 1e12 if found else None


def sum_over_ranks(values: dict[str, float], copies: int) -> dict[str, float]:
    """Sums over all ranks, on the host; `copies` ranks each hold the same."""
    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(values, (sums / copies).tolist(), strict=True))


def work_of(batch: MicroBatch, transformer: Transformer) -> dict[str, float]:
    """Tokens, frames and floating point operations of a micro-batch.

    Operations are those that the model needs, forward and backward, three times the forward's: what activation
    checkpointing does again does not count.
    """
    found = {"tokens": 0.0, "frames": 0.0, "flops": 0.0}
    for sample, weight in zip(batch.samples, batch.weights, strict=True):
        frames, height, width = sample.latents.shape[1:]
        history = 0 if sample.history is None else sample.history.shape[1]
        clip = ClipShape(height=8 * height, width=8 * width, latents=frames, history=history)
        found["tokens"] += weight * transformer.tokens(clip)[1]
        found["frames"] += weight * clip.frames
        found["flops"] += weight * 3 * transformer.flops(clip)
    return found


class Means:
    """Means over samples, micro-batches, steps and ranks; `add` does not wait for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, float]] = {}

    def add(self, parts: dict[str, tuple[Tensor, float]]) -> None:
        """Add (sum, count) pairs."""
        for name, (total, count) in parts.items():
            before, number = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before + total.detach().double(), number + count)

    def collect(self) -> dict[str, float]:
        """sum / count over all ranks of what was added since the last call; every rank must call it."""
        mine = {name: (float(total), count) for name, (total, count) in self._sums.items()}
        self._sums = {}
        sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for part in from_all_ranks(mine):
            for name, (total, count) in part.items():
                sums[name][0] += total
                sums[name][1] += count
        return {name: total / count for name, (total, count) in sorted(sums.items()) if count > 0}


class Writer:
    """Scalars and frames of a run, on rank 0: TensorBoard files, a line of JSON per report, and W&B if asked."""

    def __init__(self, folder: Path, step: int, config: LogConfig, run: dict[str, Any]) -> None:
        """Go on after `step` in a folder; `run` is the whole configuration."""
        self._file = folder / "log.jsonl"
        with _told(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._board = _start_board(folder, step) if config.tensorboard else None
            _keep_until(self._file, step)
        self._wandb = _start_wandb(folder, config.wandb, run) if config.wandb else None

    def scalars(self, values: dict[str, float], step: int) -> None:
        # JSON has no NaN and no infinity; a line with one would be unreadable for others.
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with _told(self._file.parent):
            append_line(self._file, json.dumps({"step": step, **line}, allow_nan=False))
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def frames(self, name: str, frames: Tensor, step: int) -> None:
        """Frames [n, 3, H, W] uint8."""
        if self._board is not None:
            with _told(self._file.parent):
                self._board.add_images(name, frames, step)

    def close(self) -> None:
        if self._board is not None:
            with _told(self._file.parent):
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """A full disk is told in one sentence; TensorBoard's thread raises at a later call."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"training: the log in {folder} cannot be written ({error.strerror or error}); the same command goes on "
            "from the last checkpoint."
        ) from error


def _keep_until(file: Path, step: int) -> None:
    """Lines up to `step` stay; those that a lost end of an earlier run wrote go."""
    if file.is_symlink():
        raise OSError(errno.ELOOP, f"{file.name} is a link", str(file))
    if file.exists():
        kept = [line for line in file.read_text(errors="replace").splitlines() if _step_of(line) <= step]
        write_whole(file, "".join(line + "\n" for line in kept).encode())


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")  # a line cut off by a kill, or none of ours


def _start_board(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _start_wandb(folder: Path, project: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "training: log.wandb needs wandb, which is not installed: pip install 'talkingdit[wandb]'."
        ) from error
    # One folder is one run, also after it was interrupted.
    file = folder / "wandb_id"
    if not file.exists():
        write_whole(file, secrets.token_hex(4).encode())
    return wandb.init(project=project, dir=str(folder), id=file.read_text(), resume="allow", config=config)


class Meter:
    """Throughput since the last report: tokens, frames and operations of all ranks by wall-clock seconds.

    Args:
        device: of this rank.
        world: ranks.
        speed: operations per second that one rank could do at most, for the utilisation; None leaves that out.
    """

    def __init__(self, device: torch.device, world: int, speed: float | None) -> None:
        self.device, self.world, self.speed = device, world, speed
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._started = time.perf_counter()

    def add(self, **amounts: float) -> None:
        """Amounts of the whole step, all ranks: tokens, frames, flops, steps, samples."""
        for name, amount in amounts.items():
            self._sums[name] += amount

    def pause(self) -> float:
        """What happens until `go_on` of the result is not training (validation)."""
        return time.perf_counter()

    def go_on(self, paused: float) -> None:
        self._started += time.perf_counter() - paused

    def report(self) -> dict[str, float]:
        """Rates since the last report, and the peak of memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds = max(now - self._started, 1e-9)
        found = {f"speed/{name}_per_second": self._sums[name] / seconds for name in ("tokens", "frames", "samples")}
        found["speed/seconds_per_step"] = seconds / max(1.0, self._sums["steps"])
        if self.speed is not None:
            found["speed/utilisation"] = self._sums["flops"] / seconds / (self.speed * self.world)
        found["memory/peak_gib"] = peak_memory(self.device) / GIB
        self._sums.clear()
        self._started = now
        return found
