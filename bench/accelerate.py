# SPDX-License-Identifier: Apache-2.0
"""Transformers of diffusers after `talkingdit.accelerate`, against the same before.

A block of WanTransformer3DModel, and a small HunyuanVideoTransformer3DModel whole, whose text ends in padding.
Backward is with respect to the activations. Most of the time goes to matrix products and attention, which are the same
code on both sides: the difference is what lies between them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import talkingdit
from bench.cases import Benchmark, Case, size
from bench.shapes import TokenShape

SHAPES = {
    "cpu": [
        TokenShape("wan-1.3b-3120", [(0, (2, 30, 52))], heads=12, dim=128),
        TokenShape("hunyuan-tiny-2304", [(0, (9, 16, 16))], heads=2, dim=64),
        TokenShape("hunyuan-tiny-9216", [(0, (9, 32, 32))], heads=2, dim=64),
    ],
    "cuda": [
        TokenShape("wan-1.3b-32760", [(0, (21, 30, 52))], heads=12, dim=128),
        TokenShape("wan-14b-32760", [(0, (21, 30, 52))], heads=40, dim=128),
    ],
    "quick": [
        TokenShape("tiny", [(0, (3, 4, 6))], heads=2, dim=12),
        TokenShape("hunyuan-quick", [(0, (2, 4, 4))], heads=2, dim=64),
    ],
}
_TEXT = 512
_FFN = {12: 8960, 40: 13824}  # by heads, as released


def model(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> Any:
    """A transformer of one block with random weights; modulation tables in float32, as `from_pretrained` has them."""
    from diffusers import WanTransformer3DModel

    with device:
        made = WanTransformer3DModel(
            num_attention_heads=shape.heads,
            attention_head_dim=shape.dim,
            ffn_dim=_FFN.get(shape.heads, 64),
            text_dim=64,
            num_layers=1,
        )
    for name, module in made.named_modules():
        if isinstance(module, nn.Linear | nn.RMSNorm) and not name.startswith("condition_embedder.time_embedder"):
            module.to(dtype)
    return made.requires_grad_(False)


def hunyuan(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> Any:
    """A whole transformer of two blocks of each kind with random weights."""
    from diffusers import HunyuanVideoTransformer3DModel

    with device:
        made = HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=shape.heads, attention_head_dim=shape.dim, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=64,
            pooled_projection_dim=64, rope_axes_dim=(16, 24, 24), guidance_embeds=False,
        )  # fmt: skip
    return made.to(dtype).requires_grad_(False)


def hunyuan_cases(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    before = hunyuan(shape, dtype, device)
    after = copy.deepcopy(before)
    talkingdit.accelerate(after)
    mask = (torch.arange(_TEXT, device=device) < _TEXT // 4)[None]
    time = torch.full((1,), 500.0, device=device, dtype=dtype)

    def inputs() -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        return (
            torch.randn(1, 4, *shape.video, **options),
            torch.randn(1, _TEXT, 64, **options),
            torch.randn(1, 64, **options),
        )

    def calling(model: Any) -> Callable[..., Tensor]:
        def run(x: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
            return model(x, time, text, mask, pooled, return_dict=False)[0]

        return run

    once = size(*before.parameters(), *inputs())
    for direction in ("forward", "backward"):
        yield Case(
            "accelerate",
            shape.name,
            shape.tokens,
            dtype,
            direction,
            bytes=once,
            inputs=inputs,
            ours=calling(after),
            baselines={"diffusers": calling(before)},
            has_out=False,
        )


def _call(block: nn.Module, rotary: tuple[Tensor, Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        return block(x, text, time, rotary)

    return run


def cases(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    if shape.name.startswith("hunyuan"):
        yield from hunyuan_cases(shape, dtype, device)
        return
    before = model(shape, dtype, device)
    after = copy.deepcopy(before)
    for ours, theirs in zip(after.parameters(), before.parameters(), strict=True):
        ours.data = theirs.data
    talkingdit.accelerate(after)
    frames, height, width = shape.video
    rotary = before.rope(torch.empty(1, 1, frames, 2 * height, 2 * width, device="meta"))
    original = _call(before.blocks[0], rotary)
    dim = shape.heads * shape.dim

    def inputs() -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        x, text = torch.randn(1, shape.tokens, dim, **options), torch.randn(1, _TEXT, dim, **options)
        return x, text, torch.randn(1, 6, dim, **options)

    x, *rest = inputs()
    once = size(*before.blocks[0].parameters(), *rest)
    for direction, passes in (("forward", 2), ("backward", 3)):  # backward: gradient and input in, gradient out
        yield Case(
            "accelerate",
            shape.name,
            shape.tokens,
            dtype,
            direction,
            bytes=once + passes * size(x),
            inputs=inputs,
            ours=_call(after.blocks[0], rotary),
            baselines={"diffusers": original},
            compiled=original,
            has_out=False,
        )


BENCH = Benchmark(SHAPES, cases, block=True)
