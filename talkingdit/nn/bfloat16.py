# SPDX-License-Identifier: Apache-2.0
"""Where bfloat16 is worth computing in.

A processor without instructions for it has to widen every number: torch 2.13's products are seven to ten times slower
there than in float32, and whole training steps follow (`bench/results/cpu-avx2-puppet_steps.json`).
"""

from __future__ import annotations

from functools import cache

import torch

from talkingdit._native_loader import build_info


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster on this device than those of float32."""
    return device.type == "cuda" or (device.type == "cpu" and _instructions() == "avx512_bf16")


@cache
def _instructions() -> str:
    return str(build_info()["cpu_isa"])


def report() -> dict[str, str]:
    """What `talkingdit info` says of the processor."""
    if multiplies_bfloat16(torch.device("cpu")):
        return {"bfloat16 on the CPU": "multiplied; training computes in it"}
    return {"bfloat16 on the CPU": "no instructions, several times slower than float32; training computes in float32"}


def bfloat16_products() -> torch.autocast:
    """A context in which processors multiply in bfloat16, if they do so themselves; else nothing changes."""
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16(torch.device("cpu")))
