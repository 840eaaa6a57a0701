# SPDX-License-Identifier: Apache-2.0
"""Transformers written as the released checkpoints are, or as diffusers writes them, for programs that read those."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit.checkpoints.adapters import refuse_adapters
from talkingdit.checkpoints.names import to_diffusers
from talkingdit.checkpoints.saving import save_tensors, saved_model
from talkingdit.checkpoints.weights import read_json
from talkingdit.errors import UserError

if TYPE_CHECKING:
    from talkingdit.families.wan_i2v.model import WanI2VModel

_SAID = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim", "text_len", "eps")
_OFFICIAL_IMAGE = (0, 1280)  # widths of a picture's features that the official program has built in


def check_official(config: Mapping[str, Any], where: str | Path) -> None:
    """Whether the official layout has a place for everything that a configuration says.

    Raises:
        UserError: it has not.
    """
    if list(config.get("audio_inject_layers", ())):
        raise UserError(f"{where}: the official layout has no place for audio_inject_layers, only for none.")
    if config.get("image_dim", 1280) not in _OFFICIAL_IMAGE:
        raise UserError(
            f"{where}: the official layout has no place for image_dim {config['image_dim']}, only for 1280."
        )


def save_official(folder: str | Path, model: WanI2VModel, max_shard_size: int | str = "10GB") -> Path:
    """Write a transformer as the released checkpoints are: config.json and numbered shards with an index.

    Args:
        folder: made if it is not there.
        model: saved in the dtypes that it has.
        max_shard_size: bytes, or such as "10GB".

    Returns:
        The folder.

    Raises:
        UserError: the model has adapters, or a setting that the official program does not know.
    """
    refuse_adapters(model, folder)
    check_official(model.config, folder)
    with saved_model(model, folder, max_shard_size=max_shard_size) as new:
        version = read_json(new / "config.json").get("_diffusers_version")
        values: dict[str, Any] = {name: model.config[name] for name in _SAID}
        values |= {"_class_name": "WanModel", "_diffusers_version": version, "model_type": "i2v"}
        _write(new / "config.json", values)
    return Path(folder)


def save_diffusers(folder: str | Path, model: WanI2VModel) -> Path:
    """Write a transformer as `diffusers.WanTransformer3DModel` reads it: config.json and one file of renamed weights.

    Args:
        folder: made if it is not there.
        model: saved in the dtypes that it has.

    Returns:
        The folder.

    Raises:
        UserError: the model has adapters, or audio layers, which diffusers has none of.
    """
    c, root = model.config, Path(folder)
    refuse_adapters(model, folder)
    if list(c.audio_inject_layers):
        raise UserError(f"{folder}: diffusers has no place for audio_inject_layers, only for none.")
    root.mkdir(parents=True, exist_ok=True)
    state = {to_diffusers(name): value for name, value in model.state_dict().items()}
    save_tensors(state, root / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    _write(
        root / "config.json",
        {
            "_class_name": "WanTransformer3DModel",
            "patch_size": list(c.patch_size),
            "num_attention_heads": c.num_heads,
            "attention_head_dim": c.dim // c.num_heads,
            "in_channels": c.in_dim,
            "out_channels": c.out_dim,
            "text_dim": c.text_dim,
            "freq_dim": c.freq_dim,
            "ffn_dim": c.ffn_dim,
            "num_layers": c.num_layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": c.eps,
            "image_dim": c.image_dim or None,
            "added_kv_proj_dim": c.dim if c.image_dim else None,
        },
    )
    return root


def _write(file: Path, values: Mapping[str, Any]) -> None:
    from talkingdit.atomic import write_whole

    write_whole(file, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
