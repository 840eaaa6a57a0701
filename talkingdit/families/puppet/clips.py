# SPDX-License-Identifier: Apache-2.0
"""Drawn characters are trained on videos that training draws itself: see `drawn.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from talkingdit.data.encoding import encode_clip
from talkingdit.errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = ["encode_clip", "encoders"]


def encoders(
    folder: Path,
    what: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    fps: int | None = None,
) -> NoReturn:
    """There are none for videos of a manifest.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"{folder}: a model of drawn characters is trained on videos that `training.train` draws itself; name the "
        "checkpoint of a model that is trained on videos of a manifest."
    )
