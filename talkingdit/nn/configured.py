# SPDX-License-Identifier: Apache-2.0
"""Networks that know their configuration, without diffusers.

`import diffusers` brings torch's compiler, transformers and peft, which takes longer than a small model takes to make a
video. A model that is only to compute needs none of that. So a network is written once, as a plain module whose
`__init__` is `configured`; our classes for diffusers inherit from it and from `ModelMixin`, bare ones from it alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn


class FrozenConfig(dict[str, Any]):
    """Arguments of a network by name, also as attributes; they cannot be changed."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a configuration cannot be changed")

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = _refuse
    update = pop = popitem = clear = setdefault = _refuse


def configured(init: Callable[..., None]) -> Callable[..., None]:
    """Let an `__init__` find its arguments, with their defaults, in `self.config`.

    In a class of diffusers, whose own decorator has registered them, nothing is done.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        if not hasattr(type(self), "config"):
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            self.config = FrozenConfig(list(bound.arguments.items())[1:])
        init(self, *args, **kwargs)

    return run


class BareModel(nn.Module):
    """A network with nothing around it: what generation asks of a model besides calling it.

    It is not saved, offloaded, quantised, adapted, trained or shared by processes.
    """

    config: Any
    _keep_in_fp32_modules: Any = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights but those that are never narrower than float32."""
        kept = tuple(self._keep_in_fp32_modules)
        return next(weight.dtype for name, weight in self.named_parameters() if not any(part in name for part in kept))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device
