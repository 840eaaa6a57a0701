# SPDX-License-Identifier: Apache-2.0
"""The Wan-S2V transformer (arXiv:2508.18621) as a model of diffusers; what it computes is in network.py."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - where diffusers finds a class, it looks for this
from torch import Tensor

from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.diffusers_model import WanDiffusersModel
from talkingdit.families.wan_s2v.network import WanS2VNetwork
from talkingdit.families.wan_s2v.units import ROOT, UNITS


class WanS2VModel(WanS2VNetwork, WanDiffusersModel):  # type: ignore[misc]
    __doc__ = WanS2VNetwork.__doc__

    forward_methods: ClassVar = ("encode_conditions", "denoise_packed")  # for `register_fsdp_forward_method`
    _supports_gradient_checkpointing = True
    # What diffusers wants to know of the structure follows from units.py as far as it stands there. It does not say
    # of what class large units are, nor which layers inside of them stay precise when weights are cast to fewer bits.
    _no_split_modules = ["WanBlock", "AudioCrossAttention"]  # type: ignore[assignment]  # noqa: RUF012
    _repeated_blocks = ["WanBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = [  # type: ignore[assignment]  # noqa: RUF012
        *("norm", "modulation"),
        *(f"^{name}" for name in (*ROOT, *(unit.pattern for unit in UNITS if unit.float32))),
    ]
    # diffusers finds lists of blocks that lie in the model itself; those in parts of it are looked for in these.
    _group_offload_block_modules = sorted(
        {unit.pattern.partition(".")[0] for unit in UNITS if unit.pattern.count(".") > 1}
    )

    __init__ = register_to_config(WanS2VNetwork.__init__)

    @property
    def dummy_inputs(self) -> dict[str, Any]:
        """Arguments of one small forward that goes through every layer, zeros: hooks of offloading learn from it."""
        c = self.config

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(1, *shape)

        size = (1, 16, 16)  # one patch of the coarsest history bucket and more
        inputs = WanInputs(
            zeros(1, c.text_dim),
            reference=zeros(c.in_dim, *size),
            history=zeros(c.in_dim, *size),
            pose=zeros(c.cond_dim, *size) if c.cond_dim else None,
            audio=zeros(c.audio_layers, c.audio_dim, 4),
        )
        return {"latents": zeros(c.in_dim, *size), "timestep": zeros(), "conditions": inputs}
