# SPDX-License-Identifier: Apache-2.0
"""Talking-character video from audio: hand-written kernels, models, pipelines.

Importing this package is cheap: torch and the native module are loaded on first use of a submodule.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from talkingdit._native_loader import build_info
    from talkingdit.api import FrameSpan, TalkingOutput, TalkingPipeline, generate
    from talkingdit.nn.accelerate import accelerate, restore

_LAZY = {
    "FrameSpan": "talkingdit.api",
    "TalkingOutput": "talkingdit.api",
    "TalkingPipeline": "talkingdit.api",
    "accelerate": "talkingdit.nn.accelerate",
    "build_info": "talkingdit._native_loader",
    "generate": "talkingdit.api",
    "restore": "talkingdit.nn.accelerate",
}
_SUBMODULES = ("data", "families", "media", "models", "nn", "ops", "pipelines", "plan", "puppets")

__all__ = [
    "FrameSpan",
    "TalkingOutput",
    "TalkingPipeline",
    "__version__",
    "accelerate",
    "build_info",
    "generate",
    "restore",
    *_SUBMODULES,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"talkingdit.{name}")
    raise AttributeError(f"module 'talkingdit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
