# SPDX-License-Identifier: Apache-2.0
"""One denoising step of a Wan-S2V model with random weights against the official computation, eager: time and memory.

    python -m bench.wan_block [--device cuda] [--shape 14b-448x832] [--blocks N] [--out bench/results]

Ours is measured as generation runs it, with conditions made beforehand, and with its blocks compiled where asked for.
The official style makes its table of rotations and all conditions in every step, as the official program does. On CUDA
both compute in bfloat16, the official style under autocast from bfloat16 weights; on the CPU in float32. Both are given
the same weights, and their results are compared before they are timed. The largest number of blocks that fits is tried
where none is given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import official_style, record
from bench.live_memory import LiveMemory
from talkingdit.models import WanInputs, WanS2VModel, preset

_RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class StepShape:
    """A step: latents [1, 16, frames, height, width], a reference and 19 latents of history."""

    name: str
    frames: int
    height: int
    width: int
    config: dict[str, Any]


_1B = dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=2, audio_inject_layers=(0,))
_TINY = dict(dim=64, ffn_dim=96, num_heads=2, num_layers=2, audio_inject_layers=(0,), text_dim=24, text_len=8)
SHAPES = {
    shape.name: shape
    for shape in (
        StepShape("14b-448x832", 20, 56, 104, preset("wan_s2v_14b")),
        StepShape("14b-704x1024", 20, 88, 128, preset("wan_s2v_14b")),
        StepShape("1.3b-2-blocks-256x256", 4, 32, 32, preset("wan_s2v_14b", **_1B)),
        StepShape("tiny", 2, 8, 8, preset("wan_s2v_14b", **(_TINY | dict(audio_dim=16)))),
    )
}


def build(shape: StepShape, blocks: int, device: torch.device, dtype: torch.dtype) -> WanS2VModel:
    """A model with random weights that is made on the device in its dtype, without a wide copy."""
    layers = [i for i in shape.config["audio_inject_layers"] if i < blocks]
    with torch.device("meta"):
        model = WanS2VModel(**(shape.config | dict(num_layers=blocks, audio_inject_layers=layers)))
    generator = torch.Generator(device).manual_seed(0)
    kept: Any = WanS2VModel._keep_in_fp32_modules
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            wide = any(word in f"{path}.{name}" for word in kept)
            value = torch.empty(parameter.shape, device=device, dtype=torch.float32 if wide else dtype)
            if name == "weight" and value.dim() == 1:
                value.fill_(1.0)
            else:
                value.normal_(0.0, 0.02, generator=generator)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    torch.nn.init.constant_(model.casual_audio_encoder.weights, 1.0)
    return model.eval()


def inputs(shape: StepShape, device: torch.device) -> dict[str, Tensor]:
    c, size = shape.config, (shape.height, shape.width)
    generator = torch.Generator(device).manual_seed(1)

    def draw(*dims: int) -> Tensor:
        return torch.randn(1, *dims, device=device, generator=generator)

    return dict(
        x=draw(c["in_dim"], shape.frames, *size),
        t=torch.full((1,), 500.0, device=device),
        context=draw(c["text_len"], c["text_dim"]),
        ref=draw(c["in_dim"], 1, *size),
        motion=draw(c["in_dim"], 19, *size),
        pose=draw(c["cond_dim"], shape.frames, *size),
        audio=draw(c["audio_layers"], c["audio_dim"], 4 * shape.frames),
    )


def model_inputs(given: dict[str, Tensor]) -> WanInputs:
    """The same as our model takes them."""
    return WanInputs(
        given["context"], reference=given["ref"], history=given["motion"], pose=given["pose"], audio=given["audio"]
    )


def contestants(model: WanS2VModel, given: dict[str, Tensor], compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Calls of one step by name. The conditions of ours are made here."""
    weights = dict(model.named_parameters())
    dtype = model.patch_embedding.weight.dtype
    device = given["x"].device
    conditions = model.encode_conditions(model_inputs(given))
    narrow = {k: v if k in ("t", "audio") else v.to(dtype) for k, v in given.items()}

    @torch.no_grad()
    def ours() -> Tensor:
        return model(given["x"], given["t"], conditions=conditions)

    @torch.no_grad()
    def official() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            return official_style.forward(model.config, weights, **narrow)  # type: ignore[arg-type]

    calls = {"official": official, "ours": ours}
    difference = ((ours() - official()).norm() / official().norm()).item()
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    if not difference < limit:
        raise RuntimeError(
            f"bench: both steps must agree within {limit}, got a relative difference of {difference:.2g}"
        )
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)
        ours()
        calls["ours"] = ours
    return calls


def peak_bytes(call: Callable[[], Tensor], device: torch.device) -> int:
    """The most bytes alive during a call beyond those before. Called once before, to warm up."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveMemory() as count:
        call()
    return count.peak


def measure(call: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[float, int]:
    """Median microseconds, and `peak_bytes`."""
    peak = peak_bytes(call, device)
    samples = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(samples), peak


def fitting(shape: StepShape, device: torch.device) -> int:
    """Blocks that leave half of the card to the official step's buffers, at most all."""
    blocks = shape.config["num_layers"]
    if device.type == "cpu":
        return blocks
    dim, ffn = shape.config["dim"], shape.config["ffn_dim"]
    per_block = 2 * (8 * dim * dim + 2 * dim * ffn)
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(blocks, int((0.5 * free - 6e9) / per_block)))


def run(shape: StepShape, device: torch.device, blocks: int | None, repeats: int, compiled: bool) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    blocks = fitting(shape, device) if blocks is None else min(blocks, shape.config["num_layers"])
    model = build(shape, blocks, device, dtype)
    calls = contestants(model, inputs(shape, device), compiled)
    taken = {name: measure(call, device, repeats) for name, call in calls.items()}
    (us, peak), (their_us, their_peak) = taken["ours"], taken["official"]
    return {
        **record.header("wan_block", device, quick=shape.name == "tiny"),
        "compiled": compiled,
        "steps": [
            {
                "shape": shape.name,
                "blocks": blocks,
                "dtype": str(dtype).removeprefix("torch."),
                "weight_bytes": sum(p.nbytes for p in model.parameters()),
                "median_us": round(us),
                "peak_bytes": peak,
                "official_us": round(their_us),
                "official_peak_bytes": their_peak,
                "time_ratio": round(us / their_us, 3),
                "peak_ratio": round(peak / their_peak, 3),
            }
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.wan_block", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="14b-448x832" if cuda else "1.3b-2-blocks-256x256")
    parser.add_argument("--blocks", type=int, metavar="N", help="fewer blocks than the model has")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the JSON file (default: bench/results)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape, device = SHAPES[options.shape], torch.device(options.device)
    result = run(shape, device, options.blocks, options.repeats, options.compile)
    print(json.dumps(result["steps"][0]), file=sys.stderr)
    folder = options.out or (None if options.shape == "tiny" else _RESULTS)
    if folder is not None:
        path = folder / f"{options.device}-wan_block-{options.shape}.json"
        record.write(path, json.dumps(result, indent=1) + "\n")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
