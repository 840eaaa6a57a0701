# SPDX-License-Identifier: Apache-2.0
"""The official WanModel and WanModel_S2V, known by the attributes and signatures of their modules."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from talkingdit import ops
from talkingdit.nn.accelerate.block import BlockModulation, layer_dtype, run_block
from talkingdit.nn.accelerate.replacement import is_norm, parameters_of, plain, replace_method
from talkingdit.nn.accelerate.report import Report
from talkingdit.nn.accelerate.rotation import TableLayout, grid_rows, token_rows

BLOCK = "block: norm, modulation and gates"
ATTENTION = "self-attention: norm and rotation of q and k"
AUDIO = "audio injection: norm, attention to the audio of each frame"
TABLES = "rotary tables: kept on the device of the model"
TIME = "time embedding: once for all tokens where they have one timestep"

_BLOCK_CHILDREN = {"norm1", "self_attn", "norm3", "cross_attn", "norm2", "ffn"}
_ATTENTION_CHILDREN = {"q", "k", "v", "o", "norm_q", "norm_k"}
_ATTENTION_FUNCTIONS = ("flash_attention", "attention")
_WAN_CHILDREN = {"patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head"}
_one_timestep: ContextVar[bool] = ContextVar("_one_timestep", default=False)


# ---- what runs in place of the official methods --------------------------------------------------------------------


def _block(
    block: Any, x: Tensor, e: Any, seq_lens: Any, grid_sizes: Any, freqs: Tensor, context: Tensor, context_lens: Any
) -> Tensor:
    modulation = _modulation(block.modulation, e, x.shape[1])
    return run_block(
        # The official residual stream is float32 from the first gate on.
        x.to(torch.promote_types(x.dtype, modulation.rows[0].dtype)).contiguous(),
        modulation,
        (block.norm1.eps, block.norm2.eps),
        block.norm3,
        lambda y: block.self_attn(y, seq_lens, grid_sizes, freqs),
        lambda y: block.cross_attn(y, context, context_lens),
        block.ffn,
        layer_dtype(x),
    )


def _modulation(table: Tensor, e: Any, tokens: int) -> BlockModulation:
    """`table` [1, 6, dim] with e as a block gets it: [B, 6, dim]; [B, N, 6, dim]; or, in S2V, [B, 6, 2, dim] and the
    number of tokens that the first of the two is for."""
    if isinstance(e, list | tuple):
        end = min(max(0, int(e[1])), tokens)
        return BlockModulation((table[:, :, None] + e[0]).unbind(1), [end, tokens])
    if e.dim() == 3:
        return BlockModulation((table + e).chunk(6, dim=1), None)
    e = _once(e)
    return BlockModulation((table[None] + e).unbind(2), 1 if e.shape[1] > 1 else None)


def _self_attention(attn: Any, x: Tensor, seq_lens: Any, grid_sizes: Any, freqs: Tensor) -> Tensor:
    forward = type(attn).forward
    layout = _layout(grid_sizes, freqs, x)
    if layout is None or not plain(attn.norm_q, attn.norm_k):
        return forward(attn, x, seq_lens, grid_sizes, freqs)
    batch, tokens = x.shape[:2]
    # Samples have tables of their own: the batch is laid end to end.
    q, k = (linear(x).view(1, batch * tokens, attn.num_heads, attn.head_dim) for linear in (attn.q, attn.k))
    v = attn.v(x).view(batch, tokens, attn.num_heads, attn.head_dim)
    if isinstance(attn.norm_q, nn.Identity):
        q, k = ops.rope3d(q, layout), ops.rope3d(k, layout)
    else:
        q, k = ops.qk_norm_rope3d(q, k, attn.norm_q.weight, attn.norm_k.weight, layout, eps=attn.norm_q.eps)
    # Whatever stands behind that name now: programs put other kernels there.
    attention = forward.__globals__[_attention_function(forward)]
    out = attention(q=q.view(v.shape), k=k.view(v.shape), v=v, k_lens=seq_lens, window_size=attn.window_size)
    return attn.o(out.flatten(2))


def _layout(grid_sizes: Any, freqs: Any, x: Tensor) -> TableLayout | None:
    """Rotations from freqs: complex, of positions [1024, D / 2], or of tokens [B, N, heads, D / 2] (alike for all
    heads). None where there is more to it: trained positions, or a table that does not fit.
    """
    if not isinstance(freqs, Tensor) or not freqs.is_complex() or freqs.requires_grad or freqs.device != x.device:
        return None
    batch, tokens = x.shape[:2]
    if freqs.dim() == 4 and freqs.shape[:2] == (batch, tokens):
        table = freqs[:, :, 0].flatten(0, 1)
        return token_rows(table.real, table.imag, x.dtype)
    if freqs.dim() != 2 or not isinstance(grid_sizes, Tensor) or len(grid_sizes) != batch:
        return None
    sizes = tuple((f, h, w) for f, h, w in grid_sizes.tolist())
    if any(f * h * w > tokens or max(f, h, w) > len(freqs) for f, h, w in sizes):
        return None
    return grid_rows(freqs, sizes, tokens, x.dtype)


def _after_transformer_block(model: Any, block_idx: int, hidden_states: Tensor) -> Tensor:
    injector = model.audio_injector
    if block_idx not in injector.injected_block_id or model.use_context_parallel:
        return type(model).after_transformer_block(model, block_idx, hidden_states)
    index = injector.injected_block_id[block_idx]
    audio = model.merged_audio_emb  # [B, F, A, dim]
    length, frames = int(model.original_seq_len), audio.shape[1]
    noisy = hidden_states[:, :length]
    if model.enbale_adain and model.adain_mode == "attn_norm":
        norm = injector.injector_adain_layers[index]
        shift, scale = norm.linear(norm.silu(model.audio_emb_global[:, :, 0])).chunk(2, dim=-1)
        y = ops.norm_modulate(
            noisy, scale, shift, length // frames, eps=norm.norm.eps, dtype=layer_dtype(hidden_states)
        )
    else:
        y = injector.injector_pre_norm_feat[index](noisy)
    attn = injector.injector[index]
    q = attn.norm_q(attn.q(y)).unflatten(-1, (attn.num_heads, -1))
    k = attn.norm_k(attn.k(audio)).unflatten(-1, (attn.num_heads, -1)).to(q.dtype)
    v = attn.v(audio).unflatten(-1, (attn.num_heads, -1)).to(q.dtype)
    out = attn.o(ops.audio_attention(q, k, v, tokens_per_frame=length // frames).flatten(2))
    if torch.is_grad_enabled():
        return torch.cat([noisy + out, hidden_states[:, length:]], dim=1)
    noisy.add_(out)
    return hidden_states


def _once(e: Tensor) -> Tensor:
    """[B, 1, ...] of an e [B, N, ...] that is expanded over the tokens."""
    return e[:, :1] if e.stride(1) == 0 else e


def _wan_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The official forward repeats a timestep [B] for every token before it embeds it: gigabytes, and as many FLOPs as
    several blocks. The layers of the embedding cannot see that their rows are equal; here it is known."""
    t = kwargs["t"] if "t" in kwargs else args[1]
    token = _one_timestep.set(t.dim() == 1)
    try:
        return type(model).forward(model, *args, **kwargs)
    finally:
        _one_timestep.reset(token)


