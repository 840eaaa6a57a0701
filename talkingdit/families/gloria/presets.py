# SPDX-License-Identifier: Apache-2.0
"""Configurations of Gloria by name.

The paper names the sizes "5B" and "17B"; numbers of blocks and widths are not in our copy. The large one is
Wan2.1-I2V-14B (which has 16.4 billion parameters) with audio in every other block: 17.6 billion. The small one has the
trunk of Wan2.2-TI2V-5B with this family's conditions: 5.9 billion.
"""

from __future__ import annotations

from typing import Any

from talkingdit.families.gloria.anchors import OFFSETS, STEP
from talkingdit.families.wan_i2v.presets import PRESETS as WAN

CLASSES = ("GloriaModel",)


def _hearing(layers: int) -> dict[str, Any]:
    """What is added to a Wan I2V model of so many blocks."""
    return {
        "audio_inject_layers": tuple(range(0, layers, 2)),  # section 5: "half of the blocks contain audio branch"
        "audio_dim": 1024,
        "audio_layers": 25,
        "audio_width": 768,
        "anchor_offsets": dict(OFFSETS),
        "anchor_step": STEP,
    }


_5B = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30}

PRESETS: dict[str, dict[str, Any]] = {
    "gloria_17b": {**WAN["wan_i2v_14b_480p"], **_hearing(40)},
    "gloria_5b": {**WAN["wan_i2v_14b_480p"], **_5B, **_hearing(30)},
    "gloria_tiny": {**WAN["wan_i2v_tiny"], **_hearing(4), "audio_dim": 64, "audio_layers": 3, "audio_width": 48},
}
