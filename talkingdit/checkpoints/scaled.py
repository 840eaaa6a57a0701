# SPDX-License-Identifier: Apache-2.0
"""8-bit weight files as ComfyUI writes them: float8 weights with a scale beside each, read as what they stand for."""

from __future__ import annotations

import json
from dataclasses import replace

from talkingdit.checkpoints.weights import TensorEntry, Weights
from talkingdit.errors import UserError

# Beside `x.weight`: its scale in the older and the newer spelling. The scales of activations and the markers say how
# to multiply in 8 bits, which is not what the weights are.
SCALES = (".scale_weight", ".weight_scale")
NOTES = (".scale_input", ".input_scale", ".comfy_quant")
MARKER = "scaled_fp8"


def descale(weights: Weights) -> Weights:
    """The same weights with their scales attached, so that reading them gives real values; others as they are.

    Raises:
        UserError: weights in a format other than scaled float8, or a scale without its weight.
    """
    _check_formats(weights)
    entries: dict[str, TensorEntry] = {}
    scales: dict[str, str] = {}
    for name, entry in weights.entries.items():
        suffix = next((s for s in SCALES if name.endswith(s)), None)
        if suffix is not None:
            scales[name.removesuffix(suffix) + ".weight"] = name
        elif name != MARKER and not name.endswith("." + MARKER) and not name.endswith(NOTES):
            entries[name] = entry
    values = weights.read(scales.values())
    for weight, scale in scales.items():
        if weight not in entries:
            raise UserError(f"{weights.source}: has {scale} but no {weight}.")
        found = values[scale].float()
        rows = entries[weight].shape[:1]
        if found.numel() != 1 and tuple(found.flatten().shape) != rows:
            raise UserError(
                f"{weights.source}: {scale} must be one number or one per row of {weight}, got {list(found.shape)}."
            )
        entries[weight] = replace(entries[weight], scale=found.flatten())
    return replace(weights, entries=entries)


def _check_formats(weights: Weights) -> None:
    for name in weights.entries:
        if name.endswith(".weight_scale_2"):
            raise UserError(f"{weights.source}: 4-bit weights ({name}) are not supported, only scaled float8.")
    for name, note in weights.read(name for name in weights.entries if name.endswith(".comfy_quant")).items():
        try:
            kind = json.loads(bytes(note.tolist())).get("format")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{weights.source}: {name} is not a readable description of a format.") from error
        if kind not in ("float8_e4m3fn", "float8_e5m2"):
            raise UserError(f"{weights.source}: {name} says {kind!r}, only scaled float8 is supported.")
