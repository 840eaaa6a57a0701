# SPDX-License-Identifier: Apache-2.0
"""One Wan-S2V transformer block with its audio injection, as released, against the official computation, eager.

Time, peak memory, bytes that operators move, and where the time goes. Both are given the same weights and the same
residual stream; on CUDA both compute in bfloat16, the official style under autocast. Tables of rotations, text and
audio tokens are made before the clock starts for both; ours also keeps keys and values of text and audio, as generation
does. Ours is measured as the model runs it without gradients: it overwrites the residual stream.

The official style has the attention that torch chooses, and a stream in float32. Ours runs in several ways
(`VARIANTS`): "ours" as models do unless they are told otherwise; with linear layers in float8, as `--precision fp8`
has them; with each attention kernel that may be named; with both; with the stream in the type of the layers; with GELU
in the epilogue of the product in front of it. Each is told with its error, which is that of what the block adds to the
stream, relative to what the official one adds. What a machine refuses is left out with its reason.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import harness, official_style, record, wan_block
from bench.kernel_kinds import summary
from bench.traffic import Traffic
from talkingdit.families.wan_s2v.audio import Injection
from talkingdit.families.wan_s2v.blocks import BlockInputs
from talkingdit.families.wan_s2v.timesteps import clip_time
from talkingdit.families.wan_s2v.units import UNITS
from talkingdit.models import WanS2VModel
from talkingdit.nn import attention_backends
from talkingdit.nn.eight_bit import quantise

SHAPES = {
    "cuda": [wan_block.SHAPES[name] for name in ("14b-448x832", "14b-704x1024")],
    "quick": [wan_block.SHAPES["tiny"]],
}
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_COARSE = 0.2  # error of what rounds to eight bits, or keeps the stream in 16: beyond it something is wrong
_SECONDS = 1.0  # for each contestant and shape


@dataclass(frozen=True)
class BlockVariant:
    """How ours computes.

    Attributes:
        fp8: its linear layers multiply float8.
        attention: of `talkingdit.nn.attention.attention`.
        residual: "float32", or "compute" for a stream in the type of the layers.
        absorb: of `AudioCrossAttention.memory`.
        gelu: kernel of `talkingdit.ops.linear_gelu`.
    """

    fp8: bool = False
    attention: str = "auto"
    residual: str = "float32"
    absorb: str = "none"
    gelu: str = "auto"

    @property
    def optional(self) -> bool:
        """May it be left out: by a machine that refuses it, or because its error is too large?"""
        return self.fp8 or self.attention != "auto" or self.residual != "float32" or self.gelu != "auto"

    def limit(self, dtype: torch.dtype) -> float:
        """Of its error, with layers of a dtype."""
        coarse = self.fp8 or self.residual == "compute" or self.attention in ("flash3_fp8", "sage")
        return _COARSE if coarse else _LIMITS[dtype]

    def __str__(self) -> str:
        parts = {
            "fp8": self.fp8,
            "value absorbed": self.absorb == "value",
            "16-bit stream": self.residual == "compute",
            "GELU in the product": self.gelu == "epilogue",
            f"{self.attention} attention": self.attention != "auto",
        }
        return ", ".join(["ours", *(name for name, said in parts.items() if said)])


_ABSORBED = BlockVariant(absorb="value")
_LEAST = replace(_ABSORBED, fp8=True, residual="compute")
_IN_PRODUCT = BlockVariant(gelu="epilogue")
_SIXTEEN = replace(_IN_PRODUCT, residual="compute")
_NAMED = ("cudnn", "flash3", "flash3_fp8", "sage")
VARIANTS = (
    BlockVariant(),
    _ABSORBED,
    BlockVariant(fp8=True),
    *(BlockVariant(fp8, attention) for attention in _NAMED for fp8 in (False, True)),
    BlockVariant(residual="compute"),
    _LEAST,
    _IN_PRODUCT,
    replace(_SIXTEEN, absorb="value"),
)
# Those that differ in what they move; attention reads and writes the same.
MOVING = (
    BlockVariant(),
    _ABSORBED,
    BlockVariant(residual="compute"),
    replace(_ABSORBED, residual="compute"),
    _IN_PRODUCT,
    _SIXTEEN,
    replace(_SIXTEEN, absorb="value"),
    BlockVariant(fp8=True),
    BlockVariant(fp8=True, residual="compute"),
    _LEAST,
)


class Contestant(NamedTuple):
    """A block as a function of the residual stream [1, N, dim], which it may overwrite, and the stream's dtype."""

    run: Callable[[Tensor], Tensor]
    dtype: torch.dtype


