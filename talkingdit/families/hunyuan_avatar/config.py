# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo-Avatar transformers as checkpoints write them: names of weights, settings told by their shapes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from talkingdit.checkpoints.bounds import check_bounds
from talkingdit.checkpoints.names import without_prefix
from talkingdit.checkpoints.scaled import descale
from talkingdit.checkpoints.weights import Weights, load_pickled
from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.presets import PRESETS

RELEASED = PRESETS["hunyuan_avatar_13b"]
# Arguments of `HunyuanAvatarModel`: what checkpoints differ in, and how a model computes.
ARGUMENTS = {*RELEASED, "residual_dtype", "attention_backend", "audio_absorb"}
MARK = "audio_adapter_blocks.0.to_q.weight"  # what a video model of HunyuanVideo does not have
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def native(weights: Weights) -> Weights:
    """Weights under their native names without prefixes, 8-bit ones with their scales.

    The released 8-bit file has its scales in a file beside it, `<name>_map.pt`, by module.

    Raises:
        UserError: 8-bit weights whose scales are nowhere.
    """
    weights = descale(weights).renamed(without_prefix)
    bare = [name for name, entry in weights.entries.items() if entry.dtype in _FLOAT8 and entry.scale is None]
    if not bare:
        return weights
    beside = {weights.entries[name].file for name in bare}
    scales: dict[str, torch.Tensor] = {}
    for file in beside:
        table = file.with_name(f"{file.stem}_map.pt")
        if not table.is_file():
            raise UserError(f"{file}: has 8-bit weights, and {table.name} with their scales is not beside it.")
        scales |= {without_prefix(name): value for name, value in load_pickled(table).items()}
    entries = dict(weights.entries)
    for name in bare:
        scale = scales.get(name.removesuffix(".weight"), scales.get(name))
        if scale is None:
            raise UserError(f"{weights.source}: the scale of {name} is not in the map beside its file.")
        if scale.numel() not in (1, entries[name].shape[0]):
            raise UserError(
                f"{weights.source}: the scale of {name} must be one number or one per row, got {list(scale.shape)}."
            )
        entries[name] = replace(entries[name], scale=scale.float().flatten())
    return replace(weights, entries=entries)


def complete(values: Mapping[str, Any], weights: Weights, where: object) -> dict[str, Any]:
    """Arguments of `HunyuanAvatarModel` for a config.json and the weights (native names) that lie beside it.

    The released checkpoint has no configuration. What is not said is taken from the shapes of the weights, and what
    they do not tell from the released model.

    Args:
        values: what config.json says; may be empty.
        weights: with native names.
        where: what messages call the checkpoint.

    Raises:
        UserError: too little is known.
    """
    check_bounds(dict(values), where)
    said = {name: value for name, value in values.items() if name in ARGUMENTS}
    strange = [name for name in values if name not in ARGUMENTS and not name.startswith("_")]
    if strange:
        warnings.warn(f"{where}: settings without a meaning here: {', '.join(strange)}", stacklevel=2)
    config = {**RELEASED, **from_shapes(weights, said, where), **said}
    for name in ("patch_size", "rope_dim_list"):
        config[name] = tuple(config[name])
    return config


def from_shapes(weights: Weights, said: Mapping[str, Any], where: object) -> dict[str, Any]:
    """What the shapes of weights (native names) say about the model.

    Raises:
        UserError: these are not the weights of a HunyuanVideo-Avatar transformer, or rope_dim_list is not said and
            heads are not those of the released model.
    """
    shapes = weights.shapes
    for name in ("img_in.proj.weight", "double_blocks.0.img_attn_q_norm.weight", "final_layer.linear.weight"):
        if name not in shapes:
            raise UserError(f"{where}: no {name} in it; not the weights of a HunyuanVideo transformer.")
    if "audio_proj.proj1.weight" not in shapes:
        raise UserError(
            f"{where}: the weights of a HunyuanVideo model without audio; a HunyuanVideo-Avatar model can be "
            f"initialised from them (init_from), but they are not one."
        )
    try:
        found = _from_shapes(shapes, said)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{where}: not the weights of a HunyuanVideo-Avatar transformer (no usable {error})."
        ) from error
    head = found["hidden_size"] // found["num_heads"]
    if "rope_dim_list" not in said and head != sum(RELEASED["rope_dim_list"]):
        raise UserError(f"{where}: rope_dim_list must be said for heads of {head} channels, no configuration says it.")
    return found


def _from_shapes(shapes: Mapping[str, tuple[int, ...]], said: Mapping[str, Any]) -> dict[str, Any]:
    dim, channels = shapes["img_in.proj.weight"][:2]
    out_channels = shapes["final_layer.linear.weight"][0] // 4
    window = said.get("audio_window", RELEASED["audio_window"]) * said.get("audio_blocks", RELEASED["audio_blocks"])
    found = {
        "hidden_size": dim,
        "num_heads": dim // shapes["double_blocks.0.img_attn_q_norm.weight"][0],
        "mlp_width_ratio": shapes["double_blocks.0.img_mlp.fc1.weight"][0] / dim,
        "depth_double_blocks": count(shapes, r"double_blocks\.(\d+)\."),
        "depth_single_blocks": count(shapes, r"single_blocks\.(\d+)\."),
        "text_states_dim": shapes["txt_in.input_embedder.weight"][1],
        "text_states_dim_2": shapes["vector_in.in_layer.weight"][1],
        "audio_channels": shapes["audio_proj.proj1.weight"][1] // window,
        "audio_intermediate": shapes["audio_proj.proj1.weight"][0],
        "audio_tokens": shapes["audio_proj.proj3.weight"][0] // dim,
        "in_channels": out_channels,
        "out_channels": out_channels,
        "freq_dim": shapes["time_in.mlp.0.weight"][1],
        "refiner_depth": count(shapes, r"txt_in\.individual_token_refiner\.blocks\.(\d+)\."),
        "reference_channels": channels == 2 * out_channels,
        "reference_projection": "ref_in.proj.weight" in shapes,
        "emotion": "emotion_in.fc.weight" in shapes,
    }
    return found | ({"adapter_dim": shapes[MARK][0]} if MARK in shapes else {})


def count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """How many parts of a numbered list there are."""
    return 1 + max((int(m[1]) for m in (re.match(pattern, name) for name in shapes) if m), default=-1)


def released_file(folder: Path) -> Path | None:
    """The transformer in a folder of the released layout; None where there is none.

    Looked for in the folder itself, in its transformers/ and in those of hunyuan-video-t2v-720p/. Of a full and an
    8-bit file, the full one.
    """
    places = (folder, folder / "transformers", folder / "hunyuan-video-t2v-720p" / "transformers")
    for place in places:
        for name in ("mp_rank_00_model_states.pt", "mp_rank_00_model_states_fp8.pt"):
            if (place / name).is_file():
                return place / name
    return None
