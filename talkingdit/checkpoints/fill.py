# SPDX-License-Identifier: Apache-2.0
"""Models from weight files without a copy in between: built without memory, then filled tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from talkingdit.checkpoints.weights import Weights, some
from talkingdit.errors import UserError

Model = TypeVar("Model", bound=nn.Module)


class _Undrawn(TorchFunctionMode):
    """Random numbers are not drawn where there is no memory for them: torch imports its compiler to draw none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            return torch.empty(*args, **kwargs)
        if func in (torch.Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Let models that are made here have shapes and no memory."""
    with torch.device("meta"), _Undrawn():
        yield


def build_empty(make: Callable[[], Model], where: object) -> Model:
    """A model whose parameters have shapes and no memory.

    Raises:
        UserError: its configuration is impossible.
    """
    try:
        with without_memory():
            return make()
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: its configuration does not make a model ({reason[:240]}).") from error


def check_names(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: object, what: str
) -> None:
    """Compare what a model needs with what is there.

    Raises:
        UserError: anything missing, left over or of another shape, in one sentence: a few of each and how many.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    other = [name for name in expected if name in found and found[name] != expected[name]]
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} of {len(expected)} weights: {some(missing)}")
    if extra:
        problems.append(f"has {len(extra)} that {'is' if len(extra) == 1 else 'are'} not part of it: {some(extra)}")
    if other:
        shapes = [f"{name} {list(found[name])} instead of {list(expected[name])}" for name in other]
        problems.append(f"has {len(other)} of another shape: {some(shapes)}")
    if problems:
        raise UserError(f"{where}: does not fit {what}; it {'; it '.join(problems)}.")


def fill(
    model: Model,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    keep_float32: tuple[str, ...] = (),
    what: str | None = None,
) -> Model:
    """Give a model from `build_empty` its weights; every weight must be there and fit, and none be left over.

    Tensors are read one at a time, straight to the device, and cast there: host memory holds one tensor beside what
    the model itself needs.

    Args:
        dtype: of floating-point weights.
        keep_float32: parts of dotted names whose weights are float32 in a model of a shorter dtype.
        what: what messages call the model; default: its class.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: as `check_names`, or a damaged file.
    """
    first: dict[int, str] = {}  # name under which a weight came first
    aliases: dict[str, str] = {}  # further names of shared weights
    for name, value in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(value), name) != name:
            aliases[name] = first[id(value)]
    expected = {n: tuple(v.shape) for n, v in model.state_dict(keep_vars=True).items() if n not in aliases}
    stored = weights.entries
    weights = weights.renamed(lambda name: None if aliases.get(name, "") in stored else aliases.get(name, name))
    check_names(expected, weights.shapes, weights.source, what or type(model).__name__)
    # A copy even where nothing is cast: on the CPU the tensor may lie in the mapped file, which can change later.
    copy = torch.device(device).type == "cpu"
    for name, tensor in weights.stream(device):
        owner, leaf = _owner(model, name)
        wanted = dtype if tensor.dtype.is_floating_point else tensor.dtype
        if wanted.itemsize < 4 and tensor.dtype.is_floating_point and any(p in keep_float32 for p in name.split(".")):
            wanted = torch.float32
        tensor = tensor.to(device=device, dtype=wanted, copy=copy).contiguous()
        old = getattr(owner, leaf)
        if isinstance(old, nn.Parameter):
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=old.requires_grad))
        else:
            setattr(owner, leaf, tensor)
    for name, original in aliases.items():
        owner, leaf = _owner(model, name)
        source, key = _owner(model, original)
        setattr(owner, leaf, getattr(source, key))
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"{type(model).__name__}: checkpoints do not store {some(left)}, and it was never set")
    return model.eval()


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
