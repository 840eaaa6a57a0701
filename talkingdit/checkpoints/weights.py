# SPDX-License-Identifier: Apache-2.0
"""Weight files as one table of named tensors, read one tensor at a time.

A table is made from headers alone, so that names and shapes are checked before anything large is read, and tensors go
through host memory one by one, whatever the size of the checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from talkingdit.checkpoints import gguf
from talkingdit.checkpoints.bounds import MOST_JSON, check_bounds
from talkingdit.errors import UserError

SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors$")
PICKLED = (".pth", ".pt", ".bin", ".ckpt")
MOST_SHARDS = 10_000  # no checkpoint has more files
# How safetensors headers spell dtypes.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies and what it looks like."""

    file: Path
    key: str  # its name in the file
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: Tensor | None = None  # the stored values are to be multiplied by this (8-bit weights)


@dataclass(frozen=True)
class Weights:
    """Named tensors in one or several files.

    Args:
        source: what messages call them: a folder or a file.
        entries: the tensors by name, file by file.
        metadata: text that was stored beside the tensors (of the first file that has any).
    """

    source: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def renamed(self, rename: Callable[[str], str | None]) -> Weights:
        """The same tensors under other names; those for which `rename` gives None are left out.

        Raises:
            UserError: two tensors would get one name.
        """
        entries: dict[str, TensorEntry] = {}
        for name, entry in self.entries.items():
            new = rename(name)
            if new is None:
                continue
            if new in entries:
                raise UserError(f"{self.source}: {name} and {entries[new].key} are the same weight, {new}.")
            entries[new] = entry
        return replace(self, entries=entries)

    def stream(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, file by file, in the stored dtype (8-bit weights with a scale: float32).

        A tensor on the CPU may lie in a mapped file, whose file must not change while the tensor lives.

        Raises:
            UserError: a file is damaged, or the device has no room for it.
        """
        by_file: dict[Path, list[tuple[str, TensorEntry]]] = {}
        for name, entry in self.entries.items():
            by_file.setdefault(entry.file, []).append((name, entry))
        for file, entries in by_file.items():
            with ExitStack() as stack:
                read = _reader(file, str(device), stack)
                for name, entry in entries:
                    try:
                        tensor = read(entry.key)
                    except (SafetensorError, RuntimeError, OSError, AssertionError) as error:
                        raise _unread(file, error, str(device)) from error
                    if entry.scale is not None:
                        tensor = _scaled(tensor, entry.scale)
                    yield name, tensor

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of some small tensors, on the CPU."""
        chosen = replace(self, entries={name: self.entries[name] for name in names})
        return {name: tensor.clone() for name, tensor in chosen.stream()}


def _scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    """Stored 8-bit values times their scale: one number, or one per row."""
    scale = scale.to(device=tensor.device, dtype=torch.float32)
    if scale.numel() > 1:
        scale = scale.reshape(-1, *[1] * (tensor.dim() - 1))
    return tensor.to(torch.float32) * scale


def _reader(file: Path, device: str, stack: ExitStack) -> Callable[[str], Tensor]:
    if file.suffix == gguf.SUFFIX:
        return gguf.opener(file, device)
    if file.suffix != ".safetensors":
        state = load_pickled(file)
        return lambda key: state[key].to(device)
    try:
        opened = stack.enter_context(safe_open(file, framework="pt", device=device))
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    return opened.get_tensor


def _unread(file: Path, error: Exception, device: str) -> UserError:
    """What is wrong where a tensor does not come to a device: a file that is good must not be downloaded again."""
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            f"{file}: {device} has not enough memory for these weights; `talkingdit plan` says what makes them fit."
        )
    # Without CUDA, torch asserts that it is there.
    if isinstance(error, RuntimeError | AssertionError) and torch.device(device).type != "cpu":
        reason = " ".join(str(error).split())
        return UserError(f"{file}: its weights cannot be brought to {device} ({reason[:160]}).")
    return _damaged(file, error)


def _damaged(file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{file}: damaged or cut off ({reason[:160]}); copy or download this file again.")


def load_pickled(file: Path) -> dict[str, Tensor]:
    """The state dict in a .pth or .bin file, mapped rather than read where the file allows it; no code in it is run.

    Raises:
        UserError: the file is damaged, or holds something other than named tensors.
    """
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            state = torch.load(file, mmap=True, **options)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state = torch.load(file, **options)  # a file in the format of before 2020, which cannot be mapped
    except FileNotFoundError as error:
        raise UserError(f"{file}: there is no such file; the checkpoint is not complete.") from error
    except Exception as error:  # the unpickler raises whatever comes to its mind on damaged files
        raise _damaged(file, error) from error
    for wrapping in ("state_dict", "module"):  # of training programs: Lightning's, DeepSpeed's
        if isinstance(state, dict) and isinstance(state.get(wrapping), dict):
            state = state[wrapping]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: must hold a dictionary of named tensors.")
    return state


def open_weights(source: Path, stem: str = "diffusion_pytorch_model") -> Weights:
    """The weights in a file (.safetensors, .gguf, .pth, .pt, .bin) or in a folder.

    Args:
        source: a folder is searched for `<stem>.safetensors.index.json` and its shards, then for any *.safetensors,
            then for one *.gguf.
        stem: how weight files are called in folders of this kind.

    Raises:
        UserError: no weights, a shard that is missing or damaged; the message names it.
    """
    if not source.is_dir():
        return _table(source, [source])
    index = source / f"{stem}.safetensors.index.json"
    if index.is_file():
        return _indexed(source, index)
    files = sorted(source.glob("*.safetensors"))
    if not files and (quantised := sorted(source.glob(f"*{gguf.SUFFIX}"))):
        if len(quantised) > 1:
            names = some([file.name for file in quantised])
            raise UserError(f"{source}: {names} could each be meant; leave one in the folder.")
        files = quantised
    if not files:
        raise UserError(f"{source}: no *.safetensors in it; the checkpoint is not complete.")
    _check_all_shards(source, files)
    return _table(source, files)


def _indexed(folder: Path, index: Path) -> Weights:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index}: must have a weight_map of tensor names to files.")
    names = sorted({_inside(name, index) for name in listed.values()})
    gone = [name for name in names if not (folder / name).is_file()]
    if gone:
        raise UserError(
            f"{folder}: {some(gone)} {'is' if len(gone) == 1 else 'are'} missing of the {len(names)} files that "
            f"{index.name} lists; the checkpoint is not complete."
        )
    weights = _table(folder, [folder / name for name in names])
    lost = sorted(set(listed) - set(weights.entries))
    if lost:
        raise UserError(f"{folder / listed[lost[0]]}: lacks {some(lost)}, which {index.name} places there.")
    return weights


