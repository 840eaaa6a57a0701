# SPDX-License-Identifier: Apache-2.0
"""What tests of the Python API share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16000


@dataclass(frozen=True)
class World:
    """What tests share, in memory and as files: face.png, voice.wav, style.safetensors."""

    folder: Path
    checkpoint: Path
    face: np.ndarray
    voice: np.ndarray

    @property
    def given(self) -> dict[str, Any]:
        """Arguments of a call."""
        return {"image": self.face, "audio": (self.voice, RATE), "prompt": "a person"}
