# SPDX-License-Identifier: Apache-2.0
"""Methods of a module that hooks reach as they reach its forward.

Libraries that move weights lay hooks around a module's forward: they bring in the weights that lie in the module itself
before it and take them away behind it. Another method that uses those weights must run between the same hooks. FSDP2
has a function for that, `torch.distributed.fsdp.register_fsdp_forward_method`; the others have none.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M")


def like_forward(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Run a method between the module's hooks of offloading: accelerate's, and diffusers' group offloading.

    Arguments come on the device of the weights, as the forward's do. The forward, which runs between the hooks already,
    must not call the method.
    """

    @functools.wraps(method)
    def run(module: M, *args: P.args, **kwargs: P.kwargs) -> R:
        hooks = _offloading_hooks(module)
        given: tuple[Any, Any] = args, kwargs
        for hook in hooks:
            given = hook.pre_forward(module, *given[0], **given[1])
        result = method(module, *given[0], **given[1])
        for hook in reversed(hooks):
            result = cast(R, hook.post_forward(module, result))
        return result

    return run


def _offloading_hooks(module: Any) -> list[Any]:
    """Those that lie around the forward, the outermost first."""
    registry = getattr(module, "_diffusers_hook", None)
    found = (getattr(module, "_hf_hook", None), None if registry is None else registry.get_hook("group_offloading"))
    return [hook for hook in found if hook is not None]


def resident(layers: Iterable[Any]) -> bool:
    """Do the layers hold their weights outside of their forward, too?"""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # what has not been imported has sharded nothing
    sharded = () if fsdp is None else fsdp.FSDPModule
    return not any(isinstance(layer, sharded) or hasattr(layer, "_diffusers_hook") for layer in layers)
