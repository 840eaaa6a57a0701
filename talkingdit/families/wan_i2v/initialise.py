# SPDX-License-Identifier: Apache-2.0
"""A model of this base, or of a family on it, that begins from a Wan video model (T2V or I2V)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from talkingdit.checkpoints.fill import check_names
from talkingdit.checkpoints.weights import some
from talkingdit.errors import UserError
from talkingdit.families.wan_i2v.config import IMAGE
from talkingdit.families.wan_s2v.initialise import open_video_model

if TYPE_CHECKING:
    from talkingdit.families.wan_i2v.model import WanI2VModel

PATCHES = "patch_embedding.weight"
# What families have beside a video model.
NEW = re.compile(r"audio_proj\.|blocks\.\d+\.audio_attn\.")


@dataclass(frozen=True)
class InitReport:
    """What `initialise_from_video_model` did; each entry is the name of a weight."""

    source: Path
    taken: tuple[str, ...]  # copied
    widened: tuple[str, ...]  # copied in part: further input channels begin at zero
    new: tuple[str, ...]  # left as they were
    ignored: tuple[str, ...]  # of the source, without a place here

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} weights from {self.source}"]
        if self.widened:
            parts.append(f"{some(list(self.widened))} with further channels of zeros")
        if self.ignored:
            parts.append(f"{len(self.ignored)} of the image branch left aside")
        parts.append(f"{len(self.new)} new")
        return "; ".join(parts)


def initialise_from_video_model(model: WanI2VModel, source: str | Path) -> InitReport:
    """Copy what a Wan 2.1 or 2.2 video model (T2V or I2V) has in common with a model into it.

    Audio layers stay as they are. Input channels that the source has none of begin at zero, which means without effect;
    so does the attention to a picture where the source has none: its values are zero.

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
    audio = [name for name in shapes if NEW.match(name)]
    if audio:
        raise UserError(f"{source}: already a model that hears ({some(audio)}); load it instead.")
    pictures = model.img_emb is not None
    sees = any(IMAGE.match(name) for name in shapes)
    ignored = tuple(name for name in shapes if IMAGE.match(name) and not pictures)
    new = tuple(name for name in parameters if NEW.match(name) or (IMAGE.match(name) and not sees))
    wanted = {name: tuple(p.shape) for name, p in parameters.items() if name not in new}
    widened = tuple(name for name in (PATCHES,) if _narrower(shapes.get(name, ()), wanted[name]))
    found = {name: wanted[name] if name in widened else shape for name, shape in shapes.items() if name not in ignored}
    check_names(wanted, found, weights.source, "a Wan video model of this size")
    with torch.no_grad():
        for name, tensor in weights.renamed(lambda name: None if name in ignored else name).stream():
            target = parameters[name]
            if name in widened:
                target.zero_()
                target[:, : tensor.shape[1]].copy_(tensor)
            else:
                target.copy_(tensor)
        for name in new:
            if ".cross_attn.v_img." in name:
                parameters[name].zero_()
    taken = tuple(name for name in found if name not in widened)
    return InitReport(weights.source, taken, widened, new, ignored)


def _narrower(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """The same convolution with fewer input channels?"""
    return len(found) == len(wanted) and found[1] < wanted[1] and found[:1] + found[2:] == wanted[:1] + wanted[2:]
