# SPDX-License-Identifier: Apache-2.0
"""A Wan-S2V model that begins from a Wan video model, as the released one did."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from talkingdit import ops
from talkingdit.checkpoints.weights import Weights, open_weights, some
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.config import native

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.model import WanS2VModel

PATCHES = "patch_embedding.weight"
# What S2V has beside a video model, and what the image branch of an I2V model has beside S2V.
NEW = re.compile(r"(casual_audio_encoder|audio_injector|cond_encoder|trainable_cond_mask|frame_packer)\.")
IMAGE = re.compile(r"img_emb\.|blocks\.\d+\.cross_attn\.(k_img|v_img|norm_k_img)\.")


@dataclass(frozen=True)
class InitReport:
    """What `initialise_from_video_model` did; each entry is the name of a weight."""

    source: Path
    taken: tuple[str, ...]  # copied
    cut: tuple[str, ...]  # copied in part: the first input channels
    derived: tuple[str, ...]  # made from the patch embedding
    new: tuple[str, ...]  # left as they were
    ignored: tuple[str, ...]  # of the source, without a place here

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} weights from {self.source}"]
        if self.cut:
            parts.append(f"the first channels of {some(list(self.cut))}, the rest is for an image this model has not")
        if self.derived:
            parts.append(f"{len(self.derived)} of the history packer from the patch embedding")
        if self.ignored:
            parts.append(f"{len(self.ignored)} of the image branch left aside")
        parts.append(f"{len(self.new)} new")
        return "; ".join(parts)


def initialise_from_video_model(model: WanS2VModel, source: str | Path) -> InitReport:
    """Copy what a Wan 2.1 or 2.2 video model (T2V or I2V) has in common with a Wan-S2V model into it.

    Audio layers, the pose encoder and the token kinds stay as they are, which with `zero_init` means without effect.
    The history packer begins as FramePack's does (arXiv:2504.12626): its kernels are the patch embedding repeated and
    divided by the number of repeats. The patch embedding of an I2V model has further input channels for an image and
    its mask; only the first in_dim, those of the noisy latents, are taken.

    Args:
        model: on any device, in any dtype; changed in place.
        source: a folder with *.safetensors (official or diffusers names) or with a transformer/ of that kind, or one
            file.

    Raises:
        UserError: the weights are not those of a video model of the same size; the model is then as it was.
    """
    weights = open_video_model(Path(source))
    parameters = dict(model.named_parameters())
    shapes = weights.shapes
    ignored = tuple(name for name in shapes if IMAGE.match(name))
    cut = tuple(name for name in (PATCHES,) if _is_wider(shapes.get(name, ()), tuple(parameters[name].shape)))
    wanted = {name: tuple(p.shape) for name, p in parameters.items() if not NEW.match(name)}
    found = {name: wanted[name] if name in cut else shape for name, shape in shapes.items() if not IMAGE.match(name)}
    _check(wanted, found, weights.source)

    with torch.no_grad():
        for name, tensor in weights.renamed(lambda name: None if IMAGE.match(name) else name).stream():
            target = parameters[name]
            target.copy_(tensor[:, : target.shape[1]] if name in cut else tensor)
        derived = _derive_packer(model)
    new = tuple(name for name in parameters if NEW.match(name) and name not in derived)
    taken = tuple(name for name in found if name not in cut)
    return InitReport(weights.source, taken, cut, derived, new, ignored)


def is_video_model(source: str | Path) -> bool:
    """Is this a Wan video model, without the layers that make a Wan-S2V model of it? Raises UserError as above."""
    return not any(NEW.match(name) for name in open_video_model(Path(source)).shapes)


def open_video_model(path: Path) -> Weights:
    """Weights of a video model under native names, from a folder of any layout or a file; UserError for none."""
    if not path.exists():
        raise UserError(f"{path}: there is no such folder or file.")
    if path.is_dir() and not any(file.suffix in (".safetensors", ".gguf") for file in path.iterdir()):
        if (path / "transformer").is_dir():
            path = path / "transformer"
        elif experts := sorted(p.name for p in path.glob("*_noise_model")):
            raise UserError(f"{path}: has {' and '.join(experts)}; name one of these folders.")
    return native(open_weights(path))


def _is_wider(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """The same convolution with more input channels?"""
    return len(found) == len(wanted) and found[1] > wanted[1] and found[:1] + found[2:] == wanted[:1] + wanted[2:]


def _check(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], source: Path) -> None:
    from talkingdit.checkpoints.fill import check_names

    audio = [name for name in found if NEW.match(name)]
    if audio:
        raise UserError(f"{source}: already a Wan-S2V model ({some(audio)}); load it instead.")
    check_names(wanted, found, source, "a Wan video model of this size")


def _derive_packer(model: WanS2VModel) -> tuple[str, ...]:
    """Kernels of the history packer from the patch embedding; returns their names."""
    packer = model.frame_packer
    if packer is None:
        return ()
    names = []
    patches = model.patch_embedding
    for name, conv in packer.named_children():
        assert isinstance(conv, nn.Conv3d)
        assert conv.bias is not None
        assert patches.bias is not None
        kt, kh, kw = conv.kernel_size
        weight, _ = ops.init_bucket_weight(patches.weight.float(), None, (kt, kh, kw))
        conv.weight.copy_(weight)
        conv.bias.copy_(patches.bias)
        names += [f"frame_packer.{name}.weight", f"frame_packer.{name}.bias"]
    return tuple(names)
