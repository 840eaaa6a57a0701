# SPDX-License-Identifier: Apache-2.0
"""Process groups that also come up after torchrun has started all processes again."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def arguments_of_restart(timeout: timedelta) -> dict[str, Any]:
    """Further arguments of `init_process_group`; {} where torch needs no help.

    torchrun keeps one store over all restarts of a machine's processes, and torch (2.13) gives its names no prefix: the
    new processes find the addresses of those before them and fail with "Connection refused". So restarts get names of
    their own here. They are counted alike by all where there is one torchrun. Where there are several, each counts its
    own, and `training/launch/node.sh` has torchrun make a fresh store instead.

    Args:
        timeout: of the store.
    """
    restart, world = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("WORLD_SIZE", "1")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restart == "0" or not shared or os.environ.get("LOCAL_WORLD_SIZE") != world:
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, int(world), is_master=False, timeout=timeout)
    prefixed = dist.PrefixStore(f"restart {restart}", store)
    return {"store": prefixed, "rank": int(os.environ["RANK"]), "world_size": int(world)}
