# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing: what a block keeps for its backward, and where its input waits meanwhile.

With a block's results made again in the backward, what is left of the forward is one residual stream in float32 for
every block: 35 GB of 40 blocks of 5120 at 32,760 tokens. `parallel.inputs` says where those wait: as they are, in
bfloat16 (half the room; the block is made again from what was rounded), or on the host (exact), or both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import talkingdit.ops.audio_attention  # noqa: F401  (registers an operation that is named below)
from training.host import HOST
from training.sections import ParallelConfig

# Whose results "selective" keeps. All else in a block is cheap to compute again, and so are products over few columns:
# those of adapters' second matrices are as wide as the layer's own, and computed about as fast as they would be read.
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
_FEW = 128  # columns
_KEPT = {
    getattr(namespace, name).default
    for namespace, names in (
        (torch.ops.aten, ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")),
        (torch.ops.aten, ("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")),
        (torch.ops.talkingdit, ("audio_attention",)),
    )
    for name in names
}


class Waiting:
    """The input of a block: given once as it is, and from then on restored from what was kept of it.

    Args:
        x: the residual stream.
        where: as `ParallelConfig.inputs`.
    """

    def __init__(self, x: Tensor, where: str) -> None:
        self._x: Tensor | None = x
        self._host, self._narrow = where.startswith("host"), where.endswith("bf16")
        self._device, self._dtype, self._trains = x.device, x.dtype, x.requires_grad
        self._kept: Tensor | None = None

    def take(self) -> Tensor:
        """The stream itself for the forward, with its graph; a copy with the same values for the block made again."""
        if self._x is not None:
            x, self._x = self._x, None
            self._kept = self._put_away(x.detach())
            return x
        assert self._kept is not None
        kept, self._kept = self._kept, None
        return kept.to(self._device, non_blocking=True).to(self._dtype).requires_grad_(self._trains)

    def _put_away(self, x: Tensor) -> Tensor:
        if self._narrow:
            x = x.bfloat16()
        if not self._host or x.device == HOST:
            return x
        # Pinned, and on the stream that computes: the copy is done before the room of `x` is used again.
        pinned = x.device.type == "cuda"
        return torch.empty(x.shape, dtype=x.dtype, device=HOST, pin_memory=pinned).copy_(x, non_blocking=True)


def checkpoint_activations(model: Any, blocks: list[Any], config: ParallelConfig) -> None:
    """What is kept of a block for its backward.

    "full" keeps its input and runs the block again, "selective" also the results of its matrix products and attentions.
    Of a compiled block the compiler keeps about those by itself.

    Args:
        model: a diffusers model.
        blocks: those of its layers that are compiled, where `compile` asks for it.
    """
    if config.activation_checkpointing == "off":
        return
    selective = config.activation_checkpointing == "selective"
    compiled = set(blocks) if config.compile and selective else set()
    random = any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in model.modules())  # adapters may have it
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": random}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def run(module: nn.Module, *arguments: Any) -> Any:
        if module in compiled:
            return module(*arguments)
        if config.inputs == "float32" or not torch.is_grad_enabled():
            return checkpoint(module, *arguments, **options)
        return _run_with_kept_input(module, Waiting(arguments[0], config.inputs), arguments[1:], options)

    model.enable_gradient_checkpointing(run)


def _run_with_kept_input(
    module: Callable[..., Any], x: Waiting, others: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """A function of its own, so that nothing but `x` holds the stream while the model goes on."""
    return checkpoint(lambda *rest: module(x.take(), *rest), *others, **options)


def _policy(context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    kept = op in _KEPT or (op in _PRODUCTS and arguments[-1].shape[-2] > _FEW)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
