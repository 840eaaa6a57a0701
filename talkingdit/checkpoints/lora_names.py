# SPDX-License-Identifier: Apache-2.0
"""How the keys of LoRA files are spelt: a place in the model, and what of it. docs/lora.md lists them by trainer.

A place is the name of a module, native or of diffusers, with dots, underscores or both between its parts, behind any
number of prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from talkingdit.checkpoints.names import to_diffusers

PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "module."),
    *("pipe.dit.", "pipe.", "dit.", "unet."),
    *("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_"),
)
_OF = r"(?:\.(?!weight$|bias$)[^.]+)?"  # the name of an adapter
# Ends of keys, and what stands there. The first that fits counts.
_ENDINGS = tuple(
    (re.compile(rf"(?P<place>.+?){ending}$"), what)
    for ending, what in (
        (rf"\.lora_(?:A|down){_OF}\.weight", "down"),
        (rf"\.lora_(?:B|up){_OF}\.weight", "up"),
        (rf"\.lora_(?:B|up){_OF}\.bias", "up_bias"),
        (r"(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight", "down"),
        (r"(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight", "up"),
        (r"\.lora_(?:A|down)", "down"),
        (r"\.lora_(?:B|up)", "up"),
        (r"\.alpha", "alpha"),
        (r"\.hada_(?P<what>w1_a|w1_b|w2_a|w2_b)", "hada_"),
        (r"\.lokr_(?P<what>w1|w1_a|w1_b|w2|w2_a|w2_b)", "lokr_"),
        (r"\.(?:diff|w_norm)", "weight"),
        (r"\.(?:diff_b|b_norm)", "bias"),
        (r"\.diff_m", "modulation"),
        (r"\.set_weight", "new weight"),
        (rf"(?:\.modules_to_save{_OF})?\.weight", "new weight"),
        (rf"(?:\.modules_to_save{_OF})?\.bias", "new bias"),
    )
)
_ADAPTER = re.compile(r"\.lora_(?:A|B|down|up)\.((?!weight$|bias$)[^.]+)\.(?:weight|bias)$")
# What makes something else than a sum of matrices of a file.
REFUSED = (
    (re.compile(r"\.(dora_scale|lora_magnitude_vector(\..+)?)$"), "DoRA"),
    (re.compile(r"\.(hada_t[12]|lokr_t2|lora_mid\.weight)$"), "a Tucker decomposition"),
    (re.compile(r"\.(oft_(blocks|diag|R)|boft_R|vera_lambda_[bd]|[ab][12]\.weight)$"), "OFT, VeRA or GLoRA"),
)
# Layers of I2V models that Wan-S2V does not have.
IMAGE = re.compile(r"img_emb|[._](k|v|norm_k)_img|add_[kv]_proj|norm_added_k|image_embedder")
NETWORK = ("lokr_factor",)  # what a trainer says of the whole file, behind no place


@dataclass(frozen=True)
class Key:
    """A key of a file, taken apart."""

    place: str  # as the file spells it
    what: str  # down, up, alpha, hada_w1_a, weight (a difference), new weight, ...


def read_key(key: str) -> Key | None:
    """The place and the kind of a key; None where it is of no kind that is known."""
    for pattern, what in _ENDINGS:
        if match := pattern.match(key):
            return Key(match["place"], what + match["what"] if what.endswith("_") else what)
    return None


def adapter_of(key: str) -> str:
    """The name of the adapter that a key has in front of `weight`, "" where it has none."""
    match = _ADAPTER.search(key)
    return "" if match is None else match[1]


class ModuleNames:
    """Names of a model's modules and parameters by every spelling.

    Args:
        model: with native names. It is only read.
    """

    def __init__(self, model: nn.Module):
        self.shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
        self._modules: dict[str, str] = {}
        self._parameters: dict[str, str] = {}
        for name in self.shapes:
            module, _, leaf = name.rpartition(".")
            _spell(self._parameters, name)
            if leaf in ("weight", "bias"):
                _spell(self._modules, module)
            elif leaf == "modulation":
                self._modules[_flat(module)] = module

    def module(self, place: str) -> str | None:
        """The module that a file means by a place; None where the model has none."""
        return _find(self._modules, place)

    def parameter(self, place: str) -> str | None:
        """The parameter that a file means by a place; None where the model has none."""
        return _find(self._parameters, place)


def _spell(spelled: dict[str, str], name: str) -> None:
    other = to_diffusers(name)
    for spelling in (name, other, other.removesuffix(".0") if other.endswith("to_out.0") else other):
        spelled.setdefault(_flat(spelling), name)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _find(spelled: Mapping[str, str], place: str) -> str | None:
    while True:
        if (found := spelled.get(_flat(place))) is not None:
            return found
        prefix = next((prefix for prefix in PREFIXES if place.startswith(prefix)), None)
        if prefix is None:
            return None
        place = place.removeprefix(prefix)
