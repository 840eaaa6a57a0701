# SPDX-License-Identifier: Apache-2.0
"""Registration of ops with torch.library: one call per op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("talkingdit", "FRAGMENT")


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Any:
    """Registers ``talkingdit::<name>`` for CPU and CUDA and returns ``torch.ops.talkingdit.<name>.default``.

    ``schema`` is ``"name(Tensor x, ...) -> Tensor"``; ``fake`` computes shapes only; ``backward`` and
    ``setup_context`` are those of :func:`torch.library.register_autograd`. Backward functions call registered ops.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"talkingdit::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"talkingdit::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.talkingdit, name).default
