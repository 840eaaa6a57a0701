# SPDX-License-Identifier: Apache-2.0
"""How the processes of a team share a video: the layout that fits the models, and the autoencoder in strips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from talkingdit.autoencoders.strips import Autoencoder, check_split
from talkingdit.distributed.layout import Layout, Parallel
from talkingdit.distributed.team import Team
from talkingdit.errors import UserError


def shared_autoencoder(vae: Any, parallel: Parallel) -> Autoencoder:
    """The autoencoder as all processes share it."""
    if parallel.team.size == 1:
        return Autoencoder(vae)
    return Autoencoder(vae, parallel.team, dist.group.WORLD, parallel.layout.vae == "split")


def share_work(
    team: Team, layout: Layout, branches: int, checkpoint: Any, warn: Callable[[str], None] | None = None
) -> Parallel:
    """How a team makes a video with a checkpoint.

    Args:
        team: all processes; each calls this with the same arguments.
        layout: what was asked for.
        branches: predictions per step.
        checkpoint: with `transformer` and `vae`.
        warn: called with a sentence about what was done differently from what may be expected.

    Raises:
        UserError: the layout does not fit the number of processes, the model or the request, or the autoencoder was to
            be split and cannot.
    """
    model = checkpoint.transformer

    def fit() -> Layout:
        chosen = layout.resolved(team.size, branches, getattr(model.config, "num_heads", None))
        if team.size > 1 and chosen.vae == "split":
            try:
                check_split(checkpoint.vae)
            except UserError as error:
                if layout.vae == "split":
                    raise
                if warn is not None and team.rank == 0:
                    warn(f"{str(error).removesuffix('; use vae=one.')}; the first process decodes for all.")
                return replace(chosen, vae="one")
        return chosen

    return Parallel(team, team.on_all_ranks(fit), model.device)
