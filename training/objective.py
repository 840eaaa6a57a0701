# SPDX-License-Identifier: Apache-2.0
"""The loss of a micro-batch: samples with what was drawn for them, one call of the model, one loss per sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from talkingdit.data.sample import Sample
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.packed import PackedClip
from training.conditions import Draws, cell_weights, draw, noisy_history, normal
from training.config import StageConfig
from training.losses import add_noise, velocity_loss
from training.stages import check_supported

if TYPE_CHECKING:
    from talkingdit.nn.context_parallel import ContextParallel
    from training.batching import MicroBatch
    from training.parallel import ProcessMesh

LEVELS = 4  # ranges of the noise level whose losses are told apart


@dataclass
class StepLosses:
    """Losses of the samples of a micro-batch.

    Attributes:
        each: float32 [n], with graph; zero for samples that only stand in.
        count: samples that count.
        parts: tag -> (sum of losses without graph, number of samples), for logs: with and without audio, first and
            later clips, by source and by noise level.
    """

    each: Tensor
    count: float
    parts: dict[str, tuple[Tensor, float]]

    @property
    def total(self) -> Tensor:
        """Sum over the samples, with graph."""
        return self.each.sum()


@dataclass(frozen=True)
class TrainingInputs:
    """A sample as the model gets it; tensors on the CPU, without a batch axis."""

    sample: Sample
    draws: Draws
    noise: Tensor  # [C, T, H, W]
    weight: Tensor  # [T, H, W], of mean one
    noisy: Tensor  # [C, T, H, W]
    timestep: Tensor  # [T], in 0..1000
    audio: Tensor | None
    audio_history: Tensor | None
    reference: Tensor | None
    history: Tensor | None
    pose: Tensor | None


def prepare(sample: Sample, number: int, stage: StageConfig, seed: int, progress: float = 0.0) -> TrainingInputs:
    """Draw what is random about a sample and put it together: a function of (sample, number, stage, seed, progress)."""
    draws = draw(sample, number, stage, seed, progress)
    clean = sample.latents
    noise = normal(seed, number, "noise", clean.shape)
    noisy = add_noise(clean[None], noise[None], torch.tensor([draws.sigma]))[0]
    noisy[:, : draws.prefix] = clean[:, : draws.prefix]
    timestep = torch.full((clean.shape[1],), 1000 * draws.sigma)
    timestep[: draws.prefix] = 0
    hears = "audio" in draws.kept
    return TrainingInputs(
        sample=sample,
        draws=draws,
        noise=noise,
        weight=cell_weights(sample, stage, draws, progress),
        noisy=noisy,
        timestep=timestep,
        audio=sample.audio if hears else None,
        audio_history=sample.audio_history if hears and stage.conditions.audio_past else None,
        reference=sample.reference if "reference" in draws.kept else None,
        history=noisy_history(sample, draws, seed),
        pose=sample.pose if "pose" in draws.kept else None,
    )


def losses(
    networks: Any,
    batch: MicroBatch,
    stage: StageConfig,
    seed: int,
    progress: float,
    layout: ProcessMesh,
) -> StepLosses:
    """Flow-matching losses of a micro-batch: one call of the transformer (and of a trained text encoder).

    The loss of a sample depends on the sample, its number, the seed and the progress, and not on what it is batched
    with. Latents that are given clean take no part in it. Dropped audio is silence, a dropped reference or history has
    no tokens, dropped text is the empty prompt.

    Args:
        networks: `.transformer`, and `.text_encoder` or None; without one the samples bring text features.
        batch: stacked samples of equal shapes, or a packed micro-batch of any.
        stage: what is drawn how often, and how the loss is weighted.
        seed: of the run.
        progress: 0..1, how much of the stage was done at this step.
        layout: its device, and the processes that share a sequence (`context`).

    Raises:
        ValueError: samples that do not fit together, lack text features, or a stage that asks for more than the model
            takes.
    """
    check_supported(stage)
    numbered = zip(batch.samples, batch.numbers, strict=True)
    items = [prepare(sample, number, stage, seed, progress) for sample, number in numbered]
    texts = _texts(networks, items, stage, layout.device)
    run = _packed if batch.packed else _stacked
    each = run(networks.transformer, items, texts, layout.device, layout.context)
    weights = torch.tensor(batch.weights, device=each.device)
    return StepLosses(each * weights, sum(batch.weights), _parts(each.detach(), items, batch.weights))


def _stacked(
    transformer: Any,
    items: Sequence[TrainingInputs],
    texts: Sequence[Tensor],
    device: torch.device | str,
    context: ContextParallel | None,
) -> Tensor:
    """Losses [n] of samples of equal shapes, with a batch axis. Conditions that some of them lack are masked."""
    shapes = {tuple(item.noisy.shape) for item in items}
    if len(shapes) > 1:
        raise ValueError(f"objective: samples of different shapes cannot be stacked, got {sorted(shapes)}")

    def stack(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors)).to(device, non_blocking=True)

    inputs: dict[str, Any] = {}
    for name in ("reference", "pose", "audio"):
        values = _filled([getattr(item, name) for item in items])
        inputs[name] = None if values is None else stack(values)
    inputs["drop_reference"] = [item.reference is None for item in items]
    history = _histories([item.history for item in items])
    inputs["history"] = None if history is None else stack(history)
    inputs["drop_history"] = [item.history is None for item in items]
    if history is not None:
        inputs["history_lengths"] = _lengths([item.history for item in items], history[0].shape[1])
    past = _audio_histories(items)
    inputs["audio_history"] = None if past is None else stack(past)
    timestep = torch.stack([item.timestep for item in items]).to(device)
    if not any(item.draws.prefix for item in items):
        timestep = timestep[:, 0]
    length = max(len(text) for text in texts)
    text = torch.stack([torch.nn.functional.pad(text, (0, 0, 0, length - len(text))) for text in texts])
    velocity = transformer(stack([item.noisy for item in items]), timestep, WanInputs(text, **inputs), context=context)
    clean, noise = stack([item.sample.latents for item in items]), stack([item.noise for item in items])
    return velocity_loss(velocity, clean, noise, stack([item.weight[None] for item in items]))


def _packed(
    transformer: Any,
    items: Sequence[TrainingInputs],
    texts: Sequence[Tensor],
    device: torch.device | str,
    context: ContextParallel | None,
) -> Tensor:
    """Losses [n] of samples of any shapes, in one sequence."""

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    clips = [
        PackedClip(
            latents=item.noisy.to(device, non_blocking=True),
            timestep=(item.timestep if item.draws.prefix else item.timestep[0]).to(device),
            text=text,
            reference=move(item.reference),
            history=move(item.history),
            pose=move(item.pose),
            audio=move(item.audio),
            audio_history=move(item.audio_history),
        )
        for item, text in zip(items, texts, strict=True)
    ]
    velocities = transformer.denoise_packed(clips, context=context)
    each = []
    for item, velocity in zip(items, velocities, strict=True):
        clean, noise, weight = (x.to(device)[None] for x in (item.sample.latents, item.noise, item.weight[None]))
        each.append(velocity_loss(velocity[None], clean, noise, weight)[0])
    return torch.stack(each)


def _filled(values: Sequence[Tensor | None]) -> list[Tensor] | None:
    """The values with zeros in place of those that are missing, which is what the model takes for "none"."""
    like = next((value for value in values if value is not None), None)
    return None if like is None else [torch.zeros_like(like) if value is None else value for value in values]


def _histories(values: Sequence[Tensor | None]) -> list[Tensor] | None:
    """Histories [C, n, H, W] with zeros in front up to the longest, or altogether."""
    like = next((value for value in values if value is not None), None)
    if like is None:
        return None
    longest = max(value.shape[1] for value in values if value is not None)
    whole = []
    for value in values:
        value = like[:, :0] if value is None else value
        front = value.new_zeros(value.shape[0], longest - value.shape[1], *value.shape[2:])
        whole.append(torch.cat([front, value], dim=1))
    return whole


def _lengths(values: Sequence[Tensor | None], longest: int) -> list[int] | None:
    """Latent frames of each history where they differ, else None."""
    lengths = [longest if value is None else value.shape[1] for value in values]
    return None if set(lengths) == {longest} else lengths


def _audio_histories(items: Sequence[TrainingInputs]) -> list[Tensor] | None:
    """Features before the clips, continued to the past up to the longest as the model would do it alone."""
    lengths = [item.audio_history.shape[-1] for item in items if item.audio_history is not None]
    like = next((item.audio for item in items if item.audio is not None), None)
    if not lengths or like is None:
        return None
    whole = []
    for item in items:
        if item.audio is None:
            past = like.new_zeros(*like.shape[:2], 1)
        else:
            past = item.audio[..., :1] if item.audio_history is None else item.audio_history
        front = past[..., :1].expand(-1, -1, max(lengths) - past.shape[-1])
        whole.append(torch.cat([front, past], dim=-1))
    return whole


def _texts(
    networks: Any, items: Sequence[TrainingInputs], stage: StageConfig, device: torch.device | str
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
