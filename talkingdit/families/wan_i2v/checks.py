# SPDX-License-Identifier: Apache-2.0
"""Checks of what a `WanI2VModel` is built from and given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from talkingdit.families.wan_i2v.conditions import WanI2VInputs
from talkingdit.nn.shapes import check_shape

if TYPE_CHECKING:
    from talkingdit.families.wan_i2v.model import WanI2VModel


def check_config(model: str, c: Any) -> None:
    """Checks the settings of a model, which messages call `model`.

    Raises:
        ValueError: names the setting that contradicts another.
    """
    if c.dim % c.num_heads or c.dim // c.num_heads % 2 or c.dim % 4:
        raise ValueError(
            f"{model}: dim must be a multiple of 4 and of num_heads with an even quotient, "
            f"got dim {c.dim} and num_heads {c.num_heads}"
        )
    if tuple(c.patch_size) != (1, 2, 2):
        raise ValueError(f"{model}: patch_size must be (1, 2, 2), got {tuple(c.patch_size)}")
    if c.in_dim < c.out_dim:
        raise ValueError(f"{model}: in_dim must be at least out_dim, got {c.in_dim} and {c.out_dim}")
    layers = list(c.audio_inject_layers)
    if layers != sorted(set(layers)) or (layers and not 0 <= layers[0] <= layers[-1] < c.num_layers):
        raise ValueError(
            f"{model}: audio_inject_layers must be ascending block numbers below {c.num_layers}, got {layers}"
        )
    if c.residual_dtype not in ("float32", "compute"):
        raise ValueError(f"{model}: residual_dtype must be 'float32' or 'compute', got {c.residual_dtype!r}")


def check_latents(model: WanI2VModel, latents: Tensor, timestep: Tensor) -> None:
    """Checks the shapes of noisy latents and their timesteps.

    Raises:
        ValueError: names the argument that does not fit.
    """
    name = type(model).__name__
    check_shape(name, "latents", latents, ("B", model.config.out_dim, "T", "H", "W"))
    batch, _, frames, height, width = latents.shape
    if height % 2 or width % 2:
        raise ValueError(f"{name}: latents must have even height and width, got {height} x {width}")
    if timestep.shape not in ((batch,), (batch, frames)):
        raise ValueError(
            f"{name}: timestep must have shape [B] = [{batch}] or [B, T] = [{batch}, {frames}], "
            f"got {list(timestep.shape)}"
        )


def check_inputs(
    model: WanI2VModel, inputs: WanI2VInputs, size: tuple[int, int, int] | None = None
) -> tuple[int, int, int]:
    """Checks the shapes of all inputs; returns (T, H, W) of their latents.

    Args:
        size: of the latents, where they are known.

    Raises:
        ValueError: names the argument that does not fit.
    """
    name, config = type(model).__name__, model.config
    if not isinstance(inputs.text, Tensor):
        raise ValueError(f"{name}: text must be given as a tensor, got {type(inputs.text).__name__}")
    check_shape(name, "text", inputs.text, ("B", "L", config.text_dim))
    batch, length = inputs.text.shape[:2]
    if length > config.text_len:
        raise ValueError(f"{name}: text must have at most text_len = {config.text_len} tokens, got {length}")
    check_shape(name, "text_mask", inputs.text_mask, (batch, length))
    channels = config.in_dim - config.out_dim
    said = size or inputs.size
    if said is None and inputs.condition is not None and inputs.condition.dim() == 5:
        _, _, frames, height, width = inputs.condition.shape
        said = (frames, height, width)
    if said is None:
        raise ValueError(f"{name}: size = (T, H, W) of the latents must be given, the conditions do not tell it")
    check_shape(name, "condition", inputs.condition, (batch, channels, *said))
    if inputs.image is not None and not config.image_dim:
        raise ValueError(f"{name}: image needs a model with image_dim > 0, got a model without a branch for it")
    check_shape(name, "image", inputs.image, (batch, "L", config.image_dim))
    for i, extra in enumerate(inputs.extra):
        frames = len(extra.times)
        check_shape(name, f"extra[{i}].latents", extra.latents, (batch, config.out_dim, frames, "H", "W"))
        if extra.latents.shape[3] % 2 or extra.latents.shape[4] % 2:
            raise ValueError(
                f"{name}: extra[{i}].latents must have even height and width, got {list(extra.latents.shape[3:])}"
            )
    return said
