# SPDX-License-Identifier: Apache-2.0
"""The Wan transformers of ComfyUI, known by the attributes and signatures of their modules.

ComfyUI puts code into a model itself, through patches that it takes out again when another workflow uses the model:
`object_patches` says what goes where and leaves the model alone. `accelerate` works on them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from talkingdit import ops
from talkingdit.nn.accelerate.block import BlockModulation, run_block
from talkingdit.nn.accelerate.replacement import Replacement, is_norm, parameters_of, plain, replace_method
from talkingdit.nn.accelerate.report import Report
from talkingdit.nn.accelerate.rotation import TableLayout, token_rows

BLOCK = "block: norm, modulation and gates"
ATTENTION = "self-attention: norm and rotation of q and k"

_BLOCK_CHILDREN = {"norm1", "self_attn", "norm3", "cross_attn", "norm2", "ffn"}
_BLOCK_PARAMETERS = ["x", "e", "freqs", "context", "context_img_len", "transformer_options"]
_ATTENTION_CHILDREN = {"q", "k", "v", "o", "norm_q", "norm_k"}
_ATTENTION_FUNCTION = "optimized_attention"


# ---- what runs in place of their methods ---------------------------------------------------------------------------


def _block(
    block: Any,
    x: Tensor,
    e: Tensor,
    freqs: Tensor,
    context: Tensor,
    context_img_len: int | None = 257,
    transformer_options: Mapping[str, Any] | None = None,
) -> Tensor:
    options = {} if transformer_options is None else transformer_options
    if _is_patched(options):
        # As the class has it: the one below it in a control block, whose own forward calls this one.
        return _plain_block(type(block)).forward(block, x, e, freqs, context, context_img_len, options)
    return run_block(
        x.contiguous(),
        _modulation(block.modulation, e, x),
        (block.norm1.eps, block.norm2.eps),
        block.norm3 if isinstance(block.norm3, nn.Identity) or _lends(block.norm3, x) else block.norm3.__call__,
        lambda y: block.self_attn(y, freqs, transformer_options=options),
        lambda y: block.cross_attn(y, context, context_img_len=context_img_len, transformer_options=options),
        block.ffn,
        x.dtype,
    )


def _control_block(block: Any, c: Tensor, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Of VACE: a branch beside the blocks, whose results are added to theirs."""
    if block.block_id == 0:
        c = block.before_proj(c) + x
    c = _block(block, c, **kwargs)
    return block.after_proj(c), c


