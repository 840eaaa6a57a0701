# SPDX-License-Identifier: Apache-2.0
"""The audio cross-attention block, from normalised input to residual stream, with its projections folded away or not.

Query projection, attention, output projection and residual: as layers with our attention ("none"), with the output
projection folded into the values ("value") and with the query projection folded into the keys too ("full"). Keys and
values are made beforehand for all: they belong to the clip, not to the step. The adapter of HunyuanVideo-Avatar, one
head of 1024 channels that no flash attention takes, is written out as official code does and absorbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import audio_baselines as others
from bench.audio_attention import SHAPES as AUDIO
from bench.cases import Benchmark, Case, size
from bench.shapes import TOKENS, TokenShape
from talkingdit import ops
from talkingdit.nn.audio_cross_attention import ABSORB, AudioCrossAttention

_ADAPTER = 1024

SHAPES = {
    **AUDIO,
    "cuda": [*AUDIO["cuda"][:3], *(shape for shape in TOKENS["cuda"][1:])],
}


def _module(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> AudioCrossAttention:
    """Without a norm of the query, so that everything can be folded (as in MultiTalk)."""
    with torch.device(device):
        return AudioCrossAttention(shape.heads * shape.dim, shape.heads, qk_norm=False).to(dtype).eval()


def cases(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    frames, height, width = shape.video
    per_frame, dim = height * width, shape.heads * shape.dim
    tokens = frames * per_frame
    options: dict[str, Any] = {"device": device, "dtype": dtype}

    def inputs() -> tuple[Tensor, ...]:
        return tuple(torch.randn(1, tokens, dim, **options) for _ in range(2))

    common: dict[str, Any] = {
        "tokens": tokens,
        "dtype": dtype,
        "direction": "forward",
        "inputs": inputs,
        "has_out": False,
    }
    module = _module(shape, dtype, device)
    heard = torch.randn(1, frames, shape.audio, dim, **options)
    with torch.no_grad():
        k, v = module.key_value(heard)
        memories = {absorb: module.memory(heard, absorb) for absorb in ABSORB}

    def layers(attention: others.Attention) -> Callable[..., Tensor]:
        return lambda x, hidden: x + module.o(attention(module.query(hidden), k, v).flatten(2))

    stream = size(*inputs()[:1])
    optional = {}
    if device.type == "cuda":
        optional = {f"sdpa-{name}": layers(others.sdpa_with(name)) for name in ("flash", "cudnn", "efficient")}
    for absorb, memory in memories.items():
        kept = size(*(t for t in memory if t is not None))
        kept += sum(size(module.get_parameter(f"{name}.weight")) for name in _projections(absorb))

        def ours(x: Tensor, hidden: Tensor, memory: Any = memory) -> Tensor:
            return x + module(hidden, per_frame, memory=memory)

        plain: dict[str, Callable[..., Any]] = {"eager": layers(others.eager), "sdpa": layers(others.sdpa)}
        if absorb != "none":
            plain["unabsorbed"] = lambda x, hidden: x + module(hidden, per_frame, memory=memories["none"])
        name = f"audio_block {absorb}"
        yield Case(name, shape.name, bytes=3 * stream + kept, ours=ours, baselines=plain, optional=optional, **common)
    if shape.name.startswith("hunyuan"):
        yield _adapter(shape, common, options)


def _projections(absorb: str) -> tuple[str, ...]:
    return {"none": ("q", "o"), "value": ("q",), "full": ()}[absorb]


def _adapter(shape: TokenShape, common: dict[str, Any], options: dict[str, Any]) -> Case:
    frames, height, width = shape.video
    dim, per_frame = shape.heads * shape.dim, height * width
    to_q, to_o = (torch.randn(*s, **options) * s[1] ** -0.5 for s in ((_ADAPTER, dim), (dim, _ADAPTER)))
    k, v = (torch.randn(1, frames, shape.audio, _ADAPTER, **options) for _ in range(2))
    scale = _ADAPTER**-0.5
    keys, values = k @ to_q, v @ to_o.T  # [1, F, A, dim]

    def official(x: Tensor, hidden: Tensor) -> Tensor:
        q = F.linear(hidden, to_q).unflatten(1, (frames, -1))
        weights = ((q @ k.transpose(2, 3)) * scale).float().softmax(-1).to(x.dtype)
        return x + F.linear(weights @ v, to_o).flatten(1, 2)

    def ours(x: Tensor, hidden: Tensor) -> Tensor:
        scores = hidden.unflatten(1, (frames, -1)) @ keys.transpose(2, 3)
        weights = (scores.float() * scale).softmax(-1).to(x.dtype).flatten(1, 2)
        return ops.frame_linear(weights, values, per_frame, residual=x)

    moved = 3 * size(common["inputs"]()[0]) + size(keys, values)
    return Case(
        "audio_block 1 x 1024 full",
        shape.name,
        bytes=moved,
        ours=ours,
        baselines={"official": official},
        compiled=official,
        **common,
    )


BENCH = Benchmark(SHAPES, cases, block=True)
