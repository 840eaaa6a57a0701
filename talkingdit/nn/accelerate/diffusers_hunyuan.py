# SPDX-License-Identifier: Apache-2.0
"""The HunyuanVideo transformers of diffusers: text-to-video, and image-to-video whose first frame is given clean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from talkingdit import ops
from talkingdit.nn.accelerate.processor import StandIn
from talkingdit.nn.accelerate.replacement import is_norm, parameters_of, plain, replace_method
from talkingdit.nn.accelerate.report import Report
from talkingdit.nn.accelerate.rotation import TableLayout, token_rows

BLOCK = "double block: norms, modulation and gates"
SINGLE = "single block: norm, modulation and gate"
ATTENTION = "attention: norm and rotation of q and k"
CALL = "attention: its processor called without reading its signature"
SMALL = 1 << 16  # elements of a stream on the CPU below which calling kernels takes longer than what they save
Rotary = tuple[Tensor, Tensor]


class HunyuanVideoProcessor(StandIn):
    """An attention processor that normalises and rotates q and k in one pass.

    What it does not know how to do is done by the processor that it stands for.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        given = (attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if encoder_hidden_states is None or image_rotary_emb is None or is_small(hidden_states):
            if attention_mask is not None and _keys_of(attention_mask) == attention_mask.shape[-1]:
                given = (*given[:3], None, image_rotary_emb)  # a mask that hides nothing is only work
            return self.original(*given)
        if not fits(attn, hidden_states, image_rotary_emb):
            return self.original(*given)
        length = hidden_states.shape[1]
        if attn.add_q_proj is None:
            both = torch.cat([hidden_states, encoder_hidden_states], dim=1)
            out = self.single(attn, both, length, attention_mask, image_rotary_emb)
            image, text = out[:, :length], out[:, length:]
            if getattr(attn, "to_out", None) is not None:
                image = attn.to_out[1](attn.to_out[0](image))
            return image, text
        q, k, v = self._projected(attn, hidden_states, ("to_q", "to_k", "to_v"))
        q, k = _normalised(attn, q, k, _layout(image_rotary_emb, q, 0))
        text_q, text_k, text_v = self._projected(
            attn, encoder_hidden_states, ("add_q_proj", "add_k_proj", "add_v_proj")
        )
        text_q = text_q if attn.norm_added_q is None else attn.norm_added_q(text_q)
        text_k = text_k if attn.norm_added_k is None else attn.norm_added_k(text_k)
        q, k, v = (torch.cat(pair, dim=1) for pair in ((q, text_q), (k, text_k), (v, text_v)))
        out = self.attend(q, k, v, attention_mask)
        image = attn.to_out[1](attn.to_out[0](out[:, :length]))
        return image, attn.to_add_out(out[:, length:])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """As of any processor; keys of padding behind the text are left out where that says what the mask says.

        Without a mask torch can choose among all of its kernels, and those of the fastest libraries take none at all.
        """
        sharded = getattr(self.original, "_parallel_config", None) is not None
        count = None if mask is None or sharded else _keys_of(mask)
        return super().attend(q, k, v, mask) if count is None else super().attend(q, k[:, :count], v[:, :count], None)

    def single(self, attn: Any, x: Tensor, length: int, mask: Tensor | None, rotary: Rotary) -> Tensor:
        """Attention of image and text tokens [B, N + L, dim] with the same weights; the first `length` are rotated."""
        q, k, v = self._projected(attn, x, ("to_q", "to_k", "to_v"))
        q, k = _normalised(attn, q, k, _layout(rotary, q, x.shape[1] - length))
        return self.attend(q, k, v, mask)

    def _projected(self, attn: Any, x: Tensor, names: tuple[str, str, str]) -> list[Tensor]:
        return [getattr(attn, name)(x).unflatten(2, (attn.heads, -1)) for name in names]


def _keys_of(mask: Tensor) -> int | None:
    """How many keys stand in front that every query of every sample attends to, and to no others.

    Returns:
        None where that cannot be said in one number, or not without breaking a graph that is being recorded.
    """
    if torch.compiler.is_compiling() or type(mask) is not Tensor or mask.is_meta:
        return None
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        return None
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    # All blocks of a forward are given the same mask: the device is waited for once.
    kept, version = mask.__dict__, None if mask.is_inference() else mask._version
    if kept.get("_talkingdit_keys", (None, -1))[1] != version:
        seen = mask[:, 0, 0]
        counts = seen.sum(1)
        in_front = (seen[:, 1:] <= seen[:, :-1]).all()
        least, most, leading = torch.stack([counts.min(), counts.max(), in_front.to(counts.dtype)]).tolist()
        kept["_talkingdit_keys"] = (most if leading and least == most and most else None, version)
    found: int | None = kept["_talkingdit_keys"][0]
    return found


def fits(attn: Any, x: Tensor, rotary: Rotary) -> bool:
    """Can these norms and tables be fused? Weights may have been offloaded or sharded since they were checked."""
    head = attn.inner_dim // attn.heads
    weights = (attn.norm_q.weight, attn.norm_k.weight)
    return (
        all(isinstance(table, Tensor) and table.shape == (x.shape[1], head) for table in rotary)
        and plain(attn.norm_q, attn.norm_k)
        and all(type(w) in (Tensor, nn.Parameter) and w.shape == (head,) for w in weights)
    )


def _layout(rotary: Rotary, like: Tensor, text: int) -> TableLayout:
    """Rotations of the image tokens, from tables that hold every value twice; `text` tokens behind stay as they are."""
    # All blocks of a forward are given the same tables: what is made of them is kept with them, and goes with them.
    kept = {} if torch.compiler.is_compiling() else rotary[0].__dict__.setdefault("_talkingdit_layouts", {})
    key = (id(rotary[1]), text, like.dtype, like.device)
    if key not in kept:
        cos, sin = (table.to(like.device)[:, ::2] for table in rotary)
        if text:
            cos = torch.cat([cos, cos.new_ones(text, cos.shape[1])])
            sin = torch.cat([sin, sin.new_zeros(text, sin.shape[1])])
        kept[key] = token_rows(cos, sin, like.dtype)
    return kept[key]


def _normalised(attn: Any, q: Tensor, k: Tensor, layout: TableLayout) -> tuple[Tensor, Tensor]:
    weights = attn.norm_q.weight, attn.norm_k.weight
    return ops.qk_norm_rope3d(q, k, *weights, layout, eps=attn.norm_q.eps, norm="per_head")


def _attention(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **cross_attention_kwargs: Any,
) -> Any:
    known = isinstance(attn.processor, HunyuanVideoProcessor) and cross_attention_kwargs.keys() <= {"image_rotary_emb"}
    run = attn.processor if known else type(attn).forward
    return run(attn, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)


def is_small(x: Tensor) -> bool:
    """Is a stream so small that its block is better left as it is?"""
    return x.device.type == "cpu" and x.numel() < SMALL


# ---- what runs in place of the blocks --------------------------------------------------------------------------------


class _Rows:
    """Shifts, scales and gates of the groups of tokens of a stream, [B, G, dim] each."""

    def __init__(self, norm: Any, count: int, temb: Tensor, first: tuple[Tensor, int] | None, tokens: int):
        rows = norm.linear(norm.silu(temb))[:, None]
        self.groups: list[int] | None = None
        if first is not None:  # of tokens that are given clean, in front
            rows = torch.cat([norm.linear(norm.silu(first[0]))[:, None], rows], dim=1)
            self.groups = [min(first[1], tokens), tokens]
        self.rows = rows.chunk(count, dim=-1)


def _double(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None,
    rotary: Rotary | None,
    first: tuple[Tensor, int] | None,
) -> tuple[Tensor, Tensor]:
    streams = [hidden_states.contiguous(), encoder_hidden_states.contiguous()]
    names = ("", "_context")
    image = _Rows(block.norm1, 6, temb, first, streams[0].shape[1])
    rows = [image, _Rows(block.norm1_context, 6, temb, None, streams[1].shape[1])]
    normed = []
    for x, modulation, name in zip(streams, rows, names, strict=True):
        eps = getattr(block, f"norm1{name}").norm.eps
        normed.append(ops.norm_modulate(x, modulation.rows[1], modulation.rows[0], modulation.groups, eps))
    attended = block.attn(
        hidden_states=normed[0],
        encoder_hidden_states=normed[1],
        attention_mask=attention_mask,
        image_rotary_emb=rotary,
    )
    results = []
    for x, y, modulation, name in zip(streams, attended, rows, names, strict=True):
        _, _, gate1, shift2, scale2, gate2 = modulation.rows
        eps = getattr(block, f"norm2{name}").eps
        x, y = ops.gate_residual_norm_modulate(x, y.contiguous(), gate1, scale2, shift2, modulation.groups, eps)
        results.append(ops.gate_residual(x, getattr(block, f"ff{name}")(y), gate2, modulation.groups))
    return results[0], results[1]


def _single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None,
    rotary: Rotary | None,
    first: tuple[Tensor, int] | None,
) -> tuple[Tensor, Tensor]:
    length = hidden_states.shape[1]
    x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    modulation = _Rows(block.norm, 3, temb, first, x.shape[1])
    shift, scale, gate = modulation.rows
    y = ops.norm_modulate(x, scale, shift, modulation.groups, block.norm.norm.eps)
    hidden = block.act_mlp(block.proj_mlp(y))
    attn = block.attn
    processor = attn.processor
    if isinstance(processor, HunyuanVideoProcessor) and rotary is not None and fits(attn, hidden_states, rotary):
        out = processor.single(attn, y, length, attention_mask, rotary)
    else:
        parts = attn(
            hidden_states=y[:, :length],
            encoder_hidden_states=y[:, length:],
            attention_mask=attention_mask,
            image_rotary_emb=rotary,
        )
        out = torch.cat(parts, dim=1)
    x = ops.gate_residual(x, block.proj_out(torch.cat([out, hidden], dim=2)), gate, modulation.groups)
    return x[:, :length], x[:, length:]