def _modulation(table: Tensor, e: Tensor, x: Tensor) -> BlockModulation:
    """`table` [1, 6, dim] with e [B, 6, dim], or [B, G, 6, dim] where parts of equal length have times of their own;
    the last may be cut off."""
    table = table.to(x.device, x.dtype)
    if e.dim() < 4:
        return BlockModulation((table + e).chunk(6, dim=1), None)
    tokens, parts = x.shape[1], e.shape[1]
    return BlockModulation((table[None] + e).unbind(2), None if parts == 1 else -(-tokens // parts))


def _self_attention(
    attn: Any, x: Tensor, freqs: Tensor, transformer_options: Mapping[str, Any] | None = None
) -> Tensor:
    options = {} if transformer_options is None else transformer_options
    forward = type(attn).forward
    layout = _layout(freqs, x)
    norms = [norm for norm in (attn.norm_q, attn.norm_k) if not isinstance(norm, nn.Identity)]
    if layout is None or _is_patched(options) or not all(_lends(norm, x) for norm in norms):
        return forward(attn, x, freqs, transformer_options=options)
    batch, tokens = x.shape[:2]
    q, k = (linear(x).view(batch, tokens, attn.num_heads, attn.head_dim) for linear in (attn.q, attn.k))
    if norms:
        q, k = ops.qk_norm_rope3d(q, k, attn.norm_q.weight, attn.norm_k.weight, layout, eps=attn.norm_q.eps)
    else:
        q, k = ops.rope3d(q, layout), ops.rope3d(k, layout)
    # Whatever stands behind that name now: ComfyUI and its nodes put other kernels there.
    attention = forward.__globals__[_ATTENTION_FUNCTION]
    out = attention(q.flatten(2), k.flatten(2), attn.v(x), heads=attn.num_heads, transformer_options=options)
    return attn.o(out)


def _layout(freqs: Any, x: Tensor) -> TableLayout | None:
    """Rotations from freqs [1, N, 1, D / 2, 2, 2], a matrix per token and pair; None for tables of another form."""
    if not isinstance(freqs, Tensor) or freqs.dim() != 6 or freqs.device != x.device:
        return None
    if freqs.shape[:3] != (1, x.shape[1], 1) or freqs.shape[4:] != (2, 2):
        return None
    table = freqs[0, :, 0]
    return token_rows(table[..., 0, 0], table[..., 1, 0], x.dtype)


def _is_patched(options: Mapping[str, Any]) -> bool:
    """Do other nodes have a word in the middle of a block?"""
    return any(name.startswith("attn") for name in options.get("patches", ()))


def _lends(norm: Any, x: Tensor) -> bool:
    """May the weights of a norm be read in place of calling it? Not where ComfyUI keeps them elsewhere until then, or
    changes them on their way (a LoRA on a model that is loaded in parts)."""
    weights = [weight for weight in (norm.weight, getattr(norm, "bias", None)) if weight is not None]
    changed = any(getattr(norm, name, None) for name in ("weight_function", "bias_function"))
    usable = all(w.device == x.device and w.is_floating_point() and w.element_size() > 1 for w in weights)
    return usable and not changed and plain(norm)


# ---- where it goes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """What is known of a module: the function for its forward, or why it is left alone."""

    kind: str
    function: Callable[..., Any] | None = None
    reason: str = ""


def replace(module: nn.Module, report: Report) -> bool:
    """Replaces what is known in this one module, not in its children; says whether it is a block of a known kind."""
    part = _part_of(module)
    if part is None:
        return False
    if part.function is None:
        report.left[part.kind, part.reason] += 1
    else:
        replace_method(module, part.function, report, part.kind)
    return part.kind == BLOCK


def object_patches(model: nn.Module, taken: Collection[str] = ()) -> tuple[dict[str, Callable[..., Any]], Report]:
    """What `accelerate` would put into a model of ComfyUI, by the names that its patcher knows.

    Args:
        model: such a model, which is not changed.
        taken: names that other code patches; these are left to it.

    Returns:
        Functions by names such as "blocks.0.forward", and what they replace and what not.

    Raises:
        ValueError: the model has no block of a known kind.
    """
    report, known = Report(type(model).__name__), False
    found: dict[str, Callable[..., Any]] = {}
    for place, module in model.named_modules():
        part = _part_of(module)
        if part is None:
            continue
        known |= part.kind == BLOCK
        name, current = f"{place}.forward", module.__dict__.get("forward")
        own = current is None or isinstance(current, Replacement)
        if part.function is None:
            report.left[part.kind, part.reason] += 1
        elif name in taken or not (own or getattr(current, "__func__", None) is type(module).forward):
            report.left[part.kind, "hooks or other code replace its forward"] += 1
        else:
            found[name] = Replacement(module, "forward", part.function)
            report.replaced[part.kind] += 1
    if not known:
        raise ValueError(f"accelerate: model must be a Wan transformer of ComfyUI, got {type(model).__name__}")
    return found, report


def _part_of(module: nn.Module) -> _Part | None:
    children = module._modules.keys()
    if children >= _BLOCK_CHILDREN and "freqs" in parameters_of(_plain_block(type(module)).forward)[:3]:
        return _block_part(module)
    if children >= _ATTENTION_CHILDREN and parameters_of(type(module).forward) == ["x", "freqs", "transformer_options"]:
        return _attention_part(module)
    return None


def _plain_block(kind: Any) -> Any:
    """The class whose forward takes a stream x: its own, or for a control block the one that it extends."""
    return next((c for c in kind.__mro__ if "forward" in vars(c) and parameters_of(c.forward)[:2] == ["x", "e"]), kind)


def _block_part(block: Any) -> _Part:
    forward = type(block).forward
    plain_forward = _plain_block(type(block)).forward
    known_norms = (
        is_norm(block.norm1, "LayerNorm", affine=False)
        and is_norm(block.norm2, "LayerNorm", affine=False)
        and (isinstance(block.norm3, nn.Identity) or is_norm(block.norm3, "LayerNorm", affine=True))
    )
    as_control = hasattr(block, "after_proj") and parameters_of(forward) == ["c", "x", "kwargs"]
    if parameters_of(plain_forward) != _BLOCK_PARAMETERS or not (forward is plain_forward or as_control):
        return _Part(BLOCK, reason="its forward is not the one that is known")
    if not known_norms or not hasattr(block, "modulation"):
        return _Part(BLOCK, reason="its norms are of another kind or have hooks")
    return _Part(BLOCK, _control_block if as_control else _block)


def _attention_part(attn: Any) -> _Part:
    norms = (attn.norm_q, attn.norm_k)
    rms = all(isinstance(norm, nn.RMSNorm) and norm.eps is not None for norm in norms)
    rms = rms and norms[0].eps == norms[1].eps
    used = getattr(getattr(type(attn).forward, "__code__", None), "co_names", ())
    if _ATTENTION_FUNCTION not in used:
        return _Part(ATTENTION, reason="its forward is not the one that is known")
    if not plain(*norms) or not (rms or all(type(norm) is nn.Identity for norm in norms)):
        return _Part(ATTENTION, reason="its norms of q and k are of another kind or have hooks")
    return _Part(ATTENTION, _self_attention)
