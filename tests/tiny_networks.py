# SPDX-License-Identifier: Apache-2.0
"""Networks small enough to train in tests for many steps and layouts, and clips that any layout can share."""

from __future__ import annotations

from typing import Any

import torch
from tiny_checkpoint import make_transformer
from torch import Tensor, nn

from talkingdit.models.text import PromptEncoder
from training.networks import Networks
from training.parallel import Layout

SAMPLES = 4  # of a step, over all processes
CAPTIONS = ("a man in red", "a woman", "", "two people")


def make_networks(seed: int = 0, text_encoder: bool = True, **changes: Any) -> Networks:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = make_transformer(**changes).train()
        return Networks(transformer, PromptEncoder(64, 36) if text_encoder else None)


def sample_losses(networks: nn.Module, step: int, chosen: list[int], context: Any = None, **options: Any) -> Tensor:
    """Loss of some of the samples of a step, [n]; what a sample is depends on its number alone."""
    parts: dict[str, list[Tensor]] = {"latents": [], "target": [], "audio": [], "history": []}
    for i in chosen:
        generator = torch.Generator().manual_seed(1000 * step + i)
        for name, shape in (
            ("latents", (16, 3, 6, 8)),
            ("target", (16, 3, 6, 8)),
            ("audio", (2, 160, 12)),
            ("history", (16, 2, 6, 8)),
        ):
            parts[name].append(torch.randn(shape, generator=generator))
    data = {name: torch.stack(tensors) for name, tensors in parts.items()}
    given = {} if context is None else {"context": context}
    velocity = networks.transformer(
        data["latents"],
        torch.tensor([200.0 + 190 * i for i in chosen]),
        networks.text_encoder.encode([CAPTIONS[i] for i in chosen]).features,
        reference=data["latents"][:, :, :1],
        history=data["history"],
        audio=data["audio"],
        **given,
        **options,
    )
    return (velocity - data["target"]).square().mean(dim=(1, 2, 3, 4))


def backward(networks: nn.Module, step: int, layout: Layout | None = None, pieces: int = 1) -> float:
    """Gradients of a step by the rule of `training.parallel`, in so many micro-batches; the loss of all samples."""
    rank, size, world = (0, 1, 1) if layout is None else (layout.data_rank, layout.data_size, layout.world)
    mine = list(range(SAMPLES))[rank::size]
    total = torch.zeros(())
    for i in range(pieces):
        chosen = mine[i::pieces]
        losses = sample_losses(networks, step, chosen, None if layout is None else layout.context)
        (losses.sum() / SAMPLES * world).backward()
        total += losses.detach().sum()
    if layout is not None:
        torch.distributed.all_reduce(total)
        total /= world // size
    return total.item() / SAMPLES
