# SPDX-License-Identifier: Apache-2.0
"""The structure of the Wan-S2V transformer, see `talkingdit.nn.units`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from talkingdit.nn.units import Unit

FFN_TOKENS = 8192  # that go through a feed-forward layer at once in inference; enough to fill a large GPU
UNITS = (
    Unit("text_embedding"),
    Unit("casual_audio_encoder", float32=True),
    Unit("audio_injector.injector_adain_layers.*"),
    Unit("time_embedding", float32=True),
    Unit("time_projection", float32=True),
    Unit("blocks.*", large=True),
    Unit("audio_injector.injector.*", large=True),
    Unit("head", float32=True),
)


def walk(config: Mapping[str, Any]) -> list[str]:
    """Paths of the large units in the order in which the forward calls them: blocks, and what hears audio behind them.

    Args:
        config: arguments of the transformer.
    """
    index = list(config["audio_inject_layers"])
    paths = []
    for i in range(config["num_layers"]):
        paths.append(f"blocks.{i}")
        if i in index:
            paths.append(f"audio_injector.injector.{index.index(i)}")
    return paths


def example_inputs(config: Any, device: torch.device | str) -> dict[str, Any]:
    """Arguments of the forward for a small clip with every condition, so that it goes through every layer.

    Args:
        config: of the transformer.
        device: of the tensors.
    """
    grid = (1, 16, 16)  # latent frames, rows, columns

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(1, *shape, device=device)

    return {
        "latents": zeros(config["in_dim"], *grid),
        "timestep": zeros(),
        "text": zeros(1, config["text_dim"]),
        "reference": zeros(config["in_dim"], *grid),
        "history": zeros(config["in_dim"], *grid),
        "pose": zeros(config["cond_dim"], *grid) if config["cond_dim"] else None,
        "audio": zeros(config["audio_layers"], config["audio_dim"], 4),
    }
