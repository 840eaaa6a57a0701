# SPDX-License-Identifier: Apache-2.0
"""One Wan-S2V transformer block with its audio injection, as released, against the official computation, eager.

Time, peak memory, bytes that operators move, and where the time goes. Both are given the same weights and the same
residual stream in float32; on CUDA both compute in bfloat16, the official style under autocast, and take the same
attention backend. Tables of rotations, text and audio tokens are made before the clock starts for both; ours also keeps
keys and values of text and audio, as generation does. Ours is measured as the model runs it without gradients: it
overwrites the residual stream.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from bench import harness, official_style, record, wan_block
from bench.audio_baselines import BACKENDS
from bench.kernel_kinds import summary
from bench.traffic import Traffic
from talkingdit.families.wan_s2v.audio import Injection
from talkingdit.families.wan_s2v.blocks import BlockInputs
from talkingdit.families.wan_s2v.timesteps import clip_time
from talkingdit.models import WanS2VModel

SHAPES = {
    "cuda": [wan_block.SHAPES[name] for name in ("14b-448x832", "14b-704x1024")],
    "quick": [wan_block.SHAPES["tiny"]],
}
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def _attention(backend: str) -> AbstractContextManager[Any]:
    return nullcontext() if backend == "auto" else sdpa_kernel(BACKENDS[backend])


def _table(model: WanS2VModel, shape: wan_block.StepShape, grid: tuple[int, int, int], given: dict[str, Tensor]) -> Any:
    _, rows, columns = grid
    _, places = official_style.packed_history(model.config, dict(model.named_parameters()), [given["motion"][0]], 2)
    segments: list[Any] = [((0, 0, 0), grid, grid), ((30, 0, 0), (1, rows, columns), (1, rows, columns)), *places]
    c = shape.config
    return official_style.rope_table(c["dim"] // c["num_heads"], c["num_heads"], segments, given["x"].device)


def contestants(shape: wan_block.StepShape, device: torch.device, dtype: torch.dtype, backend: str) -> tuple[Any, int]:
    """Functions of the residual stream [1, N, dim] by name, and N."""
    model = wan_block.build(shape, 1, device, dtype)
    config, w, given = model.config, dict(model.named_parameters()), wan_block.inputs(shape, device)
    conditions = model.encode_conditions(wan_block.model_inputs(given))
    frames, rows, columns = conditions.grid
    per_frame, noisy = rows * columns, frames * rows * columns
    total = len(conditions.layout)
    block, injector = model.blocks[0], model.audio_injector
    assert conditions.text_kv is not None
    assert conditions.audio_kv is not None
    text, text_kv, shift_scale = conditions.text, conditions.text_kv[0], conditions.audio_modulation[0]
    injection = Injection(0, per_frame, dtype)
    narrow = given | {name: given[name].to(dtype) for name in ("motion", "pose")}
    with torch.no_grad():
        time = clip_time(model, given["t"], conditions.shard.clips[0])
        places = time.groups, conditions.layout
        block_inputs = BlockInputs(*places, conditions.text_mask, conditions.key_mask, inplace=True)
        table = _table(model, shape, conditions.grid, narrow)
        heard, vectors = official_style.audio_tokens(config, w, given["audio"], (73, 19))
        memories = {"ours": conditions.audio_kv[0]}
        memories["ours, value absorbed"] = injector.injector[0].memory(heard.to(dtype), "value")
    times = time.modulation.transpose(1, 2).contiguous()

    @torch.no_grad()
    def official(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16), _attention(backend):
            x = official_style.block(
                w, "blocks.0", x, times, noisy, table, text, config["num_heads"], config.get("eps", 1e-6)
            )
            return official_style.hear(config, w, 0, x, noisy, heard, vectors)

    def ours(memory: Any) -> Callable[[Tensor], Tensor]:
        @torch.no_grad()
        def run(x: Tensor) -> Tensor:
            with _attention(backend):
                x = block(x, time.modulation, text, block_inputs, text_kv)
                noise = x[:, :noisy]
                noise += injector(noise, injection, conditions.audio, shift_scale, memory)
                return x

        return run

    return {"official": official, **{name: ours(memory) for name, memory in memories.items()}}, total


def _agree(functions: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, limit: float) -> None:
    truth = functions["official"](x.clone()) - x
    for name, function in functions.items():
        difference = float(((function(x.clone()) - x) - truth).norm() / truth.norm())
        if not difference < limit:
            raise RuntimeError(f"bench: {name} must agree with the official block within {limit}, got {difference:.2g}")


def measure(shape: wan_block.StepShape, setting: harness.Setting, backend: str) -> dict[str, Any]:
    """One entry of ``steps``."""
    device = setting.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    functions, tokens = contestants(shape, device, dtype, backend)
    generator = torch.Generator(device).manual_seed(2)
    x = torch.randn(1, tokens, shape.config["dim"], device=device, generator=generator)
    _agree(functions, x, _LIMITS[dtype])

    def calls_of(function: Callable[[Tensor], Tensor]) -> harness.Call:
        own = x.clone()  # overwritten again and again: it grows by what a block adds, which changes no step's work
        return lambda: function(own)

    calls = {name: calls_of(function) for name, function in functions.items()}
    stream = torch.empty_like(x)
    copied = {"copy": [lambda: stream.copy_(x)]}
    samples = harness.measure({name: [call] for name, call in calls.items()} | copied, setting)
    entry: dict[str, Any] = {
        "shape": shape.name,
        "tokens": tokens,
        "blocks": 1,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": backend,
        "copy_gbps": round(2 * x.nbytes / statistics.median(samples["copy"]) / 1e3, 1),
    }
    for name, call in calls.items():
        taken = sorted(samples[name])
        with Traffic() as traffic:
            call()
        entry[name] = {
            "median_us": round(statistics.median(taken), 1),
            "p20_us": round(harness.quantile(taken, 0.2), 1),
            "p80_us": round(harness.quantile(taken, 0.8), 1),
            "peak_bytes": wan_block.peak_bytes(call, device),
            "moved_bytes": traffic.moved,
            **summary(call, device),
        }
    return entry | _ratios(entry["ours"], entry["official"])


def _ratios(ours: Mapping[str, Any], official: Mapping[str, Any]) -> dict[str, Any]:
    flat = {f"official_{key}": official[key] for key in ("peak_bytes", "moved_bytes")}
    flat |= {key: ours[key] for key in ("median_us", "peak_bytes", "moved_bytes")}
    return flat | {
        "official_us": official["median_us"],
        "time_ratio": round(ours["median_us"] / official["median_us"], 3),
        "peak_ratio": round(ours["peak_bytes"] / official["peak_bytes"], 3),
        "moved_ratio": round(ours["moved_bytes"] / official["moved_bytes"], 3),
    }


def run(setting: harness.Setting, progress: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """All shapes, with the attention that torch chooses; ``progress`` is given the result after every one."""
    cuda = setting.device.type == "cuda"
    result: dict[str, Any] = {**record.header("block", setting.device, setting.quick), "steps": []}
    problems = []
    if not setting.quick:
        setting = replace(setting, seconds=max(2.0, setting.seconds))
    for shape in SHAPES["cuda" if cuda and not setting.quick else "quick"]:
        if time.monotonic() > setting.deadline:
            problems.append(f"block {shape.name}: no time was left")
            continue
        try:
            result["steps"].append(measure(shape, setting, "auto"))
        except Exception as problem:
            if not setting.keep_going:
                raise
            problems.append(f"block {shape.name}: {type(problem).__name__}: {problem}"[:500])
        if progress is not None:
            progress(result)
    if problems:
        result["failed"] = problems
    return result
