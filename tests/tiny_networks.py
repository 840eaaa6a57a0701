# SPDX-License-Identifier: Apache-2.0
"""Networks small enough to train in tests for many steps and meshs, and clips that any mesh can share."""

from __future__ import annotations

from typing import Any

import torch
from tiny_checkpoint import make_transformer
from torch import Tensor, nn

from talkingdit import families
from talkingdit.families.puppet.text import PromptEncoder
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.packed import PackedClip
from talkingdit.families.wan_s2v.train import run_packed
from talkingdit.nn.context_parallel import ContextParallel
from training.networks import Networks
from training.parallel import ProcessMesh

SAMPLES = 4  # of a step, over all processes
CAPTIONS = ("a man in red", "a woman", "", "two people")


def make_networks(seed: int = 0, text_encoder: bool = True, **changes: Any) -> Networks:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = make_transformer(**changes).train()
        return Networks(families.get("puppet"), transformer, PromptEncoder(64, 36) if text_encoder else None)


def sample_losses(
    networks: nn.Module, step: int, chosen: list[int], context: ContextParallel | None = None, packed: bool = False
) -> Tensor:
    """Loss of some of the samples of a step, [n], stacked or packed. What a sample is depends on its number alone.

    Sample 2 has no history, so some processes may have none at all.
    """
    shapes = {"latents": (16, 3, 6, 8), "target": (16, 3, 6, 8), "audio": (2, 160, 12), "history": (16, 2, 6, 8)}
    parts: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for i in chosen:
        generator = torch.Generator().manual_seed(1000 * step + i)
        for name, shape in shapes.items():
            parts[name].append(torch.randn(shape, generator=generator))
    latents, target, audio, history = (torch.stack(tensors) for tensors in parts.values())
    timestep = torch.tensor([200.0 + 190 * i for i in chosen])
    text = networks.text_encoder.encode([CAPTIONS[i] for i in chosen]).features
    reference, drop = latents[:, :, :1], [i == 2 for i in chosen]
    if packed:
        tensors = zip(latents, timestep, text, reference, history, drop, audio, strict=True)
        clips = [
            PackedClip(z, t, words, reference=r, history=h, drop_history=d, audio=a)
            for z, t, words, r, h, d, a in tensors
        ]
        velocity = torch.stack(list(run_packed(networks.transformer, clips, context)))
    else:
        inputs = WanInputs(text, reference=reference, history=history, drop_history=drop, audio=audio)
        velocity = networks.transformer(latents, timestep, inputs, context=context)
    return (velocity - target).square().mean(dim=(1, 2, 3, 4))


def backward(
    networks: nn.Module, step: int, mesh: ProcessMesh | None = None, pieces: int = 1, packed: bool = False
) -> float:
    """Gradients of a step by the rule of `training.parallel`, in so many micro-batches; the loss of all samples."""
    rank, size, world = (0, 1, 1) if mesh is None else (mesh.data_rank, mesh.data_size, mesh.world)
    mine = list(range(SAMPLES))[rank::size]
    total = torch.zeros(())
    for i in range(pieces):
        chosen = mine[i::pieces]
        losses = sample_losses(networks, step, chosen, None if mesh is None else mesh.context, packed)
        (losses.sum() / SAMPLES * world).backward()
        total += losses.detach().sum()
    if mesh is not None:
        torch.distributed.all_reduce(total)
        total /= world // size
    return total.item() / SAMPLES
