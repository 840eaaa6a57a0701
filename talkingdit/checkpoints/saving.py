# SPDX-License-Identifier: Apache-2.0
"""Tensors written as safetensors, as our other files are: whole or not at all, of the usual mode, through links.

The library alone makes private files, puts files in the place of links, and leaves a temporary file of the whole size
where its process is killed. Here it works in a folder that the next save to the same file removes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit.atomic import PART, part_folder, take

if TYPE_CHECKING:
    from torch import Tensor

# Behind the name of a model in the names of its files.
_WEIGHTS = re.compile(r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?$")


def save_tensors(
    tensors: Mapping[str, Tensor],
    target: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    prefix: str = PART,
    sync: bool = False,
) -> None:
    """Write tensors, from any device and of any layout, to a safetensors file.

    Args:
        tensors: by name; those that share memory are written apart.
        target: the file to make or replace; where it is a link, the file it points to.
        metadata: words in the header.
        prefix: of the temporary name, see `talkingdit.atomic`.
        sync: have it on the disk before it takes its name.

    Raises:
        OSError: the disk is full, or the file cannot be written; an older one stays, and nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain[name] = tensor.detach().cpu().contiguous()
        memory = plain[name].untyped_storage().data_ptr()
        if memory in seen or plain[name].untyped_storage().nbytes() != plain[name].nbytes:
            plain[name] = plain[name].clone()  # the library refuses tensors that share memory
        seen.add(plain[name].untyped_storage().data_ptr())
    with part_folder(target, prefix) as folder:
        file = folder / "tensors.safetensors"
        try:
            save_file(plain, file, None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise _as_os_error(error, target) from error
        take(file, target, sync)


def _as_os_error(error: Exception, target: str | os.PathLike[str]) -> OSError:
    """What a library written in Rust says, as Python says it."""
    found = re.search(r"os error (\d+)", str(error))
    if found is None:
        return OSError(str(error))
    number = int(found[1])
    return OSError(number, os.strerror(number), os.fspath(target))


def save_model(model: Any, folder: str | os.PathLike[str], **options: Any) -> None:
    """As `model.save_pretrained`, into a folder that may hold an earlier save and other files.

    The new files take the place of the old ones once all are written, links stay links, and weights of the earlier save
    that have no successor are removed. A model of several files is without its index meanwhile: a process that is
    killed there leaves one that does not load, not a mixture.

    Args:
        model: of diffusers or transformers, or one that is saved as these are.
        folder: made if it is not there.
        options: of `save_pretrained`.

    Raises:
        OSError: the disk is full, or a file cannot be written.
    """
    with saved_model(model, folder, **options):
        pass


@contextmanager
def saved_model(model: Any, folder: str | os.PathLike[str], **options: Any) -> Iterator[Path]:
    """As `save_model`; the block may change the new files before they are put in place.

    Yields:
        The folder where they are until then.
    """
    from safetensors import SafetensorError

    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    with part_folder(root / "model") as private:
        new = private / "new"
        try:
            model.save_pretrained(new, **options)
        except SafetensorError as error:
            raise _as_os_error(error, root) from error
        yield new
        _put_in_place(new, root)


def _put_in_place(new: Path, root: Path) -> None:
    files = sorted((path for path in new.iterdir() if path.is_file()), key=lambda path: path.suffix == ".json")
    stems = {_WEIGHTS.sub("", path.name) for path in files if _WEIGHTS.search(path.name)}
    old = [path for path in root.iterdir() if _WEIGHTS.search(path.name) and _WEIGHTS.sub("", path.name) in stems]
    for path in old:
        if path.name.endswith(".index.json"):
            path.unlink()
    names = {path.name for path in files}
    for path in files:
        take(path, root / path.name)
    for path in old:
        if path.name not in names:
            path.unlink(missing_ok=True)
