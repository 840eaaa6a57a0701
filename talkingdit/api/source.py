# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint is: a folder here, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from talkingdit.errors import UserError
from talkingdit.models import default_checkpoint, find_checkpoint

NAME = re.compile(r"[\w.-]+/[\w.-]+")  # of a repository, "owner/name"


def find_folder(source: str | PathLike[str] | None, download: Mapping[str, Any] | None = None) -> Path:
    """The folder of a checkpoint.

    Args:
        source: a folder, the name of a model that ships, or a name on the hub, from where it is fetched; None is the
            default.
        download: arguments of `huggingface_hub.snapshot_download`, for a name.

    Raises:
        UserError: neither.
    """
    download = dict(download or {})
    if source is None:
        _refuse(download, "the model that ships")
        return default_checkpoint()
    if not isinstance(source, str | PathLike):
        raise UserError(f"from_pretrained: expected a folder or a name, got {type(source).__name__}.")
    folder = find_checkpoint(Path(source))
    if folder.is_dir():
        _refuse(download, "a folder")
        return folder
    if isinstance(source, str) and NAME.fullmatch(source) and not folder.exists():
        return _fetched(source, download)
    raise UserError(f"{source}: expected a folder, or a name on the Hugging Face hub, owner/name; got neither.")


def _refuse(download: Mapping[str, Any], what: str) -> None:
    if download:
        raise UserError(f"from_pretrained: {next(iter(download))!r} is unknown, or has no effect with {what}.")


def _fetched(name: str, download: Mapping[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, **download))
    except TypeError as error:
        raise UserError(f"from_pretrained: {error}.") from error
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"{name}: neither a folder here nor a checkpoint that the Hugging Face hub gives ({reason})."
        ) from error
