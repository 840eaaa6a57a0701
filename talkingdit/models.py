# SPDX-License-Identifier: Apache-2.0
"""The models of all families by one door: load any transformer or whole checkpoint, name presets."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit import families
from talkingdit.families import preset

if TYPE_CHECKING:
    import torch

    from talkingdit.encoders.text import TextFeatures
    from talkingdit.families.hunyuan_avatar.conditions import AvatarInputs
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel
    from talkingdit.families.puppet.text import PromptEncoder
    from talkingdit.families.wan_s2v.conditions import WanConditions, WanInputs
    from talkingdit.families.wan_s2v.model import WanS2VModel
    from talkingdit.families.wan_s2v.packed import PackedClip
    from talkingdit.families.wan_s2v.sequence import tokens_of

_HOMES = {
    "AvatarInputs": "talkingdit.families.hunyuan_avatar.conditions",
    "HunyuanAvatarModel": "talkingdit.families.hunyuan_avatar.model",
    "PackedClip": "talkingdit.families.wan_s2v.packed",
    "PromptEncoder": "talkingdit.families.puppet.text",
    "TextFeatures": "talkingdit.encoders.text",
    "WanConditions": "talkingdit.families.wan_s2v.conditions",
    "WanInputs": "talkingdit.families.wan_s2v.conditions",
    "WanS2VModel": "talkingdit.families.wan_s2v.model",
    "tokens_of": "talkingdit.families.wan_s2v.sequence",
}

PEOPLE_NAME = "drawn_people"

__all__ = [
    "AvatarInputs",
    "HunyuanAvatarModel",
    "PackedClip",
    "PromptEncoder",
    "TextFeatures",
    "WanConditions",
    "WanInputs",
    "WanS2VModel",
    "default_checkpoint",
    "find_checkpoint",
    "load",
    "load_checkpoint",
    "preset",
    "tokens_of",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'talkingdit.models' has no attribute {name!r}")


def load(
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Any:
    """A transformer from a checkpoint (folder or file), or with random weights from a preset, in evaluation mode.

    Args:
        source: a folder or file, or the name of a preset.
        dtype: of the weights; None is float32.
        device: where the model goes.
        seed: of the random weights of a preset.
        options: of the family's own `load`, such as `config` and `init_from`.

    Raises:
        UserError: no such source, one that does not load, or a dtype or device that cannot be used.
    """
    from talkingdit.pipelines.tuning import check_dtype, open_device

    if dtype is not None:
        check_dtype(dtype, "load")
    return _family_of(source).load.load(source, dtype, open_device(device, "load"), seed, **options)


def _family_of(source: str | Path) -> families.Family:
    """The family of a preset, a folder or a single file."""
    if not Path(source).exists():
        return families.of_preset(str(source))
    for name in families.names():
        family = families.get(name)
        if family.load.loads(Path(source)):
            return family
    return families.get("wan_s2v")  # says what is wrong with it


def load_checkpoint(
    folder: str | Path | None = None, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Any:
    """A whole checkpoint of any family; None is the one that ships with the package.

    Args:
        folder: of any layout that a family knows, or the name of a model that ships, see `find_checkpoint`.
        dtype: of the large models; None is float32. Small ones stay float32.
        device: where the models go.

    Raises:
        UserError: something is missing, does not load, or the parts do not fit each other; or the dtype or the device
            cannot be used.
    """
    import torch

    from talkingdit.pipelines.tuning import check_dtype, open_device

    root = find_checkpoint(folder)
    family = families.of_folder(root)
    dtype = torch.float32 if dtype is None else dtype
    check_dtype(dtype, "load_checkpoint")
    return family.checkpoint.load_checkpoint(root, dtype, open_device(device, "load_checkpoint"))


def default_checkpoint() -> Path:
    """Folder of the model that ships with the package."""
    return find_checkpoint(None)


def find_checkpoint(source: str | Path | None) -> Path:
    """The folder of a checkpoint: one that is given, or one that ships.

    Args:
        source: a folder; or, where none is called so, "drawn" or "drawn_people", the models of drawn characters, one
            and several; None is "drawn".
    """
    from talkingdit.puppets import MODEL, PEOPLE

    if source is None:
        return MODEL
    folder = Path(source).expanduser()
    return folder if folder.exists() else {"drawn": MODEL, PEOPLE_NAME: PEOPLE}.get(str(source), folder)
