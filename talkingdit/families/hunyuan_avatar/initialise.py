# SPDX-License-Identifier: Apache-2.0
"""A HunyuanVideo-Avatar model that begins from a HunyuanVideo model, as the released one did."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from talkingdit.checkpoints.fill import check_names
from talkingdit.checkpoints.weights import Weights, open_weights, some
from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.config import native
from talkingdit.families.hunyuan_avatar.injection import copy_bias

if TYPE_CHECKING:
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel

# What the avatar has beside a video model, and what a distilled or an image-to-video model has beside it.
NEW = re.compile(
    r"(audio_proj|audio_adapter_blocks|emotion_in|emotion_adapter_blocks|ref_in|before_proj)\."
    r"|(motion_exp|motion_pose|fps_proj)\."
)
ASIDE = re.compile(r"guidance_in\.|(time_text_embed|context_embedder)\.guidance_embedder\.")
PATCHES = "img_in.proj.weight"

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_REFINER = "context_embedder.token_refiner.refiner_blocks"
# Native names of modules, and the diffusers modules that they are made of: more than one are stacked. A star stands for
# the number of a block.
_MODULES: dict[str, tuple[str, ...]] = {
    "img_in.proj": ("x_embedder.proj",),
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    "txt_in.t_embedder.mlp.0": ("context_embedder.time_text_embed.timestep_embedder.linear_1",),
    "txt_in.t_embedder.mlp.2": ("context_embedder.time_text_embed.timestep_embedder.linear_2",),
    "txt_in.c_embedder.linear_1": ("context_embedder.time_text_embed.text_embedder.linear_1",),
    "txt_in.c_embedder.linear_2": ("context_embedder.time_text_embed.text_embedder.linear_2",),
    "time_in.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    **{
        f"txt_in.individual_token_refiner.blocks.*.{ours}": tuple(f"{_REFINER}.*.{part}" for part in theirs)
        for ours, theirs in {
            "norm1": ("norm1",),
            "norm2": ("norm2",),
            "self_attn_qkv": tuple(f"attn.{name}" for name in _QKV),
            "self_attn_proj": ("attn.to_out.0",),
            "mlp.fc1": ("ff.net.0.proj",),
            "mlp.fc2": ("ff.net.2",),
            "adaLN_modulation.1": ("norm_out.linear",),
        }.items()
    },
    **{
        f"double_blocks.*.{ours}": tuple(f"transformer_blocks.*.{part}" for part in theirs)
        for ours, theirs in {
            "img_mod.linear": ("norm1.linear",),
            "img_attn_qkv": tuple(f"attn.{name}" for name in _QKV),
            "img_attn_q_norm": ("attn.norm_q",),
            "img_attn_k_norm": ("attn.norm_k",),
            "img_attn_proj": ("attn.to_out.0",),
            "img_mlp.fc1": ("ff.net.0.proj",),
            "img_mlp.fc2": ("ff.net.2",),
            "txt_mod.linear": ("norm1_context.linear",),
            "txt_attn_qkv": tuple(f"attn.{name}" for name in _ADDED),
            "txt_attn_q_norm": ("attn.norm_added_q",),
            "txt_attn_k_norm": ("attn.norm_added_k",),
            "txt_attn_proj": ("attn.to_add_out",),
            "txt_mlp.fc1": ("ff_context.net.0.proj",),
            "txt_mlp.fc2": ("ff_context.net.2",),
        }.items()
    },
    **{
        f"single_blocks.*.{ours}": tuple(f"single_transformer_blocks.*.{part}" for part in theirs)
        for ours, theirs in {
            "linear1": (*(f"attn.{name}" for name in _QKV), "proj_mlp"),
            "linear2": ("proj_out",),
            "q_norm": ("attn.norm_q",),
            "k_norm": ("attn.norm_k",),
            "modulation.linear": ("norm.linear",),
        }.items()
    },
}
# Of the native module, scale and shift lie the other way round.
_SWAPPED = "final_layer.adaLN_modulation.1"


@dataclass(frozen=True)
class InitReport:
    """What `initialise_from_video_model` did; each entry is the name of a weight."""

    source: Path
    taken: tuple[str, ...]  # copied
    derived: tuple[str, ...]  # made from the patch embedding
    new: tuple[str, ...]  # left as they were
    ignored: tuple[str, ...]  # of the source, without a place here

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} weights from {self.source}"]
        if self.derived:
            parts.append(f"{len(self.derived)} of the picture's tokenizer from the video's")
        if self.ignored:
            parts.append(f"{some(list(self.ignored))} left aside")
        parts.append(f"{len(self.new)} new")
        return "; ".join(parts)


def initialise_from_video_model(model: HunyuanAvatarModel, source: str | Path) -> InitReport:
    """Take the weights of a HunyuanVideo model into a HunyuanVideo-Avatar model, which keeps its own for the rest.

    The picture's tokenizer begins as the video's (arXiv:2505.20156, section 3.2). Input channels that the video model
    does not have (a reference behind the channels) begin at zero, so that the model begins as the video model; those of
    an image-to-video model beyond the noisy latents' are left aside, and so is the embedding of a guidance scale, which
    distilled models have.

    Args:
        model: on any device, in any dtype; changed in place.
        source: the released .pt or a .safetensors file of native names, or a folder of diffusers'
            `HunyuanVideoTransformer3DModel` or with one as its transformer/.

    Raises:
        UserError: the weights are not those of a HunyuanVideo model of the same size; the model is then as it was.
    """
    weights = _open(Path(source))
    parameters = dict(model.named_parameters())
    ignored = tuple(name for name in weights.shapes if ASIDE.match(name))
    weights = weights.renamed(lambda name: None if ASIDE.match(name) else name)
    renamed = has_diffusers_names(weights)
    shapes = _native_shapes(weights.shapes) if renamed else weights.shapes
    if trained := [name for name in shapes if NEW.match(name)]:
        raise UserError(f"{source}: already a HunyuanVideo-Avatar model ({some(trained)}); load it instead.")
    wanted = {name: tuple(p.shape) for name, p in parameters.items() if not NEW.match(name)}
    found = dict(shapes)
    if _other_channels(found.get(PATCHES, ()), wanted[PATCHES]):
        found[PATCHES] = wanted[PATCHES]
    check_names(wanted, found, weights.source, "a HunyuanVideo model of this size")

    with torch.no_grad():
        for name, tensor in _native_tensors(weights) if renamed else weights.stream():
            target: Tensor = parameters[name]
            if name == PATCHES:
                target.zero_()
                shared = min(tensor.shape[1], target.shape[1])
                tensor, target = tensor[:, :shared], target[:, :shared]
            target.copy_(tensor)
        derived = _derive_tokenizer(model)
    new = tuple(name for name in parameters if NEW.match(name) and name not in derived)
    return InitReport(weights.source, tuple(found), derived, new, ignored)


def is_video_model(source: str | Path) -> bool:
    """Is this a HunyuanVideo model, without what makes an avatar of it? Raises UserError as above."""
    return not any(NEW.match(name) for name in _open(Path(source)).shapes)


def has_diffusers_names(weights: Weights) -> bool:
    """Are these the names of diffusers' `HunyuanVideoTransformer3DModel`?"""
    return "x_embedder.proj.weight" in weights


