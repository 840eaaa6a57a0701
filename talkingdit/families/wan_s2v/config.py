# SPDX-License-Identifier: Apache-2.0
"""Wan-S2V transformers as checkpoints write them: names of weights, and settings said or told by their shapes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from talkingdit.checkpoints.bounds import check_bounds
from talkingdit.checkpoints.names import has_diffusers_names, to_native, without_prefix
from talkingdit.checkpoints.scaled import descale
from talkingdit.checkpoints.weights import Weights
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.presets import PRESETS

HEAD_DIM = 128  # of every released Wan model
# Arguments of `WanS2VModel`: what released checkpoints differ in, and how a model computes.
ARGUMENTS = {*PRESETS["wan_s2v_14b"], "residual_dtype", "attention_backend", "audio_absorb"}

# Settings of other programs that this model has built in: a config.json may say them, but only so.
_FIXED: dict[str, Callable[[Any], bool]] = {
    "model_type": lambda value: value == "s2v",
    "window_size": lambda value: list(value) == [-1, -1],
    "qk_norm": lambda value: value is True or value == "rms_norm_across_heads",
    "cross_attn_norm": lambda value: value is True,
    "enable_motioner": lambda value: not value,
    "added_kv_proj_dim": lambda value: value is None,
}
# Settings without effect: unused by the official program, or only by the motioner, which is refused above.
_IDLE = ("motion_token_num", "enable_tsm", "trainable_token", "trainable_token_pos_emb", "rope_max_seq_len")
_FROM_DIFFUSERS = {
    "num_attention_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "pose_dim": "cond_dim",
    "num_weighted_avg_layers": "audio_layers",
}


def native(weights: Weights) -> Weights:
    """Weights of a Wan transformer under their native names, without prefixes, 8-bit ones with their scales."""
    weights = descale(weights).renamed(without_prefix)
    return weights.renamed(to_native) if has_diffusers_names(weights.entries) else weights


def complete(values: Mapping[str, Any], weights: Weights, where: object) -> dict[str, Any]:
    """Arguments of `WanS2VModel` for a config.json and the weights (native names) that lie beside it.

    The official program leaves some settings out of its files (text_dim among them), and a single file of weights has
    no configuration at all. What is not said is taken from the shapes of the weights, and what they do not tell from
    the released model.

    Args:
        values: what config.json says; may be empty.
        weights: with native names.
        where: what messages call the checkpoint.

    Raises:
        UserError: a setting that this model cannot follow, or too little is known.
    """
    check_bounds(dict(values), where)
    said = translate(values, where)
    config = {**PRESETS["wan_s2v_14b"], **from_shapes(weights, said, where), **said}
    for name in ("patch_size", "audio_inject_layers", "zip_frame_buckets", "motion_frames"):
        config[name] = tuple(config[name])
    return config


def translate(values: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Arguments of `WanS2VModel` that a config.json of any of the three programs says.

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
                raise UserError(f"{where}: {key} {value!r} is a variant of Wan-S2V that is not supported.")
        elif name == "motion_frames" and isinstance(value, int):
            said[name] = (value, (value + 3) // 4)
        elif name in ARGUMENTS:
            said[name] = value
        elif not name.startswith("_") and name not in _IDLE:
            strange.append(key)
    if strange:
        warnings.warn(f"{where}: settings without a meaning here: {', '.join(strange)}", stacklevel=2)
    return said


def from_shapes(weights: Weights, said: Mapping[str, Any], where: object) -> dict[str, Any]:
    """What the shapes of weights (native names) say about the model.

    Raises:
        UserError: these are not the weights of a Wan-S2V transformer, or heads and audio layers are not said and not
            those of a released model.
    """
    shapes = weights.shapes
    marks = ("patch_embedding.weight", "blocks.0.ffn.0.weight", "head.head.weight")
    lost = [name for name in marks if name not in shapes]
    if lost:
        raise UserError(f"{where}: no {lost[0]} in it; not the weights of a Wan transformer.")
    if "casual_audio_encoder.weights" not in shapes:
        raise UserError(
            f"{where}: the weights of a Wan video model without audio; a Wan-S2V model can be initialised from them "
            f"(init_from), but they are not one."
        )
    try:
        found = _from_shapes(shapes)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{where}: not the weights of a Wan-S2V transformer (no usable {error}).") from error
    dim, layers = found["dim"], found["num_layers"]
    if "num_heads" not in said:
        if dim % HEAD_DIM:
            raise UserError(f"{where}: num_heads must be said for a model {dim} wide, no configuration lies beside it.")
        found["num_heads"] = dim // HEAD_DIM
    if "audio_inject_layers" not in said:
        released = PRESETS["wan_s2v_14b"]
        count = _count(shapes, r"audio_injector\.injector\.(\d+)\.")
        if (layers, count) != (released["num_layers"], len(released["audio_inject_layers"])):
            raise UserError(
                f"{where}: audio_inject_layers must be said for {count} of {layers} blocks, no configuration lies "
                f"beside it."
            )
    return found


def _from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    encoder = "casual_audio_encoder.encoder."
    dim, in_dim = shapes["patch_embedding.weight"][:2]
    adain = any(name.startswith("audio_injector.injector_adain_layers.") for name in shapes)
    return {
        "dim": dim,
        "in_dim": in_dim,
        "out_dim": shapes["head.head.weight"][0] // 4,
        "cond_dim": shapes["cond_encoder.weight"][1] if "cond_encoder.weight" in shapes else 0,
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": _count(shapes, r"blocks\.(\d+)\."),
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "text_dim": shapes["text_embedding.0.weight"][1],
        "audio_dim": shapes[encoder + "conv1_local.conv.weight"][1],
        "audio_layers": shapes["casual_audio_encoder.weights"][1],
        "num_audio_token": shapes[encoder + "conv1_local.conv.weight"][0] // (dim // 4),
        "enable_adain": adain,
        "adain_mode": (
            "attn_norm_out"
            if any(name.startswith("audio_injector.injector_adain_output_layers.") for name in shapes)
            else "attn_norm"
        ),
        "enable_framepack": "frame_packer.proj.weight" in shapes,
    }


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """How many parts of a numbered list there are."""
    return 1 + max((int(m[1]) for m in (re.match(pattern, name) for name in shapes) if m), default=-1)
