# SPDX-License-Identifier: Apache-2.0
"""The face-aware audio adapters of the released HunyuanVideo-Avatar transformer, known by their attributes.

An adapter is called with audio tokens [B, F, A, dim] and video tokens [B, F, S, dim] of the same F latent frames, and
has one head as wide as its projections, whatever number it was built with.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from talkingdit import ops
from talkingdit.nn.accelerate.replacement import is_norm, parameters_of, replace_method
from talkingdit.nn.accelerate.report import Report

AUDIO = "audio adapter: attention to the voice of each frame"
_CHILDREN = {"norm1", "norm2", "to_q", "to_kv", "to_out"}


def _adapter(adapter: Any, x: Tensor, latents: Tensor) -> Tensor:
    if x.dim() != 4 or latents.dim() != 4 or x.shape[:2] != latents.shape[:2]:
        return type(adapter).forward(adapter, x, latents)
    k, v = adapter.to_kv(adapter.norm1(x)).unsqueeze(-2).chunk(2, dim=-1)
    q = adapter.to_q(adapter.norm2(latents))
    out = ops.audio_attention(q.flatten(1, 2).unsqueeze(2), k, v, tokens_per_frame=latents.shape[2])
    return adapter.to_out(out.squeeze(2)).unflatten(1, latents.shape[1:3])


def replace(module: nn.Module, report: Report) -> bool:
    """Replaces this one module if it is such an adapter, not its children; says whether it is one."""
    if module._modules.keys() != _CHILDREN or parameters_of(type(module).forward) != ["x", "latents"]:
        return False
    adapter: Any = module
    inner = getattr(adapter.to_q, "out_features", None)
    if inner is None or getattr(adapter, "dim_head", None) != inner:
        report.left[AUDIO, "it has several heads"] += 1
    elif not all(is_norm(norm, "LayerNorm", affine=True) for norm in (adapter.norm1, adapter.norm2)):
        report.left[AUDIO, "its norms are of another kind or have hooks"] += 1
    else:
        replace_method(module, _adapter, report, AUDIO)
    return True
