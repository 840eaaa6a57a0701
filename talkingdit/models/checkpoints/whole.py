# SPDX-License-Identifier: Apache-2.0
"""Whole checkpoints of every layout."""

from __future__ import annotations

from pathlib import Path

import torch

from talkingdit.errors import UserError
from talkingdit.models.checkpoints.puppet import Checkpoint, default_checkpoint, load_puppet
from talkingdit.models.checkpoints.s2v import S2VCheckpoint, is_s2v, load_s2v


def load_checkpoint(
    folder: str | Path | None = None, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Checkpoint | S2VCheckpoint:
    """A whole checkpoint; None is the one that ships with the package.

    Args:
        folder: a released Wan2.2-S2V folder (see `talkingdit.models.checkpoints.s2v`), or one of the layout that
            training writes: transformer/, vae/, text_encoder/ and pipeline.json.
        dtype: of the large models; None is float32. Small ones stay float32, see `load_s2v` and `load_puppet`.
        device: where the models go.

    Returns:
        What the folder holds: `S2VCheckpoint` for a released one.

    Raises:
        UserError: something is missing, does not load, or the parts do not fit each other.
    """
    root = default_checkpoint() if folder is None else Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: the checkpoint must be a folder, and there is none of this name.")
    dtype = torch.float32 if dtype is None else dtype
    return load_s2v(root, dtype, device) if is_s2v(root) else load_puppet(root, dtype, device)
