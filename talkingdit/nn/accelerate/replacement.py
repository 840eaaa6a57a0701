# SPDX-License-Identifier: Apache-2.0
"""A function in the place of a method of one module, and the way back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from talkingdit.nn.accelerate.report import Report

_RECORD = "_talkingdit_replacements"


class Replacement:
    """Stands in `module.__dict__` for the method `name` of the module's class.

    Hooks of libraries may be laid over it and taken off again. It can be copied and pickled with its module.
    """

    __slots__ = ("active", "function", "module", "name", "previous")

    def __init__(self, module: nn.Module, name: str, function: Callable[..., Any]):
        self.module = module
        self.name = name
        self.function = function
        self.previous = module.__dict__.get(name)
        self.active = True

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self.module), self.name).__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active:
            return self.function(self.module, *args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)


def replace_method(
    module: nn.Module, function: Callable[..., Any], report: Report, kind: str, name: str = "forward"
) -> None:
    """Puts `function(module, ...)` in the place of a method, unless something else stands there already."""
    found: Any = module.__dict__.get(name)
    record = module.__dict__.setdefault(_RECORD, {})
    if name in record:
        report.already += 1
        return
    if isinstance(found, Replacement):
        found.active = True  # it was put back underneath a hook that is gone now
        record[name] = found
    elif found is None or getattr(found, "__func__", None) is getattr(type(module), name):
        record[name] = Replacement(module, name, function)
        setattr(module, name, record[name])
    else:
        if not record:
            del module.__dict__[_RECORD]
        report.left[kind, f"hooks or other code replace its {name}"] += 1
        return
    report.replaced[kind] += 1


def put_back(module: nn.Module) -> None:
    """Undoes every `replace_method` on a module. Under a hook the replacement stays, and passes calls through."""
    record: dict[str, Replacement] = module.__dict__.pop(_RECORD, {})
    for name, replacement in record.items():
        if module.__dict__.get(name) is not replacement:
            replacement.active = False
        elif replacement.previous is None:
            delattr(module, name)
        else:
            setattr(module, name, replacement.previous)


def parameters_of(method: Callable[..., Any]) -> list[str]:
    """Names of a method's parameters, without `self`."""
    return list(inspect.signature(method).parameters)[1:]


def plain(*modules: nn.Module) -> bool:
    """May the weights of these modules be read in place of calling them? Not if hooks load, cast or watch them."""
    for module in modules:
        if module._forward_pre_hooks or module._forward_hooks:
            return False
        if getattr(module, "_hf_hook", None) is not None or getattr(module, "_diffusers_hook", None) is not None:
            return False
    return True


def is_norm(module: nn.Module, name: str, affine: bool) -> bool:
    """Is this a layer norm over the last axis, of a class of this name, with or without weights, and without hooks?"""
    return (
        isinstance(module, nn.LayerNorm)
        and type(module).__name__ in (name, "LayerNorm")
        and len(module.normalized_shape) == 1
        and module.elementwise_affine == affine
        and "forward" not in module.__dict__
        and plain(module)
    )
