# SPDX-License-Identifier: Apache-2.0
"""Transformers from every kind of file that holds one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from talkingdit.checkpoints.fill import build_empty, fill
from talkingdit.checkpoints.folder import check_class
from talkingdit.checkpoints.weights import Weights, open_weights, read_bounded, read_json, stored_config
from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar import config as configs
from talkingdit.families.hunyuan_avatar.presets import CLASSES

if TYPE_CHECKING:
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel


def load(
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    config: Mapping[str, Any] | None = None,
    init_from: str | Path | None = None,
) -> HunyuanAvatarModel:
    """A transformer from a checkpoint, or with random weights from a preset.

    Weights go to the device one tensor at a time; host memory holds no second copy of the model. Files of the released
    kind (.pt) are read without running code in them.

    Args:
        source: one of

            - the released mp_rank_00_model_states.pt, its 8-bit form with the _map.pt beside it, or a folder that has
              them, such as the released ckpts/; a config.json beside it may say what shapes do not tell;
            - a folder with config.json and *.safetensors, in one file or sharded with an index, as `save_pretrained`
              writes; or a folder that has such a folder as its transformer/;
            - a single .safetensors, .gguf or .pt file of native names, also with scaled float8 weights and name
              prefixes. Settings are taken from shapes, and where those do not tell, from the released model;
            - a name from `PRESETS` for random weights.
        dtype: of the weights; None is float32.
        device: where the model goes.
        seed: of the random weights of a preset; the global generator is left as it was.
        config: settings that go before those of the checkpoint or preset.
        init_from: only with a preset: a HunyuanVideo checkpoint to begin from, see `initialise_from_video_model`.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: no such source, another class, a file that is missing or damaged, or weights that are missing, left
            over or of another shape.
    """
    from talkingdit.families import presets

    path = Path(source)
    dtype = torch.float32 if dtype is None else dtype
    if not path.exists():
        if str(source) not in presets():
            raise UserError(f"{source}: neither a folder nor a preset ({', '.join(sorted(presets()))}).")
        model = _random(str(source), config or {}, dtype, torch.device(device), seed)
        if init_from is not None:
            from talkingdit.families.hunyuan_avatar.initialise import initialise_from_video_model

            initialise_from_video_model(model, init_from)
        return model
    if init_from is not None:
        raise UserError(f"{source}: init_from goes with a preset, this is a checkpoint with weights of its own.")
    weights, values = open_transformer(path)
    return from_weights(weights, {**values, **(config or {})}, dtype, device)


def read_config(source: str | Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of `HunyuanAvatarModel` for what `load` would load from there, without making a tensor.

    Args:
        source, config: as for `load`.

    Raises:
        UserError: see `load`.
    """
    from talkingdit.families import preset, presets

    path = Path(source)
    if not path.exists() and str(source) in presets():
        return preset(str(source), **(config or {}))
    if not path.exists():
        raise UserError(f"{source}: neither a folder nor a preset ({', '.join(sorted(presets()))}).")
    weights, values = open_transformer(path)
    return configs.complete({**values, **(config or {})}, weights, weights.source)


def empty(source: str | Path, config: Mapping[str, Any] | None = None) -> HunyuanAvatarModel:
    """The model that `load` would load from there, without memory: its parameters are on meta.

    Raises:
        UserError: see `load`.
    """
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel

    arguments = read_config(source, config)
    return build_empty(lambda: HunyuanAvatarModel(**arguments), source)


def _random(
    name: str, changes: Mapping[str, Any], dtype: torch.dtype, device: torch.device, seed: int
) -> HunyuanAvatarModel:
    """Random weights, made on the device in the dtype that they have: a large preset does not fit host memory."""
    from talkingdit.families import preset
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel

    arguments: dict[str, Any] = preset(name, **changes)
    default = torch.get_default_dtype()
    on_host = device.type in ("cpu", "meta")
    with torch.random.fork_rng([] if on_host else [device], device_type="cuda" if on_host else device.type):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            with device:
                model = HunyuanAvatarModel(**arguments)
        finally:
            torch.set_default_dtype(default)
    return model.eval()


def open_transformer(path: Path) -> tuple[Weights, dict[str, Any]]:
    """Weights of a transformer under native names, and what its configuration says.

    Raises:
        UserError: see `load`.
    """
    if path.is_dir():
        path = _place(path)
    if path.is_dir():
        values = read_bounded(path / "config.json")
        check_class(path, CLASSES)
        weights = open_weights(path)
    else:
        weights = open_weights(path)
        values = stored_config(weights)
        beside = path.with_name("config.json")
        if not values and path.suffix == ".pt" and beside.is_file():
            values = read_bounded(beside)
    return configs.native(weights), values


def _place(folder: Path) -> Path:
    """The file, or the folder with config.json, that holds the transformer of a folder."""
    released = configs.released_file(folder)
    if released is not None:
        return released
    for place in (folder, folder / "transformer"):
        if (place / "config.json").exists():
            return place
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.gguf")]
    return files[0] if len(files) == 1 else folder


def from_weights(
    weights: Weights, values: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str
) -> HunyuanAvatarModel:
    """A model from its opened weights and what is said about its configuration."""
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel

    where = weights.source
    config = configs.complete(values, weights, where)
    return fill(build_empty(lambda: HunyuanAvatarModel(**config), where), weights, dtype, device)


def loads(source: Path) -> bool:
    """Is this a folder or a file with a transformer of this family? Tensors are not read."""
    if source.is_dir():
        if configs.released_file(source) is not None:
            return True
        for file in (source / "config.json", source / "transformer" / "config.json"):
            if file.is_file():
                return read_json(file).get("_class_name") in CLASSES
        return False
    try:
        return configs.MARK in configs.native(open_weights(source)).shapes
    except UserError:
        return False
