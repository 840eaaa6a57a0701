# SPDX-License-Identifier: Apache-2.0
"""What is said where a file is good and the device that its tensors are for is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from talkingdit.checkpoints import weights
from talkingdit.errors import UserError

NOT_THERE = "cuda:99"


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_device_that_is_not_there_is_no_damaged_file(tmp_path: Path, name: str) -> None:
    """Nobody is to download a checkpoint again for it."""
    file = tmp_path / name
    state = {"weight": torch.ones(4)}
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    with pytest.raises(UserError, match=r"model.* its weights cannot be brought to cuda:99") as caught:
        list(weights.open_weights(file).stream(NOT_THERE))
    assert "damaged" not in str(caught.value)


def test_a_device_that_is_too_small_is_no_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        def read(key: str) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 50.00 MiB.")

        return read

    save_file({"weight": torch.ones(4)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(weights, "_reader", full)
    with pytest.raises(UserError, match="cuda has not enough memory for these weights; `talkingdit plan`"):
        list(weights.open_weights(tmp_path / "model.safetensors").stream("cuda"))
