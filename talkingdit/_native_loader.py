# SPDX-License-Identifier: Apache-2.0
"""Loads the native module, or says in one sentence why that is impossible. There is no slow path behind it."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch  # before the native module, which uses torch's thread pool


def load() -> ModuleType:
    """The module ``talkingdit._native``.

    Raises:
        ImportError: the module is missing, does not load, or this torch cannot lend tensors to it.
    """
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        raise ImportError(
            f"talkingdit needs torch >= 2.10, got torch {torch.__version__}: upgrade with `pip install -U torch`."
        )
    try:
        return importlib.import_module("talkingdit._native")
    except ModuleNotFoundError as error:
        raise ImportError(
            "talkingdit's native module (talkingdit/_native) is not built for this Python: run `pip install .` in the "
            "repository, or build it in place as docs/native.md says."
        ) from error
    except ImportError as error:
        raise ImportError(f"talkingdit's native module does not load ({error}): reinstall talkingdit.") from error


native = load()


def build_info() -> dict[str, Any]:
    """What was built and what was found.

    Keys: ``version``, ``torch``, ``cpu_isa`` (in use), ``cpu_isa_built``, ``cuda`` (kernels built), ``cuda_archs``,
    ``cuda_toolkit``, ``compiler``, ``threads``, ``threading`` ("openmp": torch's own pool, or "std::thread"),
    ``gpu`` (name of the device torch sees, or None) and ``native`` (path of the module).
    """
    from talkingdit import __version__

    info: dict[str, Any] = {"version": __version__, "torch": torch.__version__}
    info.update(native.build_info())
    info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    info["native"] = native.__file__
    return info
