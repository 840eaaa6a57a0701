# SPDX-License-Identifier: Apache-2.0
"""The Wan family of diffusers: Wan, Wan-VACE, Wan-Animate and SkyReels-V2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from talkingdit import ops
from talkingdit.nn.accelerate.block import BlockModulation, run_block
from talkingdit.nn.accelerate.processor import StandIn
from talkingdit.nn.accelerate.replacement import is_norm, parameters_of, plain, replace_method
from talkingdit.nn.accelerate.report import Report
from talkingdit.nn.accelerate.rotation import token_rows

BLOCK = "block: norm, modulation and gates"
ATTENTION = "self-attention: norm and rotation of q and k"
Rotary = tuple[Tensor, Tensor]


class WanProcessor(StandIn):
    """A self-attention processor that normalises and rotates q and k in one pass.

    What it does not know how to do is done by the processor that it stands for.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or rotary_emb is None or not _fits(attn, hidden_states, *rotary_emb):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        cos, sin = rotary_emb
        layout = token_rows(cos[0, :, 0, 0::2], sin[0, :, 0, 1::2], q.dtype)
        q, k = ops.qk_norm_rope3d(q, k, attn.norm_q.weight, attn.norm_k.weight, layout, eps=attn.norm_q.eps)
        out = self.attend(q, k, v, attention_mask)
        return attn.to_out[1](attn.to_out[0](out))


def _fits(attn: Any, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Can these projections and tables be fused? Weights may have been offloaded or sharded since they were checked."""
    shape = (1, x.shape[1], 1, attn.inner_dim // attn.heads)
    weights = (attn.norm_q.weight, attn.norm_k.weight)
    return (
        cos.shape == shape
        and sin.shape == shape
        and plain(attn.norm_q, attn.norm_k)
        and all(type(w) in (Tensor, nn.Parameter) and w.shape == (attn.inner_dim,) for w in weights)
    )


def _wan_modulation(table: Tensor, temb: Tensor) -> BlockModulation:
    if temb.ndim == 4:  # [B, N, 6, dim]: every token has its own time
        return BlockModulation((table[None] + temb.float()).unbind(2), 1)
    return BlockModulation((table + temb.float()).chunk(6, dim=1), None)


def _skyreels_modulation(table: Tensor, temb: Tensor) -> BlockModulation:
    if temb.ndim == 4:  # [B, 6, N, dim]: diffusion forcing
        return BlockModulation((table[:, :, None] + temb.float()).unbind(1), 1)
    return BlockModulation((table + temb.float()).chunk(6, dim=1), None)


def _run(
    block: Any, x: Tensor, context: Tensor, modulation: BlockModulation, rotary_emb: Rotary, mask: Tensor | None
) -> Tensor:
    return run_block(
        x.contiguous(),
        modulation,
        (block.norm1.eps, block.norm3.eps),
        block.norm2,
        lambda y: block.attn1(y, None, mask, rotary_emb),
        lambda y: block.attn2(y, context, None, None),
        block.ffn,
        x.dtype,
    )


def _wan_block(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Rotary
) -> Tensor:
    modulation = _wan_modulation(block.scale_shift_table, temb)
    return _run(block, hidden_states, encoder_hidden_states, modulation, rotary_emb, None)


def _vace_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    control_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Rotary,
) -> tuple[Tensor | None, Tensor]:
    control = control_hidden_states
    if block.proj_in is not None:
        control = block.proj_in(control) + hidden_states
    modulation = _wan_modulation(block.scale_shift_table.to(temb.device), temb)
    control = _run(block, control, encoder_hidden_states, modulation, rotary_emb, None)
    return None if block.proj_out is None else block.proj_out(control), control


def _skyreels_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Rotary,
    attention_mask: Tensor | None,
) -> Tensor:
    modulation = _skyreels_modulation(block.scale_shift_table, temb)
    return _run(block, hidden_states, encoder_hidden_states, modulation, rotary_emb, attention_mask)


_BLOCKS: dict[str, Callable[..., Any]] = {
    "WanTransformerBlock": _wan_block,
    "WanVACETransformerBlock": _vace_block,
    "SkyReelsV2TransformerBlock": _skyreels_block,
}
_PROCESSORS = ("WanAttnProcessor", "SkyReelsV2AttnProcessor")


def replace(module: nn.Module, report: Report) -> bool:
    """Replaces what is known in this one module, not in its children; says whether it is a block of a known kind."""
    base: Any = next((c for c in type(module).__mro__ if c.__name__ in _BLOCKS and _is_diffusers(c)), None)
    if base is None:
        return False
    block: Any = module
    function = _BLOCKS[base.__name__]
    if type(module).forward is not base.forward or parameters_of(base.forward) != parameters_of(function):
        report.left[BLOCK, "its forward is not the one that is known"] += 1
    elif not _has_known_norms(block):
        report.left[BLOCK, "its norms are of another kind or have hooks"] += 1
    else:
        replace_method(module, function, report, BLOCK)
    _replace_processor(block.attn1, report)
    return True


def _has_known_norms(block: Any) -> bool:
    return (
        is_norm(block.norm1, "FP32LayerNorm", affine=False)
        and is_norm(block.norm3, "FP32LayerNorm", affine=False)
        and (isinstance(block.norm2, nn.Identity) or is_norm(block.norm2, "FP32LayerNorm", affine=True))
    )


def _replace_processor(attn: Any, report: Report) -> None:
    processor = attn.processor
    if isinstance(processor, WanProcessor):
        report.already += 1
    elif type(processor).__name__ not in _PROCESSORS or not _is_diffusers(type(processor)):
        report.left[ATTENTION, f"it has a processor of its own, {type(processor).__name__}"] += 1
    elif not _has_known_qk_norm(attn):
        report.left[ATTENTION, "its norms of q and k are of another kind or have hooks"] += 1
    else:
        attn.set_processor(WanProcessor(processor))
        report.replaced[ATTENTION] += 1


def _has_known_qk_norm(attn: Any) -> bool:
    norms = (attn.norm_q, attn.norm_k)
    return (
        all(type(norm) is nn.RMSNorm and norm.weight is not None and norm.eps is not None for norm in norms)
        and norms[0].eps == norms[1].eps
        and attn.add_k_proj is None
        and plain(*norms)
    )


def put_back(module: nn.Module) -> None:
    """Puts the processor back that `replace` took from an attention module."""
    processor = getattr(module, "processor", None)
    if isinstance(processor, WanProcessor):
        module.set_processor(processor.original)  # type: ignore[operator]


def _is_diffusers(cls: type) -> bool:
    return cls.__module__.startswith("diffusers.models.transformers.")
