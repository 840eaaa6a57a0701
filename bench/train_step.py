# SPDX-License-Identifier: Apache-2.0
"""One training step of a Wan-S2V model against the official computation, eager: time, memory, tokens per second.

    python -m bench.train_step [--device cuda] [--shape 14b-704x1024] [--blocks N] [--out bench/results]

Both train the same float32 weights on the same clip: forward, mean squared error, backward and AdamW, with products and
attention in bfloat16 on CUDA (autocast for the official style, `training.parallel` for ours) and in float32 on the CPU.
The official style keeps all activations; ours is measured without and with activation checkpointing. Their losses and
gradient norms are compared first. As many blocks as leave room for the official step are tried where none are given.
`talkingdit plan --train --measured` reads the share of the card's speed from the file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import official_style, record
from bench.live_memory import LiveMemory
from bench.wan_block import SHAPES as STEP_SHAPES
from bench.wan_block import StepShape, build, inputs, model_inputs
from talkingdit import families
from talkingdit.families import preset
from talkingdit.plan.cards import CARDS
from talkingdit.plan.clip import ClipShape
from talkingdit.plan.run import TrainingRun
from talkingdit.plan.training import work
from talkingdit.plan.transformer import Transformer
from talkingdit.plan.units import unit_sizes
from training import parallel
from training.networks import Networks
from training.sections import ParallelConfig

_RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {
    "14b-704x1024": StepShape("14b-704x1024", 12, 88, 128, preset("wan_s2v_14b")),
    "14b-448x832": StepShape("14b-448x832", 12, 56, 104, preset("wan_s2v_14b")),
    "tiny": STEP_SHAPES["tiny"],
}
MODES = ("off", "selective", "full")
_RATE = 1e-5

Step = Callable[[], tuple[Tensor, Tensor]]  # makes one step; loss and norm of the gradients


def _step(forward: Callable[[], Tensor], target: Tensor, parameters: list[Any]) -> Step:
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, fused=True)

    def step() -> tuple[Tensor, Tensor]:
        loss = F.mse_loss(forward().float(), target)
        loss.backward()
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    return step


def official(shape: StepShape, blocks: int, device: torch.device) -> Step:
    """A step in the official style."""
    model = build(shape, blocks, device, torch.float32).requires_grad_(True)
    given = inputs(shape, device)
    weights = dict(model.named_parameters())
    config = dict(model.config)

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return official_style.forward(config, weights, **given)  # type: ignore[arg-type]

    return _step(forward, given["x"], list(weights.values()))


def ours(shape: StepShape, blocks: int, device: torch.device, mode: str) -> Step:
    """A step as the training loop does it, in a world of one process, which must have been started."""
    config = ParallelConfig(precision="bf16" if device.type == "cuda" else "fp32", activation_checkpointing=mode)  # type: ignore[arg-type]
    layout = parallel.start(config, device.type)
    networks = Networks(families.get("wan_s2v"), build(shape, blocks, device, torch.float32).requires_grad_(True))
    parallel.shard(networks, layout, config)
    given = inputs(shape, device)

    def forward() -> Tensor:
        velocity: Tensor = networks.transformer(given["x"], given["t"], model_inputs(given))
        return velocity

    return _step(forward, given["x"], list(networks.parameters()))


def measure(make: Callable[[], Step], device: torch.device, repeats: int) -> dict[str, float]:
    """Loss and gradient norm of the first step, median microseconds, and the most bytes alive beyond what stays."""
    step = make()
    loss, norm = (value.item() for value in step())  # makes the states of the optimiser
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - held
    else:
        held = 0
        with LiveMemory() as count:
            step()
        peak = count.peak
    samples = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - begin) * 1e6)
    return {"loss": loss, "norm": norm, "us": statistics.median(samples), "peak": peak, "held": held}


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def fitting(shape: StepShape, device: torch.device, repeats: int) -> tuple[int, dict[str, float]]:
    """The most blocks whose official step fits, at most all, and what it took."""
    blocks = 1 if device.type == "cpu" else min(8, shape.config["num_layers"])
    while True:
        try:
            return blocks, measure(partial(official, shape, blocks, device), device, repeats)
        except torch.OutOfMemoryError:
            if blocks == 1:
                raise
            blocks -= 1
        _forget(device)


def stated_tflops(device: torch.device) -> float | None:
    """Of the card by its name; None for an unknown one and for CPUs."""
    name = torch.cuda.get_device_name(device).lower().replace(" ", "") if device.type == "cuda" else ""
    return next((speed for card, (_, speed) in CARDS.items() if card.split("-")[0] in name), None)


def run(
    shape: StepShape,
    device: torch.device,
    blocks: int | None,
    repeats: int,
    modes: Sequence[str],
    progress: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure the official style and ours; ``progress`` is given the result after every mode.

    Raises:
        RuntimeError: their losses or gradients differ.
    """
    if blocks is None:
        blocks, theirs = fitting(shape, device, repeats)
    else:
        theirs = measure(partial(official, shape, blocks, device), device, repeats)
    fewer = {"num_layers": blocks}
    fewer["audio_inject_layers"] = [i for i in shape.config["audio_inject_layers"] if i < blocks]
    transformer = Transformer.of(families.get("wan_s2v"), shape.config | fewer)
    clip = ClipShape(8 * shape.height, 8 * shape.width, shape.frames, history=19, pose=True)
    total, tflops = transformer.tokens(clip)[1], stated_tflops(device)
    limit = 1e-4 if device.type == "cpu" else 3e-2
    result: dict[str, Any] = {**record.header("train_step", device, quick=shape.name == "tiny"), "steps": []}
    for mode in modes:
        _forget(device)
        taken = measure(partial(ours, shape, blocks, device, mode), device, repeats)
        parallel.stop()
        for what in ("loss", "norm"):
            if not abs(taken[what] - theirs[what]) <= limit * abs(theirs[what]):
                raise RuntimeError(
                    f"bench: {what} of both steps must agree within {limit}, "
                    f"got {taken[what]:.6g} and {theirs[what]:.6g}"
                )
        planned = TrainingRun(clip, checkpointing=mode)
        needed, executed = work(transformer, unit_sizes(transformer, planned), planned)
        row = {
            "shape": f"{shape.name}, checkpointing {mode}",
            "blocks": blocks,
            "tokens": total,
            "median_us": round(taken["us"]),
            "peak_bytes": round(taken["peak"]),
            "held_bytes": round(taken["held"]),
            "official_us": round(theirs["us"]),
            "official_peak_bytes": round(theirs["peak"]),
            "time_ratio": round(taken["us"] / theirs["us"], 3),
            "peak_ratio": round(taken["peak"] / theirs["peak"], 3),
            "tokens_per_second": round(total / taken["us"] * 1e6),
        }
        if tflops is not None:
            row["utilisation"] = round(needed / (taken["us"] * 1e-6 * tflops * 1e12), 3)
            result["constants"] = {"efficiency": round(executed / (taken["us"] * 1e-6 * tflops * 1e12), 3)}
        result["steps"].append(row)
        progress(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="14b-704x1024" if cuda else "tiny")
    parser.add_argument("--blocks", type=int, metavar="N", help="(default: as many as fit)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the JSON file (default: bench/results)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape, device = SHAPES[options.shape], torch.device(options.device)
    result = run(shape, device, options.blocks, options.repeats, MODES)
    for row in result["steps"]:
        print(json.dumps(row), file=sys.stderr)
    folder = options.out or (None if options.shape == "tiny" else _RESULTS)
    if folder is not None:
        path = folder / f"{options.device}-train_step.json"
        record.write(path, json.dumps(result, indent=1) + "\n")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
