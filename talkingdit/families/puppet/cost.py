# SPDX-License-Identifier: Apache-2.0
"""Memory and work of drawn characters: the transformer's are those of Wan-S2V, what stands beside it is tiny."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit.families.wan_s2v.cost import (
    CAST,
    LORA_TARGETS,
    SUBSETS,
    activations,
    attention_flops,
    complete,
    conditions,
    flops,
    heads,
    parameters,
    read_config,
    step,
    tokens,
)
from talkingdit.plan import shipped
from talkingdit.plan.clip import ClipShape
from talkingdit.plan.cost import FrozenParts, SpeechCost

if TYPE_CHECKING:
    import torch

    from talkingdit.families.puppet.checkpoint import PuppetSettings
    from talkingdit.pipelines.memory import Memory

__all__ = [
    "CAST",
    "LORA_TARGETS",
    "SUBSETS",
    "SWITCHES",
    "activations",
    "attention_flops",
    "autoencoder",
    "complete",
    "conditions",
    "default_clip",
    "flops",
    "frozen_parts",
    "heads",
    "parameters",
    "read_config",
    "speech",
    "step",
    "tokens",
]

SWITCHES: tuple[dict[str, Any], ...] = ()  # no part is large enough that moving or narrowing it would help


def default_clip(config: Mapping[str, Any], folder: Path | None = None) -> ClipShape:
    """What a checkpoint's pipeline.json suggests: by default 96 x 96, 8 latents, 8 steps of 2 predictions."""
    from talkingdit.pipelines.guidance import guidance_branches

    settings = _settings(folder)
    return ClipShape(
        height=settings.size,
        width=settings.size,
        latents=settings.clip_latents,
        history=config["motion_frames"][1],
        steps=settings.steps,
        branches=len(guidance_branches(settings.text_guidance, settings.audio_guidance)),
        batched=True,
    )


def _settings(folder: Path | None) -> PuppetSettings:
    """Of a checkpoint, where its pipeline.json tells."""
    from talkingdit.families.puppet.checkpoint import PuppetSettings, read_settings

    known = folder is not None and (folder / "pipeline.json").is_file()
    return read_settings(folder) if folder is not None and known else PuppetSettings()


def speech(config: Mapping[str, Any], folder: Path | None = None) -> SpeechCost:
    """A spectrogram, which is made on the host; features are float32."""
    fps = _settings(folder).fps
    return SpeechCost(0.0, 4.0 * config["audio_layers"] * config["audio_dim"] * fps, fps)


def frozen_parts(config: Mapping[str, Any], dtype: torch.dtype, folder: Path | None = None) -> FrozenParts:
    """The autoencoder has the dtype of the transformer, the prompt encoder is float32; audio features need no model."""
    text, vae = (0, 0) if folder is None else (_elements(folder / "text_encoder"), _elements(folder / "vae"))
    return shipped.frozen_parts(dtype.itemsize, text, vae)


def _elements(folder: Path) -> int:
    """Elements of the weights in a folder, 0 where there is none. No tensor is read.

    Raises:
        UserError: a folder without readable weights.
    """
    from talkingdit.checkpoints.weights import open_weights

    return sum(math.prod(shape) for shape in open_weights(folder).shapes.values()) if folder.is_dir() else 0


def autoencoder(config: Mapping[str, Any], clip: ClipShape, memory: Memory, width: int) -> dict[str, float]:
    """Bytes of decoding the clip's frames and of encoding the portrait; history stays latent."""
    return shipped.autoencoder(clip, width)