def check_index(folder: Path) -> None:
    """Do the indices in a folder name files of that folder alone? For libraries that read them without asking.

    Raises:
        UserError: one does not.
    """
    for index in sorted(folder.glob("*.index.json")):
        listed = read_json(index).get("weight_map")
        for name in {str(name) for name in listed.values()} if isinstance(listed, dict) else ():
            _inside(name, index, (".safetensors", ".bin"))


def _inside(name: Any, index: Path, endings: tuple[str, ...] = (".safetensors",)) -> str:
    """The name of a file that an index gives, which must be one of its own folder: a folder may come from anyone.

    By its name alone: caches of downloads have links in place of files.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) and "\0" not in name and "\\" not in name else ()
    if not parts or parts[0] == "/" or ".." in parts or not name.endswith(endings):
        raise UserError(f"{index}: expected names of *{endings[0]} files in this folder, got {name!r:.120}.")
    return name


def _check_all_shards(folder: Path, files: list[Path]) -> None:
    """Are shards that count themselves (-00001-of-00003) all there?"""
    for match in filter(None, (SHARD.match(file.name) for file in files)):
        stem, digits, count = match[1], len(match[2]), match[3]
        if int(count) > MOST_SHARDS:
            raise UserError(f"{folder}: {match[0]} counts {count} files, more than any checkpoint has ({MOST_SHARDS}).")
        wanted = [f"{stem}-{i:0{digits}d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
        gone = [name for name in wanted if not (folder / name).is_file()]
        if gone:
            raise UserError(f"{folder}: {some(gone)} {'is' if len(gone) == 1 else 'are'} missing.")


def _table(source: Path, files: list[Path]) -> Weights:
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if file.exists() and not file.is_file():
            raise UserError(f"{file}: expected a file of weights, got a pipe or a device.")
        if file.suffix not in (".safetensors", gguf.SUFFIX, *PICKLED):
            kinds = ", ".join((".safetensors", gguf.SUFFIX, *PICKLED))
            raise UserError(f"{file}: expected a file of weights ({kinds}), got one of another name.")
        if file.suffix == ".safetensors":
            found, text = _header(file)
        elif file.suffix == gguf.SUFFIX:
            tensors, text = gguf.table(file)
            found = {name: TensorEntry(file, name, shape, dtype) for name, (shape, dtype) in tensors.items()}
        else:
            state = load_pickled(file)
            found, text = {k: TensorEntry(file, k, tuple(v.shape), v.dtype) for k, v in state.items()}, {}
        twice = sorted(set(found) & set(entries))
        if twice:
            raise UserError(f"{source}: {some(twice)} is in both {entries[twice[0]].file.name} and {file.name}.")
        entries |= found
        metadata = metadata or text
    return Weights(source, entries, metadata)


def _header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Table and metadata of a safetensors file, whose header also tells how long the file must be."""
    try:
        with safe_open(file, framework="pt") as opened:
            text = dict(opened.metadata() or {})
            entries = {}
            for key in opened.keys():  # noqa: SIM118 (not a dictionary)
                part = opened.get_slice(key)
                name = part.get_dtype()
                if name not in DTYPES:
                    raise UserError(f"{file}: {key} has dtype {name}, which is not supported.")
                entries[key] = TensorEntry(file, key, tuple(part.get_shape()), DTYPES[name])
    except FileNotFoundError as error:
        raise UserError(f"{file}: there is no such file; the checkpoint is not complete.") from error
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    return entries, text


def stored_config(weights: Weights) -> dict[str, Any]:
    """The configuration in the metadata of a single file, empty where there is none."""
    text = weights.metadata.get("config")
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{weights.source}: the configuration in its metadata is not JSON ({error}).") from error
    # Some programs wrap it in the name of the part.
    inner = values.get("transformer", values) if isinstance(values, dict) else None
    if not isinstance(inner, dict):
        raise UserError(f"{weights.source}: the configuration in its metadata must be a JSON object.")
    return inner


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: no such file, not JSON, not an object.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: expected a JSON file, got a folder, a pipe or a device.")
        if (size := path.stat().st_size) > MOST_JSON:
            raise UserError(f"{path}: expected at most {MOST_JSON >> 20} MB, got {size >> 20} MB.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; the checkpoint is not complete.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}).") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object, got {type(values).__name__}.")
    return values


def read_bounded(path: Path) -> dict[str, Any]:
    """The object in a JSON file that says what is built and how it is used.

    Raises:
        UserError: as `read_json`, or a setting is out of bounds.
    """
    values = read_json(path)
    check_bounds(values, path)
    return values


def some(names: list[str], shown: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
