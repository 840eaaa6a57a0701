# SPDX-License-Identifier: Apache-2.0
"""Feed-forward networks of blocks at inference: in slices of tokens, each written where its tokens were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from talkingdit import ops
from talkingdit.nn.layers import GeluTanh
from talkingdit.nn.units import FFN_TOKENS
from talkingdit.ops import EightBitRows


def overwrites() -> bool:
    """May buffers be used again? Not where gradients need them, nor in a compiled graph, which plans its own."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def feed_forward(
    network: nn.Module, y: Tensor | EightBitRows, kernel: str = "auto", kind: type[nn.Module] = nn.Sequential
) -> Tensor:
    """A network of linear layer, GELU and linear layer applied to y, which it may overwrite.

    Without gradients it runs in slices, so that its wide middle stays small. Plain layers give their result straight
    into the rows of y that it is made of; what stands in their place (eight-bit layers, adapters, layers with hooks,
    sharded or cast weights) is called as it is, and its result copied.

    Args:
        network: what calls its children one after the other if its type is `kind`.
        y: [B, N, dim].
        kernel: of `talkingdit.ops.linear_gelu`, for plain layers.
        kind: see `network`.

    Returns:
        [B, N, dim] in the dtype of the network's result; without gradients often y itself.
    """
    if not overwrites():
        return network(y)
    layers = _plain_layers(network, y, kind)
    if layers is not None and isinstance(y, Tensor):
        first, second = layers
        for part in y.flatten(0, -2).split(FFN_TOKENS):
            hidden = ops.linear_gelu(part, first.weight, first.bias, kernel=kernel)
            torch.addmm(second.bias, hidden, second.weight.T, out=part)
        return y
    if y.shape[1] <= FFN_TOKENS:
        return network(y)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.codes.device) if isinstance(y, EightBitRows) else y
    for begin in range(0, y.shape[1], FFN_TOKENS):
        end = min(begin + FFN_TOKENS, y.shape[1])
        part = y.narrow(begin, end) if isinstance(y, EightBitRows) else y[:, begin:end]
        out[:, begin:end] = network(part)
    return out


def _plain_layers(
    network: nn.Module, y: Tensor | EightBitRows, kind: type[nn.Module]
) -> tuple[nn.Linear, nn.Linear] | None:
    """Both linear layers, if their products may be taken without calling the layers, and in the dtype of y."""
    children = list(network.children())
    if (
        not isinstance(y, Tensor)
        or not _like(y, y)
        or not y.is_contiguous()
        or torch.is_autocast_enabled(y.device.type)
    ):
        return None
    if len(children) != 3 or not _unwrapped(network, kind):
        return None
    first, activation, second = children
    if not (_unwrapped(first, nn.Linear) and _unwrapped(activation, GeluTanh) and _unwrapped(second, nn.Linear)):
        return None
    weights: list[Any] = [first.weight, first.bias, second.weight, second.bias]
    if any(not _like(weight, y) for weight in weights):
        return None
    if first.in_features != y.shape[-1] or second.out_features != y.shape[-1]:
        return None
    return first, second  # type: ignore[return-value]


def _unwrapped(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Does a call of it do what its class does, and nothing around that?

    Libraries that move or cast weights, and those that compile, put something of their own over the call.
    """
    hooks = module._forward_pre_hooks or module._forward_hooks
    replaced = "forward" in vars(module) or getattr(module, "_compiled_call_impl", None) is not None
    return type(module) is kind and not hooks and not replaced


def _like(weight: Tensor | None, y: Tensor) -> bool:
    """Is it there, of the dtype and on the device of y, and no tensor that is made of others (sharded, quantised)?"""
    if weight is None or hasattr(weight, "__tensor_flatten__"):
        return False
    return weight.dtype == y.dtype and weight.device == y.device
