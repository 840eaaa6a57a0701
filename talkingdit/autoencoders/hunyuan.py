# SPDX-License-Identifier: Apache-2.0
"""The HunyuanVideo autoencoder as diffusers' `AutoencoderKLHunyuanVideo`, also from the released .pt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from talkingdit.checkpoints.fill import build_empty, fill
from talkingdit.checkpoints.folder import load_part
from talkingdit.checkpoints.weights import open_weights, read_bounded
from talkingdit.errors import UserError

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

RELEASED = "AutoencoderKLCausal3D"  # the class that the released config.json names
WEIGHTS = "pytorch_model.pt"
# Tiles as the released program makes them: 256 pixels and 64 frames, of which a quarter is shared.
TILE = {
    "tile_sample_min_height": 256,
    "tile_sample_min_width": 256,
    "tile_sample_min_num_frames": 64,
    "tile_sample_stride_height": 192,
    "tile_sample_stride_width": 192,
    "tile_sample_stride_num_frames": 48,
}
_SETTINGS = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "norm_num_groups",
    "scaling_factor",
    "spatial_compression_ratio",
    "mid_block_add_attention",
)


def load_hunyuan_vae(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AutoencoderKLHunyuanVideo:
    """The autoencoder from the released folder (config.json, pytorch_model.pt) or from one of diffusers.

    It works in tiles as the released program does.

    Raises:
        UserError: files that are missing or damaged, or weights that do not fit.
    """
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder / 'config.json'}: there is no such file; the checkpoint is not complete.")
    if read_bounded(folder / "config.json").get("_class_name") == AutoencoderKLHunyuanVideo.__name__:
        vae = load_part(AutoencoderKLHunyuanVideo, folder, dtype, device)
    else:
        settings = _released_settings(folder / "config.json")
        vae = build_empty(lambda: AutoencoderKLHunyuanVideo(**settings), folder)
        weights = open_weights(folder / WEIGHTS).renamed(lambda name: name.removeprefix("vae."))
        fill(vae, weights, dtype, device, what="the HunyuanVideo autoencoder")
    vae.enable_tiling(**TILE)
    return vae


def _released_settings(file: Path) -> dict[str, Any]:
    """Arguments of diffusers' class from the released config.json, whose blocks have other names.

    Raises:
        UserError: it describes another autoencoder.
    """
    values = read_bounded(file)
    name = values.get("_class_name", RELEASED)
    if name != RELEASED:
        raise UserError(f"{file}: _class_name must be {RELEASED} or AutoencoderKLHunyuanVideo, got {name!r}.")
    if values.get("disable_causal_conv"):
        raise UserError(f"{file}: disable_causal_conv is set; only the causal autoencoder is known.")
    found = {key: values[key] for key in _SETTINGS if key in values}
    blocks = len(found.get("block_out_channels", (0,) * 4))
    found["down_block_types"] = ("HunyuanVideoDownBlock3D",) * blocks
    found["up_block_types"] = ("HunyuanVideoUpBlock3D",) * blocks
    found["temporal_compression_ratio"] = values.get("time_compression_ratio", 4)
    return found
