# SPDX-License-Identifier: Apache-2.0
"""Transformers written as the released checkpoints are, for programs that read those."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit.checkpoints.saving import saved_model
from talkingdit.checkpoints.weights import read_json
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.presets import PRESETS

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.model import WanS2VModel

# What the official config.json says of a model ...
_SAID = (
    *("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "cond_dim", "freq_dim", "text_len", "eps"),
    *("audio_dim", "num_audio_token", "audio_inject_layers", "enable_adain", "adain_mode", "zero_init"),
    *("zero_timestep", "enable_framepack", "framepack_drop_mode", "add_last_motion"),
)
# ... with settings that are always these here ...
_ALWAYS = {"model_type": "s2v", "enable_motioner": False, "enable_tsm": False, "trainable_token_pos_emb": False}
# ... and settings of ours that it has no words for, because the official program has them built in.
_BUILT_IN = ("audio_layers", "zip_frame_buckets", "framepack_padding", "reference_time", "patch_size", "motion_frames")


def check_official(config: Mapping[str, Any], where: str | Path) -> None:
    """Whether the official layout has a place for everything that a configuration says.

    Args:
        config: arguments of `WanS2VModel`; those that are not said have their defaults.
        where: what messages begin with.

    Raises:
        UserError: it has not.
    """
    for name in _BUILT_IN:
        official = PRESETS["wan_s2v_14b"][name]
        ours = config.get(name, official)
        if (tuple(ours) if isinstance(ours, list) else ours) != official:
            raise UserError(f"{where}: the official layout has no place for {name} {ours!r}, only for {official!r}.")


def save_official(folder: str | Path, model: WanS2VModel, max_shard_size: int | str = "10GB") -> Path:
    """Write a transformer as the released checkpoints are: config.json and numbered shards with an index.

    The result takes the place of these files in a released folder; the text encoder and the other parts stay beside
    it. Weights of an earlier save are replaced once all new ones are written.

    Args:
        folder: made if it is not there.
        model: saved in the dtypes that it has.
        max_shard_size: bytes, or such as "10GB".

    Returns:
        The folder.

    Raises:
        UserError: the model has adapters, or a setting that the official program does not know.
    """
    config = model.config
    if getattr(model, "peft_config", None):
        raise UserError(f"{folder}: the model has adapters; merge or unload them before it is saved.")
    check_official(config, folder)
    with saved_model(model, folder, max_shard_size=max_shard_size) as new:
        values: dict[str, Any] = {name: config[name] for name in _SAID} | _ALWAYS
        version = read_json(new / "config.json").get("_diffusers_version")
        values |= {"_class_name": "WanModel_S2V", "_diffusers_version": version}
        (new / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    return Path(folder)
