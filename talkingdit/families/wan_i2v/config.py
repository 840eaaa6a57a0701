# SPDX-License-Identifier: Apache-2.0
"""Wan I2V transformers as checkpoints write them: names of weights, and settings said or told by their shapes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from talkingdit.checkpoints.bounds import check_bounds
from talkingdit.checkpoints.weights import Weights
from talkingdit.errors import UserError
from talkingdit.families.wan_i2v.presets import PRESETS
from talkingdit.families.wan_s2v.config import HEAD_DIM
from talkingdit.families.wan_s2v.config import native as native

RELEASED = PRESETS["wan_i2v_14b_480p"]
COMPUTING = {"residual_dtype", "attention_backend"}  # how a model computes
ARGUMENTS = {*RELEASED, *COMPUTING}
IMAGE = re.compile(r"img_emb\.|blocks\.\d+\.cross_attn\.(k_img|v_img|norm_k_img)\.")

# Settings of other programs that this model has built in: a config.json may say them, but only so.
_FIXED: dict[str, Callable[[Any], bool]] = {
    "model_type": lambda value: value == "i2v",
    "window_size": lambda value: list(value) == [-1, -1],
    "qk_norm": lambda value: value is True or value == "rms_norm_across_heads",
    "cross_attn_norm": lambda value: value is True,
    "pos_embed_seq_len": lambda value: value is None,
}
_IDLE = ("rope_max_seq_len", "added_kv_proj_dim", "add_img_emb")
_FROM_DIFFUSERS = {"num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim"}


def complete(values: Mapping[str, Any], weights: Weights, where: object) -> dict[str, Any]:
    """Arguments of `WanI2VModel` for a config.json and the weights (native names) that lie beside it.

    What is not said is taken from the shapes of the weights, and what they do not tell from the released model.

    Args:
        values: what config.json says; may be empty.
        weights: with native names.
        where: what messages call the checkpoint.

    Raises:
        UserError: a setting that this model cannot follow, or too little is known.
    """
    check_bounds(dict(values), where)
    said = translate(values, where)
    config = {**RELEASED, **from_shapes(weights.shapes, said, where), **said}
    return as_tuples(config)


def as_tuples(config: dict[str, Any]) -> dict[str, Any]:
    """With tuples where JSON has lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}


def translate(values: Mapping[str, Any], where: object, arguments: set[str] = ARGUMENTS) -> dict[str, Any]:
    """Arguments of the model that a config.json of any of the three programs says.

    Args:
        arguments: that the model has.

    Raises:
        UserError: a setting that this model cannot follow.
    """
    said: dict[str, Any] = {}
    strange = []
    values = dict(values)
    if "attention_head_dim" in values and "num_attention_heads" in values:
        said["dim"] = values.pop("attention_head_dim") * values["num_attention_heads"]
    for key, value in values.items():
        name = _FROM_DIFFUSERS.get(key, key)
        if name in _FIXED:
            if not _FIXED[name](value):
                raise UserError(f"{where}: {key} {value!r} is a variant of Wan that is not supported here.")
        elif name == "image_dim":
            said[name] = value or 0
        elif name in arguments:
            said[name] = value
        elif not name.startswith("_") and name not in _IDLE:
            strange.append(key)
    if strange:
        warnings.warn(f"{where}: settings without a meaning here: {', '.join(strange)}", stacklevel=2)
    return said


def from_shapes(shapes: Mapping[str, tuple[int, ...]], said: Mapping[str, Any], where: object) -> dict[str, Any]:
    """What the shapes of weights (native names) say about the model.

    Raises:
        UserError: these are not the weights of a Wan I2V transformer, or heads are not said and not those of a released
            model.
    """
    marks = ("patch_embedding.weight", "blocks.0.ffn.0.weight", "head.head.weight")
    lost = [name for name in marks if name not in shapes]
    if lost:
        raise UserError(f"{where}: no {lost[0]} in it; not the weights of a Wan transformer.")
    if "casual_audio_encoder.weights" in shapes:
        raise UserError(f"{where}: the weights of a Wan-S2V model, not of a Wan I2V model.")
    try:
        dim, in_dim = shapes["patch_embedding.weight"][:2]
        found: dict[str, Any] = {
            "dim": dim,
            "in_dim": in_dim,
            "out_dim": shapes["head.head.weight"][0] // 4,
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
            "num_layers": count(shapes, r"blocks\.(\d+)\."),
            "freq_dim": shapes["time_embedding.0.weight"][1],
            "text_dim": shapes["text_embedding.0.weight"][1],
            "image_dim": shapes["img_emb.proj.1.weight"][1] if "img_emb.proj.1.weight" in shapes else 0,
            "audio_inject_layers": sorted(
                {int(m[1]) for m in (re.match(r"blocks\.(\d+)\.audio_attn\.", name) for name in shapes) if m}
            ),
        }
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{where}: not the weights of a Wan I2V transformer (no usable {error}).") from error
    if found["in_dim"] == found["out_dim"]:
        raise UserError(f"{where}: the weights of a Wan text-to-video model, which has no place for a picture.")
    if "num_heads" not in said:
        if dim % HEAD_DIM:
            raise UserError(f"{where}: num_heads must be said for a model {dim} wide, no configuration lies beside it.")
        found["num_heads"] = dim // HEAD_DIM
    return found


def count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """How many parts of a numbered list there are."""
    return 1 + max((int(m[1]) for m in (re.match(pattern, name) for name in shapes) if m), default=-1)
