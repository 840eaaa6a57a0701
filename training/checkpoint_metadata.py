# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says of its tensors, read as data: no code in it is run, and no name leads out of its folder.

torch.distributed.checkpoint keeps this in `.metadata`, a pickle, and reads it in such a way that a pickle made for the
purpose can run anything. Here every name in it stands for an empty record, made for this one reading, which takes what
the pickle gives it. The records are then looked over and made into torch's objects, or refused.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

FILE = ".metadata"
_DATA = re.compile(r"__\d+_\d+\.distcp")
_MOST = 2**48  # of an axis, and of bytes in a file
_KNOWN = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "PurePosixPath", "Path"),
    "pathlib._local": ("PosixPath",),
}


class CheckpointReader(dcp.FileSystemReader):
    """DCP's reader with the metadata read by `read_metadata` of this module."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def read_metadata(folder: Path) -> Metadata:
    """The tensors of a checkpoint and where they lie.

    Raises:
        ValueError: it holds anything other than what a checkpoint of ours does; no code in it was run.
        OSError: it cannot be read.
    """
    try:
        with (folder / FILE).open("rb") as stream:
            found = _Unpickler(stream).load()
        if _kind(found) != "Metadata":
            raise ValueError(f"expected Metadata, got {_kind(found)}")
        tensors = {_text(name): _tensor(entry) for name, entry in found.state_dict_metadata.items()}
        storage = {_index(key): _place(entry) for key, entry in found.storage_data.items()}
    except OSError:
        raise
    except (
        Exception
    ) as error:  # an unpickler raises whatever comes to its mind, and records lack what they were not given
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"{FILE} is not that of a checkpoint ({reason})") from error
    return Metadata(state_dict_metadata=dict(tensors), storage_data=storage)


class _Record:
    """Stands for an object of the class of the same name, which is never made."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self.given, self.state = (*given, *named.items()), None

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name == "Size":
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _KNOWN.get(module, ()):
            raise ValueError(f"it asks for {module}.{name}")
        return type(name, (_Record,), {})


def _kind(value: Any) -> str:
    return type(value).__name__


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a name, got {_kind(value)}")
    return value


def _sizes(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or not all(type(size) is int and 0 <= size < _MOST for size in value):
        raise ValueError(f"expected sizes, got {value!r:.60}")
    return torch.Size(value)


def _tensor(entry: Any) -> TensorStorageMetadata:
    if _kind(entry) != "TensorStorageMetadata":  # DCP unpickles whatever else there is
        raise ValueError(f"expected tensors alone, got {_kind(entry)}")
    dtype = entry.properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected a dtype, got {_kind(dtype)}")
    chunks = [ChunkStorageMetadata(_sizes(chunk.offsets), _sizes(chunk.sizes)) for chunk in entry.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), _sizes(entry.size), chunks)


def _index(key: Any) -> MetadataIndex:
    if key.index is not None and type(key.index) is not int:
        raise ValueError(f"expected a number, got {_kind(key.index)}")
    offset = None if key.offset is None else _sizes(key.offset)
    return MetadataIndex(_text(key.fqn), offset, key.index)


def _place(entry: Any) -> _StorageInfo:
    if not _DATA.fullmatch(_text(entry.relative_path)):
        raise ValueError(f"expected a file of the checkpoint, got {entry.relative_path!r:.80}")
    if getattr(entry, "transform_descriptors", None):
        raise ValueError("expected plain data, got transforms")
    offset, length = _sizes((entry.offset, entry.length))
    return _StorageInfo(entry.relative_path, offset, length)