def _table(model: WanS2VModel, shape: wan_block.StepShape, grid: tuple[int, int, int], given: dict[str, Tensor]) -> Any:
    _, rows, columns = grid
    _, places = official_style.packed_history(model.config, dict(model.named_parameters()), [given["motion"][0]], 2)
    segments: list[Any] = [((0, 0, 0), grid, grid), ((30, 0, 0), (1, rows, columns), (1, rows, columns)), *places]
    c = shape.config
    return official_style.rope_table(c["dim"] // c["num_heads"], c["num_heads"], segments, given["x"].device)


class _Ours:
    """Our block with its conditions, its linear layers in float8 where that is asked for."""

    def __init__(self, shape: wan_block.StepShape, device: torch.device, dtype: torch.dtype, fp8: bool) -> None:
        self.model = wan_block.build(shape, 1, device, dtype)  # the same weights every time
        if fp8:
            quantise(self.model, UNITS, "fp8")
        self.given, self.dtype = wan_block.inputs(shape, device), dtype
        self.conditions = self.model.encode_conditions(wan_block.model_inputs(self.given))
        frames, rows, columns = self.conditions.grid
        self.per_frame, self.noisy = rows * columns, frames * rows * columns
        with torch.no_grad():
            self.time = clip_time(self.model, self.given["t"], self.conditions.shard.clips[0])

    def contestant(self, variant: BlockVariant, heard: Tensor) -> Contestant:
        """`heard`: audio tokens, of which absorbed values are made."""
        block, injector, conditions = self.model.blocks[0], self.model.audio_injector, self.conditions
        assert conditions.text_kv is not None
        assert conditions.audio_kv is not None
        text, text_kv, shift_scale = conditions.text, conditions.text_kv[0], conditions.audio_modulation[0]
        inputs = BlockInputs(
            *(self.time.groups, conditions.layout, conditions.text_mask, conditions.key_mask, variant.attention),
            inplace=True,
            gelu=variant.gelu,
        )
        injection = Injection(0, self.per_frame, self.dtype, variant.absorb, inplace=True)
        memory = conditions.audio_kv[0]
        if variant.absorb != "none":
            with torch.no_grad():
                memory = injector.injector[0].memory(heard.to(self.dtype), variant.absorb)

        @torch.no_grad()
        def run(x: Tensor) -> Tensor:
            x = block(x, self.time.modulation, text, inputs, text_kv)
            injector(x[:, : self.noisy], injection, conditions.audio, shift_scale, memory)
            return x

        return Contestant(run, torch.float32 if variant.residual == "float32" else self.dtype)


def _official(shape: wan_block.StepShape, ours: _Ours, heard: Tensor, vectors: Tensor) -> Contestant:
    model, noisy, dtype = ours.model, ours.noisy, ours.dtype
    config, w, device = model.config, dict(model.named_parameters()), ours.given["x"].device
    narrow = ours.given | {name: ours.given[name].to(dtype) for name in ("motion", "pose")}
    with torch.no_grad():
        table = _table(model, shape, ours.conditions.grid, narrow)
    times, text = ours.time.modulation.transpose(1, 2).contiguous(), ours.conditions.text

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            x = official_style.block(
                w, "blocks.0", x, times, noisy, table, text, config["num_heads"], config.get("eps", 1e-6)
            )
            return official_style.hear(config, w, 0, x, noisy, heard, vectors)

    return Contestant(run, torch.float32)


def contestants(
    shape: wan_block.StepShape,
    device: torch.device,
    dtype: torch.dtype,
    variants: Iterable[BlockVariant] = VARIANTS,
    left_out: dict[str, str] | None = None,
) -> tuple[dict[str, Contestant], int]:
    """ "official" and variants of ours by name, and N.

    Why an optional one cannot be made is written to `left_out`, if that is given.
    """
    plain = _Ours(shape, device, dtype, fp8=False)
    w = dict(plain.model.named_parameters())
    with torch.no_grad():
        heard, vectors = official_style.audio_tokens(plain.model.config, w, plain.given["audio"], (73, 19))
    found = {"official": _official(shape, plain, heard, vectors)}
    made = {False: plain}
    for variant in variants:
        try:
            attention_backends.check(variant.attention, device)
            if variant.fp8 not in made:
                made[variant.fp8] = _Ours(shape, device, dtype, variant.fp8)
            found[str(variant)] = made[variant.fp8].contestant(variant, heard)
        except Exception as problem:
            if left_out is None or not variant.optional:
                raise
            left_out[str(variant)] = _reason(problem)
    return found, len(plain.conditions.layout)


def _reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"[:300]


def _errors(
    functions: dict[str, Contestant],
    x: Tensor,
    dtype: torch.dtype,
    variants: Iterable[BlockVariant],
    left_out: dict[str, str],
) -> dict[str, float]:
    """Relative errors by name. What fails or is too far off leaves the functions; one that must not raises."""
    wide = x.float()
    truth = functions["official"].run(x.clone()) - wide
    errors = {}
    for variant in variants:
        if (name := str(variant)) not in functions:
            continue
        run, stream = functions[name]
        try:
            added = run(x.to(stream, copy=True)).float() - wide
            error, limit = float((added - truth).norm() / truth.norm()), variant.limit(dtype)
            if not error < limit:
                raise RuntimeError(f"bench: {name} must agree with the official block within {limit}, got {error:.2g}")
            errors[name] = float(f"{error:.3g}")
        except Exception as problem:
            if not variant.optional:
                raise
            left_out[name] = _reason(problem)
            del functions[name]
    return errors


def measure(
    shape: wan_block.StepShape, setting: harness.Setting, variants: Iterable[BlockVariant] = VARIANTS
) -> dict[str, Any]:
    """One entry of ``steps``."""
    device, variants = setting.device, tuple(variants)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left_out: dict[str, str] = {}
    functions, tokens = contestants(shape, device, dtype, variants, left_out)
    generator = torch.Generator(device).manual_seed(2)
    x = torch.randn(1, tokens, shape.config["dim"], device=device, generator=generator)
    errors = _errors(functions, x, dtype, variants, left_out)

    def calls_of(function: Contestant) -> harness.Call:
        # Overwritten again and again: it grows by what a block adds, which changes no step's work.
        own = x.to(function.dtype, copy=True)
        return lambda: function.run(own)

    calls = {name: calls_of(function) for name, function in functions.items()}
    stream = torch.empty_like(x)
    copied = {"copy": [lambda: stream.copy_(x)]}
    samples = harness.measure({name: [call] for name, call in calls.items()} | copied, setting)
    entry: dict[str, Any] = {
        "shape": shape.name,
        "tokens": tokens,
        "blocks": 1,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention_backends.report()["attention"],
        "copy_gbps": round(2 * x.nbytes / statistics.median(samples["copy"]) / 1e3, 1),
    }
    if left_out:
        entry["left_out"] = left_out
    official_us = statistics.median(samples["official"])
    for name, call in calls.items():
        taken = sorted(samples[name])
        with Traffic() as traffic:
            call()
        entry[name] = {
            "median_us": round(statistics.median(taken), 1),
            "p20_us": round(harness.quantile(taken, 0.2), 1),
            "p80_us": round(harness.quantile(taken, 0.8), 1),
            "time_ratio": round(statistics.median(taken) / official_us, 3),
            **({"error": errors[name]} if name in errors else {}),
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
    """All shapes; ``progress`` is given the result after every one."""
    cuda = setting.device.type == "cuda"
    result: dict[str, Any] = {**record.header("block", setting.device, setting.quick), "steps": []}
    problems = []
    if not setting.quick:
        setting = replace(setting, seconds=max(_SECONDS, setting.seconds))
    for shape in SHAPES["cuda" if cuda and not setting.quick else "quick"]:
        if time.monotonic() > setting.deadline:
            problems.append(f"block {shape.name}: no time was left")
            continue
        try:
            result["steps"].append(measure(shape, setting))
        except Exception as problem:
            if not setting.keep_going:
                raise
            problems.append(f"block {shape.name}: {type(problem).__name__}: {problem}"[:500])
        if progress is not None:
            progress(result)
    if problems:
        result["failed"] = problems
    return result
