# SPDX-License-Identifier: Apache-2.0
"""A ComfyUI with the pack, and something in its input folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from contract import PACK, ComfyUI, fill


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    host = ComfyUI(tmp_path_factory.mktemp("comfy") / "comfyui")
    fill(host.root / "input")
    (host.root / "models" / "loras").mkdir()
    known = dict(sys.modules)
    sys.modules.update(host.modules())
    host.load_pack()
    yield host
    for name in set(sys.modules) - set(known):
        if name.startswith(("comfy", "folder_paths")) or "integrations/comfyui" in name:
            del sys.modules[name]


@pytest.fixture(scope="module")
def pack(comfy: ComfyUI) -> Callable[[str], ModuleType]:
    """A module of the pack by its name."""
    return lambda name: sys.modules[f"{str(PACK).replace('.', '_x_')}.{name}"]