def _hunyuan_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Rotary | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    if is_small(hidden_states):
        return type(block).forward(block, hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis)
    return _double(block, hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis, None)


def _hunyuan_single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotary | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    if is_small(hidden_states):
        return type(block).forward(block, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb)
    return _single(block, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb, None)


def _replaced_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Rotary | None = None,
    token_replace_emb: Any = None,
    num_tokens: Any = None,
) -> tuple[Tensor, Tensor]:
    first = (token_replace_emb, num_tokens)
    return _double(block, hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis, first)


def _replaced_single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotary | None = None,
    token_replace_emb: Any = None,
    num_tokens: Any = None,
) -> tuple[Tensor, Tensor]:
    first = (token_replace_emb, num_tokens)
    return _single(block, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb, first)


_BLOCKS: dict[str, tuple[Callable[..., Any], str]] = {
    "HunyuanVideoTransformerBlock": (_hunyuan_block, BLOCK),
    "HunyuanVideoSingleTransformerBlock": (_hunyuan_single, SINGLE),
    "HunyuanVideoTokenReplaceTransformerBlock": (_replaced_block, BLOCK),
    "HunyuanVideoTokenReplaceSingleTransformerBlock": (_replaced_single, SINGLE),
}


# ---- where it goes ---------------------------------------------------------------------------------------------------