def _time_embedding(layers: Any, x: Tensor) -> Tensor:
    forward = type(layers).forward
    if not _one_timestep.get() or x.dim() != 3:
        return forward(layers, x)
    return forward(layers, x[:, :1]).expand(-1, x.shape[1], -1)


def _time_projection(layers: Any, e: Tensor) -> Tensor:
    forward = type(layers).forward
    if not _one_timestep.get() or e.dim() != 3:
        return forward(layers, e)
    return forward(layers, _once(e)).expand(-1, e.shape[1], -1)


def _head(head: Any, x: Tensor, e: Tensor) -> Tensor:
    return type(head).forward(head, x, _once(e) if e.dim() == 3 else e)


def _s2v_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The official S2V forward makes a table of rotations for every token and head out of a small one, which it leaves
    on the CPU; from there it would cross to the device expanded, gigabytes in every forward."""
    device = model.patch_embedding.weight.device
    for owner in (model, getattr(model, "frame_packer", None)):
        if owner is not None and isinstance(owner.freqs, Tensor) and owner.freqs.device != device:
            owner.freqs = owner.freqs.to(device)
    return type(model).forward(model, *args, **kwargs)


# ---- where it goes -------------------------------------------------------------------------------------------------


def replace(module: nn.Module, report: Report) -> bool:
    """Replaces what is known in this one module, not in its children; says whether it is of a known kind."""
    children = module._modules.keys()
    if children >= _BLOCK_CHILDREN:
        _replace_block(module, report)
        return True
    if children >= _ATTENTION_CHILDREN and _takes(module, ["x", "seq_lens", "grid_sizes", "freqs"]):
        _replace_attention(module, report)
    elif "audio_injector" in children and hasattr(type(module), "after_transformer_block"):
        _replace_injection(module, report)
    elif children >= _WAN_CHILDREN and parameters_of(type(module).forward)[:4] == ["x", "t", "context", "seq_len"]:
        _replace_time(module, report)
    return False


def _takes(module: nn.Module, parameters: list[str], method: str = "forward") -> bool:
    return parameters_of(getattr(type(module), method)) == parameters


def _replace_block(block: Any, report: Report) -> None:
    known_norms = (
        is_norm(block.norm1, "WanLayerNorm", affine=False)
        and is_norm(block.norm2, "WanLayerNorm", affine=False)
        and (isinstance(block.norm3, nn.Identity) or is_norm(block.norm3, "WanLayerNorm", affine=True))
    )
    if not _takes(block, ["x", "e", "seq_lens", "grid_sizes", "freqs", "context", "context_lens"]):
        report.left[BLOCK, "its forward is not the one that is known"] += 1
    elif not known_norms or not hasattr(block, "modulation"):
        report.left[BLOCK, "its norms are of another kind or have hooks"] += 1
    else:
        replace_method(block, _block, report, BLOCK)


def _replace_attention(attn: Any, report: Report) -> None:
    norms = (attn.norm_q, attn.norm_k)
    rms = all(type(norm).__name__ in ("WanRMSNorm", "RMSNorm") and norm.eps is not None for norm in norms)
    rms = rms and norms[0].eps == norms[1].eps
    if _attention_function(type(attn).forward) is None:
        report.left[ATTENTION, "its forward is not the one that is known"] += 1
    elif not plain(*norms) or not (rms or all(type(norm) is nn.Identity for norm in norms)):
        report.left[ATTENTION, "its norms of q and k are of another kind or have hooks"] += 1
    else:
        replace_method(attn, _self_attention, report, ATTENTION)


def _attention_function(forward: Any) -> str | None:
    """Name of the function that an official attention calls; None for another kind of attention."""
    used = getattr(getattr(forward, "__code__", None), "co_names", ())
    if "rope_apply" not in used:
        return None
    return next((name for name in _ATTENTION_FUNCTIONS if name in used), None)


def _replace_injection(model: Any, report: Report) -> None:
    injector = model.audio_injector
    needed = ("injected_block_id", "injector", "injector_pre_norm_feat")
    known = _takes(model, ["block_idx", "hidden_states"], "after_transformer_block") and all(
        hasattr(injector, name) for name in needed
    )
    if not known or not all(_takes(attn, ["x", "context", "context_lens"]) for attn in injector.injector):
        report.left[AUDIO, "it is not the one that is known"] += 1
    elif not all(_is_adaptive_norm(norm) for norm in getattr(injector, "injector_adain_layers", ())):
        report.left[AUDIO, "its adaptive norm is of another kind or has hooks"] += 1
    else:
        replace_method(model, _after_transformer_block, report, AUDIO, "after_transformer_block")
    if hasattr(model, "freqs") and "patch_embedding" in model._modules:
        replace_method(model, _s2v_forward, report, TABLES)


def _replace_time(model: Any, report: Report) -> None:
    """Only in a model that makes an embedding per token (Wan 2.2); its head then takes e [B, N, dim]."""
    layers = (model.time_embedding, model.time_projection)
    if not all(type(part) is nn.Sequential for part in layers) or not _takes(model.head, ["x", "e"]):
        report.left[TIME, "its layers are not the ones that are known"] += 1
        return
    parts: tuple[tuple[nn.Module, Callable[..., Any]], ...] = (
        (model, _wan_forward),
        (layers[0], _time_embedding),
        (layers[1], _time_projection),
        (model.head, _head),
    )
    # Each is right without the others, and the layers do as always unless the model says that there is one timestep.
    own = Report("")
    for part, function in parts:
        replace_method(part, function, own, TIME)
    if own.left:
        report.left[TIME, "hooks or other code replace a forward"] += 1
    elif own.replaced:
        report.replaced[TIME] += 1
    else:
        report.already += 1


def _is_adaptive_norm(module: Any) -> bool:
    return (
        all(hasattr(module, name) for name in ("linear", "silu", "norm"))
        and getattr(module, "emb", None) is None
        and getattr(module, "chunk_dim", None) == 1
        and is_norm(module.norm, "LayerNorm", affine=False)
        and plain(module)
    )
