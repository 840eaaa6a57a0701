# SPDX-License-Identifier: Apache-2.0
"""While training goes on, its family generates videos with the weights as they are, and measures them."""

from __future__ import annotations

import torch
from torch import Tensor

from talkingdit.families.training import Validator
from training.config import Config
from training.family import family_of, train_run
from training.metrics import Writer
from training.networks import Networks
from training.parallel import ProcessMesh


def validator_for(config: Config, mesh: ProcessMesh) -> Validator | None:
    """The validation that a configuration asks for, None for none. Every rank must call this."""
    if config.sample.every <= 0:
        return None
    return family_of(config).train.open_validator(train_run(config), mesh.device, mesh.context)


@torch.no_grad()
def validate(validator: Validator, networks: Networks, writer: Writer | None, step: int) -> dict[str, float]:
    """Generate and measure on all ranks; logs what was measured and some frames where there is a writer.

    Returns:
        what was measured; nothing on other ranks than 0.
    """

    def show(name: str, frames: Tensor) -> None:
        if writer is not None:
            writer.frames(f"validation/{name}", frames, step)

    results = validator.run(networks.transformer, networks.text_encoder, step, show)
    if writer is not None and results:
        writer.scalars({f"validation/{name}": value for name, value in results.items()}, step)
    return results
