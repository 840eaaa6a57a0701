# SPDX-License-Identifier: Apache-2.0
"""The Wan 2.1 video autoencoder as diffusers' `AutoencoderKLWan`, also from the official .pth.

Users load, save, tile and offload it as diffusers' own. Its layers are those of `wan_network`, which compute the same,
in float32 on CPUs in less time: so the Python API, whose models are diffusers', makes the frames of the command line.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from talkingdit.autoencoders.wan_network import BareAutoencoderKLWan, WanEncoder3d, plain
from talkingdit.checkpoints.fill import build_empty, fill, without_memory
from talkingdit.checkpoints.folder import check_class
from talkingdit.checkpoints.weights import Weights, open_weights
from talkingdit.errors import UserError

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

# Mean and standard deviation of the 16 latent channels. The official program has them built in.
LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

_ENDS = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "encoder.head.0": "encoder.norm_out",
    "encoder.head.2": "encoder.conv_out",
    "decoder.conv1": "decoder.conv_in",
    "decoder.head.0": "decoder.norm_out",
    "decoder.head.2": "decoder.conv_out",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_STEP = re.compile(r"(encoder|decoder)\.(middle|downsamples|upsamples)\.(\d+)\.(.+)\.(\w+)$")


def vae_name(name: str, blocks: int) -> str:
    """Name in diffusers of a weight with an official name; others stay as they are.

    Args:
        blocks: residual blocks before each change of size of the encoder. The decoder has one more.
    """
    if match := _STEP.match(name):
        half, part, index, layer, leaf = match.groups()
        layer = _RESIDUAL.get(layer, layer)
        if part == "middle":
            return f"{half}.mid_block.{_MIDDLE.get(index, index)}.{layer}.{leaf}"
        if part == "downsamples":
            return f"{half}.down_blocks.{index}.{layer}.{leaf}"
        # A flat list of blocks + 1 residual blocks and an upsampler, again and again, is a list of lists.
        block, place = divmod(int(index), blocks + 2)
        place_name = f"resnets.{place}" if place <= blocks else "upsamplers.0"
        return f"{half}.up_blocks.{block}.{place_name}.{layer}.{leaf}"
    module, _, leaf = name.rpartition(".")
    return f"{_ENDS.get(module, module)}.{leaf}"


def vae_config(weights: Weights) -> dict[str, Any]:
    """Settings of `AutoencoderKLWan` from the shapes of official weights, which have no configuration beside them.

    Raises:
        UserError: these are not the weights of a Wan 2.1 autoencoder.
    """
    shapes = weights.shapes
    try:
        base = shapes["encoder.conv1.weight"][0]
        z_dim = shapes["conv2.weight"][0]
        levels, downs = _levels(shapes)
        widths = [level[-1] for level in levels]
    except (KeyError, IndexError) as error:
        raise UserError(f"{weights.source}: not the weights of a Wan 2.1 autoencoder (no usable {error}).") from error
    counts = {len(level) for level in levels}
    if len(counts) != 1 or any(width % base for width in widths) or not downs:
        raise UserError(f"{weights.source}: not the weights of a Wan 2.1 autoencoder (its blocks are not regular).")
    if z_dim > len(LATENTS_MEAN):
        raise UserError(
            f"{weights.source}: {z_dim} latent channels, but the statistics of only {len(LATENTS_MEAN)} are known."
        )
    return {
        "base_dim": base,
        "z_dim": z_dim,
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": counts.pop(),
        "attn_scales": [],
        "temperal_downsample": downs,
        "latents_mean": list(LATENTS_MEAN[:z_dim]),
        "latents_std": list(LATENTS_STD[:z_dim]),
        "scale_factor_spatial": 2 ** len(downs),
        "scale_factor_temporal": 2 ** sum(downs),
    }


def _levels(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[list[int]], list[bool]]:
    """Widths of the residual blocks of each size of the encoder, and whether each change of size halves time too."""
    levels: list[list[int]] = [[]]
    downs: list[bool] = []
    for i in range(1 + max(int(m[3]) for m in map(_STEP.match, shapes) if m and m[2] == "downsamples")):
        step = f"encoder.downsamples.{i}."
        if step + "residual.2.weight" in shapes:
            levels[-1].append(shapes[step + "residual.2.weight"][0])
        else:
            shapes[step + "resample.1.weight"]
            downs.append(step + "time_conv.weight" in shapes)
            levels.append([])
    return levels, downs


def load_vae(source: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> AutoencoderKLWan:
    """The autoencoder from the official .pth file, or from a folder of diffusers (config.json, *.safetensors).

    It is diffusers', with the layers of `wan_network` where that has them.

    Raises:
        UserError: files that are missing or damaged, or weights that do not fit.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    if source.is_dir():
        check_class(source, (AutoencoderKLWan.__name__,))
        weights, what = open_weights(source), AutoencoderKLWan.__name__
        config = AutoencoderKLWan.load_config(source, local_files_only=True)
    else:
        weights, what = open_weights(source), "the Wan 2.1 autoencoder"
        config = vae_config(weights)
        blocks = config["num_res_blocks"]
        weights = weights.renamed(lambda name: vae_name(name, blocks))

    def make() -> AutoencoderKLWan:
        model: Any = AutoencoderKLWan.from_config(dict(config))
        exchange_layers(model)
        return model

    return fill(build_empty(make, source), weights, dtype, device, what=what)


def exchange_layers(vae: AutoencoderKLWan) -> None:
    """Give diffusers' autoencoder the layers of `wan_network`, of the same names, around the weights that it has.

    Nothing is done where those cannot compute the same, and where a library has hooks on layers.
    """
    parts = dict(vae.named_children())
    hooked = any(
        "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
        for part in parts.values()
        for layer in part.modules()
    )
    if hooked or isinstance(vae.encoder, WanEncoder3d) or not plain(vae.config):
        return
    known = inspect.signature(BareAutoencoderKLWan).parameters
    with without_memory():
        layers = BareAutoencoderKLWan(**{name: value for name, value in vae.config.items() if name in known})
    weights = dict(vae.named_parameters())
    for name, weight in layers.named_parameters():
        weight.requires_grad_(weights[name].requires_grad)  # torch makes the one that it is given as the one before
    layers.load_state_dict(weights, assign=True)
    for name, part in layers.train(vae.training).named_children():
        setattr(vae, name, part)
