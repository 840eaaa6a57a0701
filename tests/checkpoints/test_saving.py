# SPDX-License-Identifier: Apache-2.0
"""Files of safetensors have the usual mode, keep links, and leave nothing behind, also after a kill."""

from __future__ import annotations

import errno
import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from forked import run
from safetensors import safe_open
from safetensors.torch import load_file

from talkingdit.checkpoints.saving import save_tensors


def killed_save(target: Path, when: str) -> None:
    """Killed when the library has written its temporary file and is about to rename it, and when we are."""
    really = safetensors.torch.save_file

    def killed(tensors: dict[str, torch.Tensor], path: Path, *more: Any, **named: Any) -> None:
        if when == "after":
            really(tensors, path, *more, **named)
        else:
            Path(path).with_name(".tmpAbCdEf").write_bytes(b"x" * 5000)
        os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = killed
    save_tensors({"a": torch.ones(1000)}, target)


def test_a_file_has_the_mode_of_any_new_file_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link.safetensors").symlink_to("far/real.safetensors")
    before = os.umask(0o027)
    try:
        save_tensors({"a": torch.ones(3)}, tmp_path / "link.safetensors", {"of": "anna"})
    finally:
        os.umask(before)
    real = tmp_path / "far" / "real.safetensors"
    assert (tmp_path / "link.safetensors").is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert os.listdir(tmp_path / "far") == ["real.safetensors"]
    with safe_open(real, "pt") as file:
        assert file.metadata() == {"of": "anna"}


def test_tensors_of_every_layout_are_written_as_they_are(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"turned": whole.T, "part": whole[1:3], "same": whole, "twice": whole, "grad": whole.requires_grad_()}
    save_tensors(tensors, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.detach())
    assert (tmp_path / "a.safetensors").stat().st_size < 4 * 24 * 5 + 1000  # a part takes the room of a part


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_killed_save_leaves_is_removed_by_the_next(tmp_path: Path, when: str) -> None:
    target = tmp_path / "a.safetensors"
    save_tensors({"a": torch.zeros(1)}, target)
    assert run(killed_save, target, when) == -signal.SIGKILL
    assert torch.equal(load_file(target)["a"], torch.zeros(1))
    assert len(os.listdir(tmp_path)) == 2
    save_tensors({"a": torch.full((1,), 2.0)}, tmp_path / "other.safetensors")  # not whose it is
    assert len(os.listdir(tmp_path)) == 3
    save_tensors({"a": torch.full((1,), 2.0)}, target)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "other.safetensors"]
    assert torch.equal(load_file(target)["a"], torch.full((1,), 2.0))


def test_trouble_with_the_disk_is_an_os_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        save_tensors({"a": torch.ones(1)}, tmp_path / "none" / "a.safetensors")
    from safetensors import SafetensorError

    def full(*arguments: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_tensors({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_model_takes_the_place_of_an_earlier_one_through_links(tmp_path: Path) -> None:
    from diffusers import UNet1DModel

    from talkingdit.checkpoints.saving import save_model

    sizes = {"sample_size": 16, "block_out_channels": (8, 8, 8), "norm_num_groups": 4}
    model = UNet1DModel(**sizes)
    folder, stem = tmp_path / "model", "diffusion_pytorch_model"
    save_model(model, folder, max_shard_size="20KB")
    shards = [name for name in names(folder) if "-of-" in name]
    assert len(shards) > 1
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "far.json").write_text("{}")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "far.json")
    before = os.umask(0o022)
    try:
        save_model(model, folder)
    finally:
        os.umask(before)
    assert names(folder) == ["config.json", f"{stem}.safetensors", "notes.txt"]
    assert stat.S_IMODE((folder / f"{stem}.safetensors").stat().st_mode) == 0o644
    assert (folder / "config.json").is_symlink()
    assert "UNet1DModel" in (tmp_path / "far.json").read_text()
    found = UNet1DModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
