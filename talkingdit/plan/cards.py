# SPDX-License-Identifier: Apache-2.0
"""What is known, or assumed, of cards and machines: memory, speed, and what programs lose of either."""

from __future__ import annotations

from talkingdit.errors import UserError

GB = 1e9
GIB = 2**30

# Memory in GiB, and dense bfloat16 TFLOP/s as the makers state them.
CARDS: dict[str, tuple[float, float]] = {
    "rtx3090": (24, 71),
    "rtx4090": (24, 165),
    "rtx5090": (32, 210),
    "l40s": (48, 362),
    "a100-40": (40, 312),
    "a100-80": (80, 312),
    "h100": (80, 989),
    "h200": (141, 989),
}
EFFICIENCY = 0.5  # of the stated speed that large products and attention reach
EIGHT_BIT_SPEED = 2.0  # of products in eight bits, by that of bfloat16, as the makers state it
HOST_TO_DEVICE = 20e9  # bytes per second over PCIe 4, pinned
HOST_MEMORY = 200e9  # bytes per second of a machine's memory, for optimisers that work there
CONTEXT = 0.8 * GIB  # driver context, library workspaces
SLACK = 1.04  # what the allocator loses to rounding and fragmentation
# Buffers of one NCCL communicator. NCCL 2.28 alone allocates 512 MiB of peer-to-peer buffers for each (its issue 2363);
# channels, protocols and NVLink SHARP move it between 0.1 and 1.6 GB.
COMMUNICATOR = 0.5 * GIB


def needed(peak: float) -> float:
    """Bytes that a card should have: the peak, the allocator's losses and the driver's context."""
    return SLACK * peak + CONTEXT


def card_of(text: str) -> tuple[float, float | None]:
    """Bytes and TFLOP/s of a card by name, or bytes of a size such as 24GB.

    Raises:
        UserError: neither.
    """
    key = text.lower().replace(" ", "")
    if key in CARDS:
        memory, speed = CARDS[key]
        return memory * GIB, speed
    number = key.removesuffix("ib").removesuffix("b").removesuffix("g")
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if not size > 0:
        raise UserError(f"--card must be a size like 24GB or one of {', '.join(CARDS)}, got {text!r}.")
    return size * GIB, None
