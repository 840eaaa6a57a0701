# SPDX-License-Identifier: Apache-2.0
"""Forward products of large layers in float8, by torchao: rows of inputs and of weights have a scale each.

"forward" leaves the backward as it is: both of its products are of the unrounded tensors. "rowwise" rounds what the
gradient of the inputs is made of as well; gradients of weights stay products of unrounded tensors (torchao's recipe
`rowwise_with_gw_hp`). Parameters, their names and their dtypes do not change, so checkpoints and exports do not either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from talkingdit.errors import UserError
from talkingdit.nn.units import large_prefixes
from training.networks import Networks
from training.sections import ParallelConfig

_PIECE = 16  # inputs and outputs of a layer must be multiples of it: what products of float8 read at once


def use_float8(networks: Networks, parallel: ParallelConfig, device: torch.device) -> list[str]:
    """Let the linear layers of the transformer's large units multiply in float8, in place. Call it before sharding.

    Without a GPU that can, products are emulated: the same rounding, slower.

    Args:
        networks: layers with frozen eight-bit weights stay as they are.
        parallel: `float8` of it.
        device: of this process.

    Returns:
        Paths of the layers.

    Raises:
        UserError: torchao is not installed, or no layer has a size for it.
    """
    if parallel.float8 == "off":
        return []
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise UserError(
            "parallel.float8: needs torchao, which is not installed: pip install 'talkingdit[quant]'."
        ) from error

    prefixes, found = large_prefixes(networks.family.units.UNITS), []

    def large(module: nn.Module, name: str) -> bool:
        if type(module) is not nn.Linear or not name.startswith(prefixes) or ".lora_" in name:
            return False
        fits = module.in_features % _PIECE == 0 and module.out_features % _PIECE == 0
        if fits:
            found.append(name)
        return fits

    transformer: Any = networks.transformer
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    convert_to_float8_training(transformer, config=_recipe(parallel.float8, not able), module_filter_fn=large)
    if not found:
        raise UserError(f"parallel.float8: no large layer has sizes that are multiples of {_PIECE}.")
    return found


def _recipe(kind: str, emulate: bool) -> Any:
    """torchao's configuration of "forward" or "rowwise"."""
    from dataclasses import replace

    from torchao.float8 import Float8LinearConfig
    from torchao.float8.config import CastConfig, ScalingGranularity, ScalingType

    if kind == "rowwise":
        return replace(Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"), emulate=emulate)
    rows = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE)
    plain = CastConfig(scaling_type=ScalingType.DISABLED)
    return Float8LinearConfig(
        cast_config_input=rows,
        cast_config_weight=rows,
        cast_config_grad_output=plain,
        cast_config_input_for_grad_weight=plain,
        cast_config_weight_for_grad_input=plain,
        cast_config_grad_output_for_grad_weight=plain,
        emulate=emulate,
    )
