# SPDX-License-Identifier: Apache-2.0
"""Training state on disk: written beside its final name and renamed, so that a kill leaves the previous one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch


def save(file: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically, with the state of torch's random numbers."""
    temporary = file.with_name(file.name + ".tmp")
    torch.save({**state, "torch_rng": torch.get_rng_state()}, temporary)
    with temporary.open("rb+") as handle:
        os.fsync(handle.fileno())
    temporary.replace(file)


def load(file: Path) -> dict[str, Any]:
    """Read a checkpoint and restore torch's random numbers.

    Raises:
        ValueError: the file is not a checkpoint of this trainer.
    """
    try:
        state = torch.load(file, weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint {file} cannot be read ({error}): remove it to start again") from error
    torch.set_rng_state(state.pop("torch_rng"))
    return state


def generator_state(rng: np.random.Generator) -> dict[str, Any]:
    """State of a PCG64 generator as plain numbers (strings for its 128-bit integers), safe to load anywhere."""
    state = rng.bit_generator.state
    return {**state, "state": {key: str(value) for key, value in state["state"].items()}}


def restore_generator(state: dict[str, Any]) -> np.random.Generator:
    rng = np.random.default_rng()
    rng.bit_generator.state = {**state, "state": {key: int(value) for key, value in state["state"].items()}}
    return rng
