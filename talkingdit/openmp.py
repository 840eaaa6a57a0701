# SPDX-License-Identifier: Apache-2.0
"""How torch's threads wait for each other on a CPU: awake for a short while, then asleep.

An operation is cut into a piece for each thread, and all wait for the last. GNU OpenMP, which torch's wheels for Linux
carry, lets them wait awake for some 100 ms, and so a thread that waits keeps the core that the last one needs where
another program runs beside. A short while covers the time from one operation to the next on a quiet machine, too.
"""

from __future__ import annotations

import os

SPINS = "1000"  # rounds of looking before a thread sleeps, some microseconds; what GNU OpenMP takes with too few cores
_CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_briefly() -> None:
    """Have threads of this process, and of those that it starts, wait so. It must come before torch is imported.

    A choice that the user has made in the environment stays.
    """
    if not any(name in os.environ for name in _CHOICES):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def waiting() -> str:
    """The choice, for people."""
    made = [f"{name}={os.environ[name]}" for name in _CHOICES if name in os.environ]
    return ", ".join(made) or "OpenMP's own"
