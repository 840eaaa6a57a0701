# SPDX-License-Identifier: Apache-2.0
"""Transformers written as the released checkpoint is, for programs that read that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from talkingdit.atomic import whole_file, write_whole
from talkingdit.checkpoints.adapters import refuse_adapters
from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.presets import PRESETS

if TYPE_CHECKING:
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel

FILE = "mp_rank_00_model_states.pt"
# Settings that the released program has built in.
_BUILT_IN = (
    *("rope_theta", "audio_blocks", "audio_window", "emotion"),
    *("reference_tokens", "reference_channels", "reference_projection", "reference_shift", "reference_time"),
)


def check_official(config: Mapping[str, Any], where: str | Path) -> None:
    """Whether the released program can follow everything that a configuration says.

    Args:
        config: arguments of `HunyuanAvatarModel`; those that are not said have their defaults.
        where: what messages begin with.

    Raises:
        UserError: it cannot.
    """
    for name in _BUILT_IN:
        official = PRESETS["hunyuan_avatar_13b"][name]
        if (ours := config.get(name, official)) != official:
            raise UserError(f"{where}: the released layout has no place for {name} {ours!r}, only for {official!r}.")


def save_official(folder: str | Path, model: HunyuanAvatarModel) -> Path:
    """Write a transformer as the released checkpoint is: one file of PyTorch, with the weights below "module".

    A model with heads of another size has a config.json beside it, which the released program does not read.

    Args:
        folder: such as ckpts/hunyuan-video-t2v-720p/transformers; made if it is not there.
        model: saved in the dtypes that it has.

    Returns:
        The file.

    Raises:
        UserError: the model has adapters, or a setting that the released program does not know.
    """
    refuse_adapters(model, folder)
    check_official(model.config, folder)
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    with whole_file(root / FILE) as temporary:
        torch.save({"module": {name: value.cpu() for name, value in model.state_dict().items()}}, temporary)
    head = model.config.hidden_size // model.config.num_heads
    if head != sum(PRESETS["hunyuan_avatar_13b"]["rope_dim_list"]):  # which the weights of other heads do not tell
        write_config(root, {name: model.config[name] for name in PRESETS["hunyuan_avatar_13b"]})
    return root / FILE


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write config.json, whole or not at all."""
    write_whole(folder / "config.json", (json.dumps(dict(values), indent=2, sort_keys=True) + "\n").encode())