def replace(module: nn.Module, report: Report) -> bool:
    """Replaces what is known in this one module, not in its children; says whether it is a block of a known kind."""
    base: Any = next((c for c in type(module).__mro__ if c.__name__ in _BLOCKS and _is_diffusers(c)), None)
    if base is None:
        return False
    block: Any = module
    function, kind = _BLOCKS[base.__name__]
    if type(module).forward is not base.forward or parameters_of(base.forward) != parameters_of(function):
        report.left[kind, "its forward is not the one that is known"] += 1
    elif not _has_known_norms(block, kind):
        report.left[kind, "its norms are of another kind or have hooks"] += 1
    else:
        replace_method(module, function, report, kind)
    _replace_processor(block.attn, report)
    return True


def _has_known_norms(block: Any, kind: str) -> bool:
    adaptive = (block.norm,) if kind == SINGLE else (block.norm1, block.norm1_context)
    others = () if kind == SINGLE else (block.norm2, block.norm2_context)
    return (
        plain(*adaptive)
        and all(getattr(norm, "emb", None) is None and hasattr(norm, "linear") for norm in adaptive)
        and all(is_norm(norm.norm, "LayerNorm", affine=False) for norm in adaptive)
        and all(is_norm(norm, "LayerNorm", affine=False) for norm in others)
    )


def _replace_processor(attn: Any, report: Report) -> None:
    processor = attn.processor
    if isinstance(processor, HunyuanVideoProcessor):
        report.already += 1
    elif type(processor).__name__ != "HunyuanVideoAttnProcessor2_0" or not _is_diffusers(type(processor)):
        report.left[ATTENTION, f"it has a processor of its own, {type(processor).__name__}"] += 1
    elif not _has_known_qk_norm(attn):
        report.left[ATTENTION, "its norms of q and k are of another kind or have hooks"] += 1
    else:
        attn.set_processor(HunyuanVideoProcessor(processor))
        report.replaced[ATTENTION] += 1
        if parameters_of(type(attn).forward) == parameters_of(_attention):
            replace_method(attn, _attention, report, CALL)


def _has_known_qk_norm(attn: Any) -> bool:
    norms = (attn.norm_q, attn.norm_k)
    return (
        all(type(norm).__name__ == "RMSNorm" and norm.weight is not None and norm.eps is not None for norm in norms)
        and all(getattr(norm, "bias", None) is None for norm in norms)
        and norms[0].eps == norms[1].eps
        and plain(*norms)
    )


def put_back(module: nn.Module) -> None:
    """Puts the processor back that `replace` took from an attention module."""
    processor = getattr(module, "processor", None)
    if isinstance(processor, HunyuanVideoProcessor):
        module.set_processor(processor.original)  # type: ignore[operator]


def _is_diffusers(cls: type) -> bool:
    return cls.__module__.startswith("diffusers.models.transformers.")
