# SPDX-License-Identifier: Apache-2.0
"""CLIP's picture encoder as the Wan I2V models use it: the tokens before its last layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from talkingdit.checkpoints.weights import check_index, load_pickled, read_bounded, some
from talkingdit.encoders.wav2vec import quiet
from talkingdit.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD_DIM = 80  # of ViT-H/14
# Modules of the official file, and what transformers calls them.
_OFFICIAL = (
    ("cls_embedding", "embeddings.class_embedding"),
    ("pos_embedding", "embeddings.position_embedding.weight"),
    ("patch_embedding", "embeddings.patch_embedding"),
    ("pre_norm", "pre_layrnorm"),
    ("post_norm", "post_layernorm"),
)
_LAYER = (
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    ("attn.proj", "self_attn.out_proj"),
    ("mlp.0", "mlp.fc1"),
    ("mlp.2", "mlp.fc2"),
)


class PictureEncoder(nn.Module):
    """Pictures to features. The whole picture is seen: it is made square, not cut, as the official program does it.

    Args:
        model: of transformers, with two layers at least.
    """

    def __init__(self, model: CLIPVisionModel):
        super().__init__()
        self.model = model
        self.image_dim = int(model.config.hidden_size)

    @torch.no_grad()
    def features(self, images: NDArray[np.uint8]) -> Tensor:
        """Images uint8 [n, H, W, 3] -> [n, L, image_dim], the input of the last layer, float32 on the model's device.

        Raises:
            ValueError: images of another type or shape.
        """
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise ValueError(f"PictureEncoder: images must be uint8 [n, H, W, 3], got {images.dtype} {images.shape}")
        weight = next(self.model.parameters())
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(weight.device).permute(0, 3, 1, 2).float() / 255
        side: Any = self.model.config.image_size
        pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values, device=weight.device).view(1, 3, 1, 1) for values in (MEAN, STD))
        states = self.model(pixel_values=((pixels - mean) / std).to(weight.dtype), output_hidden_states=True)
        return states.hidden_states[-2].float()


def load_picture_encoder(
    source: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PictureEncoder:
    """The encoder from the official .pth file, or from a folder of transformers (config.json, *.safetensors).

    Raises:
        UserError: files that are missing or damaged, or weights that do not fit.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if source.is_dir():
        if not (source / "config.json").is_file():
            raise UserError(f"{source}: the picture encoder is missing; the checkpoint is not complete.")
        read_bounded(source / "config.json")
        check_index(source)
        try:
            with quiet():
                loaded: Any = CLIPVisionModel.from_pretrained(
                    source, local_files_only=True, dtype=dtype, output_loading_info=True
                )
        except Exception as error:  # damaged files raise whatever their reader does
            reason = " ".join(str(error).split())
            raise UserError(f"{source}: the picture encoder does not load ({reason[:200]}).") from error
        model, report = loaded
        if lost := sorted(report["missing_keys"]):
            raise UserError(f"{source}: the picture encoder lacks {len(lost)} weights: {some(lost)}.")
    else:
        state = official_state(load_pickled(source), source)
        model = CLIPVisionModel(CLIPVisionConfig(**_config(state)))
        names = list(model.state_dict())
        prefix = "vision_model." if names[0].startswith("vision_model.") else ""  # of transformers before 5
        lost, extra = model.load_state_dict({prefix + name: value for name, value in state.items()}, strict=False)
        if lost or extra:
            raise UserError(f"{source}: not the weights of CLIP's picture encoder: {some([*lost, *extra])}.")
    return PictureEncoder(model.to(device, dtype).requires_grad_(False)).eval()


def official_state(weights: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """Weights of the official file, whose picture half is `visual.`, under the names of transformers.

    Raises:
        UserError: they are not of that kind.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not name.startswith("visual.") or name.startswith("visual.head"):
            continue
        own = name.removeprefix("visual.")
        if match := re.match(r"transformer\.(\d+)\.(.+)", own):
            layer, rest = f"encoder.layers.{match[1]}.", match[2]
            if rest.startswith("attn.to_qkv."):
                for part, value in zip("qkv", tensor.chunk(3), strict=True):
                    state[f"{layer}self_attn.{part}_proj.{rest.rpartition('.')[2]}"] = value
                continue
            state[layer + _swapped(rest, _LAYER)] = tensor
        else:
            flat = own in ("cls_embedding", "pos_embedding")
            state[_swapped(own, _OFFICIAL)] = tensor.flatten(0, 1) if flat else tensor
    if "embeddings.class_embedding" not in state:
        raise UserError(f"{where}: not the official CLIP of a Wan I2V model (no visual.cls_embedding in it).")
    state["embeddings.class_embedding"] = state["embeddings.class_embedding"].flatten()
    return state


def _swapped(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def _config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a model of these weights; heads are as wide as those of ViT-H/14, or there is one."""
    patches = state["embeddings.patch_embedding.weight"]
    width, patch = patches.shape[0], patches.shape[-1]
    places = state["embeddings.position_embedding.weight"].shape[0] - 1
    return {
        "hidden_size": width,
        "intermediate_size": state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers.")),
        "num_attention_heads": max(1, width // HEAD_DIM),
        "image_size": patch * round(places**0.5),
        "patch_size": patch,
        "hidden_act": "gelu",
    }