def native_name(name: str) -> tuple[str, int, int]:
    """Native name of a diffusers weight; which part of the native one it is, and of how many."""
    module, _, kind = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", module)
    general = module if number is None else f"{module[: number.start()]}.*.{module[number.end() :]}"
    for candidate in (general, module):
        if candidate in _PARTS:
            ours, part, count = _PARTS[candidate]
            return f"{ours.replace('*', number[1]) if number else ours}.{kind}", part, count
    return name, 0, 1


_PARTS = {part: (ours, i, len(parts)) for ours, parts in _MODULES.items() for i, part in enumerate(parts)}


def _native_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    rows: dict[str, int] = {}
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        ours, _, _ = native_name(name)
        rows[ours] = rows.get(ours, 0) + shape[0]
        found[ours] = (rows[ours], *shape[1:])
    return found


def _native_tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Tensors under native names; those that are made of several come when the last part has."""
    waiting: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.stream():
        ours, part, count = native_name(name)
        if ours.rpartition(".")[0] == _SWAPPED:
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        parts = waiting.setdefault(ours, {})
        parts[part] = tensor
        if len(parts) == count:
            yield ours, torch.cat([parts[i] for i in range(count)]) if count > 1 else tensor
            del waiting[ours]


def _derive_tokenizer(model: HunyuanAvatarModel) -> tuple[str, ...]:
    """The picture's tokenizer from the video's; returns the names of its weights."""
    if model.ref_in is None:
        return ()
    channels = model.ref_in.proj.weight.shape[1]
    model.ref_in.proj.weight.copy_(model.img_in.proj.weight[:, :channels])
    copy_bias(model.img_in.proj, model.ref_in.proj)
    return ("ref_in.proj.weight", "ref_in.proj.bias")


def _open(path: Path) -> Weights:
    from talkingdit.families.hunyuan_avatar.config import released_file

    if not path.exists():
        raise UserError(f"{path}: there is no such folder or file.")
    if path.is_dir() and (released := released_file(path)) is not None:
        path = released
    elif path.is_dir() and not any(path.glob("*.safetensors")) and (path / "transformer").is_dir():
        path = path / "transformer"
    return native(open_weights(path))


def _other_channels(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """The same convolution, but for the number of input channels?"""
    return len(found) == len(wanted) and found[:1] + found[2:] == wanted[:1] + wanted[2:]
