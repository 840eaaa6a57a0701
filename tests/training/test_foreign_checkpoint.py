# SPDX-License-Identifier: Apache-2.0
"""A training folder may come from anyone: nothing in it is run, no name leads out of it, and what is wrong is told.

What would be harm makes an empty file here.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from talkingdit.errors import UserError
from training import export
from training.checkpoint import Checkpoints, newest_complete
from training.checkpoint_metadata import read_metadata
from training.config import Config, write_json
from training.guard import Guard
from training.model_state import ModelState

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Harm:
    """Unpickling it in the usual way makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.file),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with a checkpoint; returns the checkpoint's folder."""
    config = lambda file: write_json(Config(), file)  # noqa: E731
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", asynchronous=False, config=config)
    checkpoints.save(1, {"networks": ModelState(nn.Linear(3, 3)), "guard": Guard().state_dict()})
    return tmp_path / "run" / "checkpoints" / "step-00000001"


def replace(folder: Path, name: str, data: bytes) -> None:
    """A file of the checkpoint, with a list of files that fits."""
    (folder / name).write_bytes(data)
    listed = json.loads((folder / "files.json").read_text())
    listed["files"][name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (folder / "files.json").write_text(json.dumps(listed))


def metadata_of(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def load(folder: Path) -> int | None:
    state = {"networks": ModelState(nn.Linear(3, 3)), "guard": None}
    return Checkpoints(folder.parent, read_only=True).load(state)


def saved(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def test_what_is_read_is_what_torch_reads(folder: Path) -> None:
    ours, theirs = read_metadata(folder), dcp.FileSystemReader(folder).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert load(folder) == 1


@pytest.mark.parametrize("where", ["whole", "planner_data", "a size", "a name"])
def test_code_in_the_metadata_is_not_run(folder: Path, tmp_path: Path, where: str) -> None:
    harm, metadata = Harm(tmp_path / "harm"), metadata_of(folder)
    if where == "planner_data":
        metadata.planner_data = harm
    elif where == "a size":
        metadata.state_dict_metadata["networks/bias"].size = harm
    elif where == "a name":
        metadata.state_dict_metadata[harm] = metadata.state_dict_metadata["networks/bias"]
    replace(folder, ".metadata", pickle.dumps(harm if where == "whole" else metadata))
    with pytest.raises(
        UserError, match=r"step-00000001: \.metadata is not that of a checkpoint \(it asks for posix.mkn"
    ):
        load(folder)
    with pytest.raises(UserError, match=r"it asks for posix.mknod"):
        read_as_export_does(folder)
    assert not (tmp_path / "harm").exists()
    with contextlib.suppress(Exception):
        dcp.FileSystemReader(folder).read_metadata()
    assert (tmp_path / "harm").exists()  # as torch's own reader does: the stand-in is one


def read_as_export_does(folder: Path) -> None:
    reader = Checkpoints(folder.parent, keep=0, read_only=True)
    reader.load({"networks": ModelState(nn.Linear(3, 3))}, partly=True)


def test_code_in_what_is_not_a_tensor_is_not_run(folder: Path, tmp_path: Path) -> None:
    replace(folder, "state.pt", saved({"step": 1, "state": {"guard": Harm(tmp_path / "harm")}, "random": []}))
    for read in (load, lambda folder: Checkpoints(folder.parent, read_only=True).peek()):
        with pytest.raises(UserError, match=r"state.pt is not that of a run"):
            read(folder)
    assert not (tmp_path / "harm").exists()


def test_code_in_a_tensor_is_not_run(folder: Path, tmp_path: Path) -> None:
    """Of each, as long as the tensor's file was; also where the metadata says that it is no tensor at all."""
    data = saved(Harm(tmp_path / "harm"))
    metadata = metadata_of(folder)
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(data)
    replace(folder, "__0_0.distcp", data)
    replace(folder, ".metadata", pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"cannot be read by rank 0: "):
        load(folder)
    metadata.state_dict_metadata = dict.fromkeys(metadata.state_dict_metadata, BytesStorageMetadata())
    replace(folder, ".metadata", pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"expected tensors alone, got BytesStorageMetadata"):
        load(folder)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("path", ["../step-00000000/__0_0.distcp", "/etc/passwd", "sub/__0_0.distcp", ".metadata"])
def test_no_tensor_lies_outside(folder: Path, path: str) -> None:
    metadata = metadata_of(folder)
    metadata.storage_data = {key: _StorageInfo(path, 0, 1) for key in metadata.storage_data}
    replace(folder, ".metadata", pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"expected a file of the checkpoint, got"):
        load(folder)


@pytest.mark.parametrize(
    "metadata",
    [
        Metadata({"a": None}, storage_data={}),
        Metadata({}, storage_data=None),
        Metadata({}, storage_data={MetadataIndex("a"): None}),
        {"not": "metadata"},
        MetadataIndex("a"),
        [],
    ],
)
def test_metadata_of_something_else_is_told(folder: Path, metadata: Any) -> None:
    replace(folder, ".metadata", pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"\.metadata is not that of a checkpoint|is of another model or stage"):
        load(folder)


def test_sizes_of_no_tensor_are_told(folder: Path) -> None:
    for size in ((3, -1), (2**60,), (1.5,), (True,)):
        metadata = metadata_of(folder)
        metadata.state_dict_metadata["networks/bias"].size = size
        replace(folder, ".metadata", pickle.dumps(metadata))
        with pytest.raises(UserError, match="expected sizes, got"):
            load(folder)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "sub/file", "..", ""])
def test_the_list_of_files_names_none_outside(folder: Path, name: str) -> None:
    listed = json.loads((folder / "files.json").read_text())
    listed["files"][name] = {"bytes": 1, "crc32": 1}
    (folder / "files.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"which is no file of the checkpoint|is not a file"):
        load(folder)


def test_something_that_never_ends_is_not_read(folder: Path) -> None:
    (folder / "state.pt").unlink()
    os.mkfifo(folder / "state.pt")
    with pytest.raises(UserError, match=r"state.pt is not a file"):
        load(folder)
    (folder / "state.pt").unlink()
    (folder / "state.pt").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"state.pt is not a file"):
        Checkpoints(folder.parent, read_only=True).peek()


@pytest.mark.parametrize("content", [[], {"step": 1}, {"step": "1", "state": {}, "random": []}, 5])
def test_states_of_something_else_are_told(folder: Path, content: Any) -> None:
    replace(folder, "state.pt", saved(content))
    with pytest.raises(UserError, match=r"state.pt is not that of a run"):
        load(folder)


@pytest.mark.parametrize("files", ["[" * 100_000, "{}", '{"files": 3}', "\x00"])
def test_a_list_of_files_that_is_none_is_told(folder: Path, files: str) -> None:
    (folder / "files.json").write_text(files)
    with pytest.raises(UserError, match=r"files.json cannot be read"):
        load(folder)


def test_random_states_of_something_else_are_told(folder: Path) -> None:
    content = torch.load(folder / "state.pt", weights_only=True)
    for random in ([{}], [{"python": (3, [1, 2], None), "torch": torch.zeros(3)}], ["x"]):
        replace(folder, "state.pt", saved({**content, "random": random}))
        with pytest.raises(UserError, match=r"what it holds as 'random' is not that of a run"):
            load(folder)


@pytest.mark.parametrize(
    "state", [{}, {"norms": ["x"], "spikes": 0}, {"norms": [], "spikes": -1, "not_finite": 0, "in_a_row": 0}]
)
def test_a_guard_takes_over_nothing_else(state: dict[str, Any]) -> None:
    with pytest.raises((KeyError, ValueError)):
        Guard().load_state_dict(state)


def exported(run: Path, **changes: Any) -> None:
    """Export a run whose configuration was changed."""
    file = newest_complete(run / "checkpoints") / "config.json"
    values = json.loads(file.read_text())
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values[section][key] = value
    replace(file.parent, "config.json", json.dumps(values).encode())
    export.main(export.ExportFlags(run, run.parent / "model"))


def test_a_configuration_of_other_or_impossible_networks_is_told_before_there_is_memory_for_them(
    folder: Path, tmp_path: Path
) -> None:
    for settings, said in (
        ({"num_layers": 10**9}, "config.json: model.settings.num_layers must be at most 1000, got 1000000000"),
        ({"dim": 48 << 16, "ffn_dim": 1 << 22}, "is of another model or stage: it lacks networks/"),
        ({"dim": 7}, "does not make a model"),
    ):
        with pytest.raises(UserError, match=said):
            exported(folder.parents[1], model__settings=settings)
    with pytest.raises(UserError, match="unknown key"):
        exported(folder.parents[1], model__settings={}, model__nonsense=1)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        export.main(export.ExportFlags(folder.parents[1], tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_what_a_killed_save_left_is_not_exported(folder: Path, tmp_path: Path) -> None:
    folder.rename(folder.with_name("step-00000002.tmp"))
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        export.main(export.ExportFlags(folder.parents[1], tmp_path / "model"))
