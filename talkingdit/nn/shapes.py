# SPDX-License-Identifier: Apache-2.0
"""A check of what models are given."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_shape(model: str, name: str, value: Tensor | None, shape: Sequence[int | str]) -> None:
    """Does a tensor have this shape? Names stand for free sizes. None passes.

    Raises:
        ValueError: names the model, the argument, the shape expected and the one that came.
    """
    if value is None:
        return
    fits = value.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(want) for want in shape)
        raise ValueError(f"{model}: {name} must have shape [{wanted}], got {list(value.shape)}")
