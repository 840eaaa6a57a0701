# SPDX-License-Identifier: Apache-2.0
"""The loss of a micro-batch: samples with what was drawn for them, one call of the model, one loss per sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from talkingdit.data.sample import Sample
from talkingdit.families.training import TrainAnchor, TrainBatch, TrainClip
from training.conditions import Draws, cell_weights, draw, noisy_history, normal
from training.losses import add_noise, velocity_loss
from training.sections import StageConfig
from training.stages import check_supported
from training.weighting import level_weight

if TYPE_CHECKING:
    from training.batching import MicroBatch
    from training.networks import Networks
    from training.parallel import ProcessMesh

LEVELS = 4  # ranges of the noise level whose losses are told apart


@dataclass
class StepLosses:
    """Losses of the samples of a micro-batch.

    Attributes:
        each: float32 [n], with graph, weighted by noise level; zero for samples that only stand in.
        count: samples that count.
        parts: tag -> (sum of losses without graph, number of samples), for logs: with and without audio, first and
            later clips, by source and by noise level. They are not weighted by noise level, so that runs compare.
        keys: source and key of each sample.
    """

    each: Tensor
    count: float
    parts: dict[str, tuple[Tensor, float]]
    keys: list[str]

    @property
    def total(self) -> Tensor:
        """Sum over the samples, with graph."""
        return self.each.sum()


@dataclass(frozen=True)
class TrainingInputs:
    """A sample with what was drawn for it; tensors on the CPU, without a batch axis."""

    sample: Sample
    draws: Draws
    noise: Tensor  # [C, T, H, W]
    weight: Tensor  # [T, H, W], of mean one
    level_weight: float  # of its loss, by its noise level
    clip: TrainClip


def prepare(sample: Sample, number: int, stage: StageConfig, seed: int, progress: float = 0.0) -> TrainingInputs:
    """Draw what is random about a sample and put it together: a function of (sample, number, stage, seed, progress)."""
    draws = draw(sample, number, stage, seed, progress)
    return assemble(sample, draws, normal(seed, number, "noise", sample.latents.shape), stage, seed, progress)


def assemble(
    sample: Sample, draws: Draws, noise: Tensor, stage: StageConfig, seed: int, progress: float = 0.0
) -> TrainingInputs:
    """Put a sample together with what was drawn for it; `noise` has the shape of its latents."""
    clean = sample.latents
    noisy = add_noise(clean[None], noise[None], torch.tensor([draws.sigma]))[0]
    noisy[:, : draws.prefix] = clean[:, : draws.prefix]
    timestep = torch.full((clean.shape[1],), 1000 * draws.sigma)
    timestep[: draws.prefix] = 0
    hears = "audio" in draws.kept
    clip = TrainClip(
        latents=noisy,
        timestep=timestep,
        prefix=draws.prefix,
        audio=sample.audio if hears else None,
        audio_history=sample.audio_history if hears and stage.conditions.audio_past else None,
        reference=sample.reference if "reference" in draws.kept else None,
        history=noisy_history(sample, draws, seed),
        pose=sample.pose if "pose" in draws.kept else None,
        voices=sample.voices if hears else {},
        regions=sample.regions,
        outside=sample.outside,
        image=sample.image if "reference" in draws.kept else None,
        anchors=tuple(
            TrainAnchor(anchor.type, anchor.kind, sample.outside[anchor.kind][:, anchor.index : anchor.index + 1])
            for anchor in draws.anchors
        ),
        task=draws.task,
        given=sample.given if "reference" in draws.kept else None,
    )
    cells = cell_weights(sample, stage, draws, progress)
    return TrainingInputs(sample, draws, noise, cells, level_weight(draws.sigma, stage.objective), clip)


def losses(
    networks: Networks,
    batch: MicroBatch,
    stage: StageConfig,
    seed: int,
    progress: float,
    mesh: ProcessMesh,
) -> StepLosses:
    """Flow-matching losses of a micro-batch: one call of the transformer (and of a trained text encoder).

    The loss of a sample depends on the sample, its number, the seed and the progress, and not on what it is batched
    with. Latents that are given clean take no part in it. Dropped audio is silence, a dropped reference or history has
    no tokens, dropped text is the empty prompt.

    Args:
        networks: see `Networks`; without a text encoder the samples bring text features.
        batch: stacked samples of equal shapes, or a packed micro-batch of any.
        stage: what is drawn how often, and how the loss is weighted.
        seed: of the run.
        progress: 0..1, how much of the stage was done at this step.
        mesh: its device, and the processes that share a sequence (`context`).

    Raises:
        ValueError: samples that do not fit together, lack text features, or a stage that asks for more than the model
            takes.
    """
    check_supported(stage, networks.family)
    numbered = zip(batch.samples, batch.numbers, strict=True)
    items = [prepare(sample, number, stage, seed, progress) for sample, number in numbered]
    each = errors_of(networks, items, stage, mesh, batch.packed)
    pairs = zip(batch.weights, items, strict=True)
    weights = torch.tensor([weight * item.level_weight for weight, item in pairs], device=each.device)
    keys = [f"{sample.source}: {sample.key}" for sample in batch.samples]
    return StepLosses(each * weights, sum(batch.weights), _parts(each.detach(), items, batch.weights), keys)


def errors_of(
    networks: Networks, items: Sequence[TrainingInputs], stage: StageConfig, mesh: ProcessMesh, packed: bool
) -> Tensor:
    """Losses [n] of samples that are put together, by one call of the model; not weighted by noise level."""
    if not packed:
        _check_shapes(items)
    inputs = TrainBatch(
        clips=[item.clip for item in items],
        texts=_texts(networks, items, stage, mesh.device),
        packed=packed,
        device=mesh.device,
        context=mesh.context,
    )
    return _errors(networks.family.train.velocities(networks.transformer, inputs), items, mesh.device)


def _errors(velocities: Tensor | Sequence[Tensor], items: Sequence[TrainingInputs], device: torch.device) -> Tensor:
    """Losses [n] of the velocities of equal shapes [n, C, T, H, W], or of any."""
    if not isinstance(velocities, Tensor):
        each = [_errors(velocity[None], [item], device) for velocity, item in zip(velocities, items, strict=True)]
        return torch.cat(each)
    targets = zip(*((item.sample.latents, item.noise, item.weight[None]) for item in items), strict=True)
    clean, noise, weight = (torch.stack(tensors).to(device, non_blocking=True) for tensors in targets)
    return velocity_loss(velocities, clean, noise, weight)


def _check_shapes(items: Sequence[TrainingInputs]) -> None:
    shapes = {tuple(item.clip.latents.shape) for item in items}
    if len(shapes) > 1:
        raise ValueError(f"objective: samples of different shapes cannot be stacked, got {sorted(shapes)}")


def _texts(
    networks: Networks, items: Sequence[TrainingInputs], stage: StageConfig, device: torch.device | str
) -> list[Tensor]:
    """Text features [L, text_dim] of each sample, on the device."""
    keeps = ["text" in item.draws.kept for item in items]
    if networks.text_encoder is not None:
        captions = [item.sample.caption if kept else "" for item, kept in zip(items, keeps, strict=True)]
        return list(networks.text_encoder.encode(captions).features.to(device))
    features = []
    for item, kept in zip(items, keeps, strict=True):
        text = item.sample.text
        if text is None and item.sample.caption.strip():
            raise ValueError(
                f"{item.sample.source}: sample {item.sample.key} has a caption but no text features; precompute them, "
                'or set model.text_encoder to something else than "none"'
            )
        if text is None or not kept:
            text = empty_text(stage.conditions.empty_text, networks.transformer.config.text_dim)
        features.append(text.float().to(device))
    return features


@lru_cache(maxsize=4)
def empty_text(file: Path | None, text_dim: int) -> Tensor:
    """Features [L, text_dim] of the empty prompt: from a file, or one token of zeros.

    Raises:
        ValueError: the file cannot be read, or has not exactly one tensor of that width.
    """
    if file is None:
        return torch.zeros(1, text_dim)
    from safetensors.torch import load_file

    try:
        tensors = list(load_file(file).values())
    except Exception as error:
        raise ValueError(f"conditions.empty_text: {file} cannot be read: {error}") from error
    shapes = [list(tensor.shape) for tensor in tensors]
    if len(tensors) != 1 or tensors[0].ndim != 2 or tensors[0].shape[1] != text_dim:
        raise ValueError(f"conditions.empty_text: {file} must hold one tensor [L, {text_dim}], got {shapes}")
    return tensors[0].float()


def _parts(each: Tensor, items: Sequence[TrainingInputs], weights: Sequence[float]) -> dict[str, tuple[Tensor, float]]:
    """Sums and counts of the losses by what the samples are."""
    members: dict[str, list[int]] = {}
    for i, (item, weight) in enumerate(zip(items, weights, strict=True)):
        if weight == 0:
            continue
        sample, draws = item.sample, item.draws
        tags = [
            "loss/with_audio" if "audio" in draws.kept else "loss/without_audio",
            "loss/first_clip" if sample.history is None else "loss/later_clip",
            f"loss/source_{sample.source}",
            f"loss/noise_{min(LEVELS, 1 + int(LEVELS * draws.sigma))}of{LEVELS}",
        ]
        for tag in tags:
            members.setdefault(tag, []).append(i)
    return {tag: (each[index].sum(), float(len(index))) for tag, index in members.items()}
