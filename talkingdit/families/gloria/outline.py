# SPDX-License-Identifier: Apache-2.0
"""What a Gloria video will be: chunks that share latents, and the anchors that stand beside all of them.

Frame 0 is the picture itself, which is shown. The first chunk of T latents has 1 + 4 (T - 1) frames; each later one
begins with the last latents of the one before it (section 4.3), which it shows. So n chunks of T latents that share P
show 4 n (T - P) frames, and 1 + 4 (P - 1) behind them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT
from talkingdit.errors import UserError
from talkingdit.families.gloria.anchors import GLOBAL, KINDS, AnchorFile, check_once
from talkingdit.families.gloria.options import Options
from talkingdit.families.wan_i2v.outline import Details as WanDetails
from talkingdit.families.wan_i2v.outline import latents_of_frames, outlined, sampling_of, video_frames
from talkingdit.media.files import read_image
from talkingdit.media.framing import fit_image, output_size
from talkingdit.media.targets import check_apart, check_writable
from talkingdit.pipelines.inputs import Frames, Inputs, Outline
from talkingdit.pipelines.plans import ChunkPrefix

if TYPE_CHECKING:
    from talkingdit.families.gloria.checkpoint import GloriaSettings

LEAST = 16  # pixels that sides of anchors are multiples of


@dataclass(frozen=True)
class AnchorImage:
    """An anchor that was read, in the size in which it is encoded."""

    type: str
    kind: str
    image: Frames  # [h, w, 3] uint8

    @property
    def name(self) -> str:
        return self.type if self.type == GLOBAL else f"{self.type}/{self.kind}"


@dataclass(frozen=True)
class Details(WanDetails):
    """What the pipeline knows of a video besides its outline."""

    anchors: tuple[AnchorImage, ...]
    plan: ChunkPrefix


def chunk_plan(chunk_latents: int, prefix_latents: int) -> ChunkPrefix:
    """Chunks of a video: the last latents of one are given clean to the next, at all steps, and blended linearly."""
    return ChunkPrefix(chunk_latents, prefix_latents)


def read_anchors(
    files: tuple[AnchorFile, ...], picture: Frames, size: tuple[int, int], settings: GloriaSettings, cover: bool
) -> tuple[AnchorImage, ...]:
    """The anchors of a video in the sizes in which they are encoded; without a global one the picture is it.

    Args:
        picture: [H, W, 3] the first frame.
        size: height and width of the video, which is the global anchor's too.
        cover: as `Options.cover`.

    Raises:
        UserError: a file is none, an anchor is given twice, or no size fits.
    """
    check_once(files)
    found = []
    for anchor in sorted(files, key=lambda one: (list(KINDS).index(one.type), KINDS[one.type].index(one.kind))):
        image = read_image(anchor.path)
        fitted = size
        if anchor.type != GLOBAL:
            try:
                fitted = output_size(image.shape[0], image.shape[1], settings.anchor_area, LEAST)
            except UserError as error:
                raise UserError(f"anchor {anchor.name}: {str(error).removeprefix('size: ')}") from error
        found.append(AnchorImage(anchor.type, anchor.kind, fit_image(image, fitted, cover or anchor.type != GLOBAL)[0]))
    if not any(anchor.type == GLOBAL for anchor in found):
        found.insert(0, AnchorImage(GLOBAL, KINDS[GLOBAL][0], fit_image(picture, size, cover)[0]))
    return tuple(found)


def outline(inputs: Inputs, settings: GloriaSettings, options: Options) -> Outline:
    """What video will be made of these inputs, without any model.

    Raises:
        UserError: an option is impossible, an anchor is no picture, or no size fits.
    """
    sampling = sampling_of(options, settings)
    if settings.prefix_latents >= sampling.chunk_latents:
        raise UserError(
            f"generate: chunk_latents must be more than the {settings.prefix_latents} that chunks share, "
            f"got {sampling.chunk_latents}."
        )
    beside: tuple[Path, ...] = ()
    if options.attention_figure is not None:
        figure, job = options.attention_figure, inputs.job
        written = {"attention_figure": figure, "attention_figure's numbers": figure.with_suffix(".csv")}
        read = {"image": job.image, "audio": job.audio, **options.files()}
        check_apart({"output": job.output, "sheet": job.sheet, **written}, read)
        for target in written.values():
            check_writable(target)
        beside = tuple(written.values())
    plan = chunk_plan(sampling.chunk_latents, settings.prefix_latents)
    latents = latents_of_frames(video_frames(inputs, settings.fps, options))
    chunks = len(list(plan.stages(latents)))
    plain = outlined(inputs, settings, options, sampling, chunks)
    anchors = read_anchors(options.anchor, inputs.image, plain.size, settings, options.cover)
    if options.no_global_anchor:
        anchors = tuple(anchor for anchor in anchors if anchor.type != GLOBAL)
    kept = {anchor.name: _digest(anchor.image) for anchor in anchors}
    return replace(
        plain,
        clip_frames=FRAMES_PER_LATENT * (plan.window - plan.overlap),
        overlap_frames=FRAMES_PER_LATENT * (plan.overlap - 1) + 1,
        settings={**plain.settings, "anchors": kept, "attention figure": options.attention_figure is not None},
        details=Details(sampling, options, latents, anchors, plan),
        beside=beside,
    )


def _digest(image: Frames) -> str:
    found = hashlib.sha256(str(image.shape).encode())
    found.update(np.ascontiguousarray(image).data)
    return found.hexdigest()[:32]
