# SPDX-License-Identifier: Apache-2.0
"""The published protocol as coded: its formulas on its crops. Values are of single videos and averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from talkingdit.eval import jwb_compat
from talkingdit.eval.clip import Frames
from talkingdit.eval.evidence import Evidence, NotMeasured
from talkingdit.eval.metric import Metric, Value
from talkingdit.eval.tracks import Track

REGIONS = ("whole", "face", "hands")
MARGIN = 0.5  # of a box's side, added at each end
WIDE_MARGIN, SMALL_HAND = 1.0, 20  # of hands whose longer side is less than 20 pixels
LEAST_FACE = 50  # pixels of a face's crop
AREAS = {"face": (2000, 10000), "hands": (2000, 15000)}  # squared pixels of the crops that count, unless none does


def published_crops(frames: Frames, track: Track | None, region: str) -> npt.NDArray[np.uint8]:
    """Crops of the frames in which the region was found, all at the size of the first: uint8 [n, h, w, 3].

    Raises:
        NotMeasured: it was found nowhere.
    """
    boxes = [] if track is None else [(f, _widened(track.boxes[f], region)) for f in np.nonzero(track.found)[0]]
    low, high = AREAS[region]
    fit = [(f, box) for f, box in boxes if low <= (box[2] - box[0]) * (box[3] - box[1]) <= high]
    cut = [frames[f][max(0, y0) : y1, max(0, x0) : x1] for f, (x0, y0, x1, y1) in (fit or boxes)]
    cut = [crop for crop in cut if crop.size]
    if not cut:
        raise NotMeasured(f"no {region} was found")
    size = (cut[0].shape[1], cut[0].shape[0])
    return np.stack([np.asarray(cv2.resize(np.ascontiguousarray(crop), size), np.uint8) for crop in cut])


def _widened(box: npt.NDArray[np.float64], region: str) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = map(float, box)
    width, height = x1 - x0, y1 - y0
    if region == "hands" and max(width, height) < SMALL_HAND:
        dx = dy = WIDE_MARGIN * max(width, height)
    else:
        dx, dy = MARGIN * width, MARGIN * height
    if region == "face":
        dx, dy = max(dx, (LEAST_FACE - width) / 2), max(dy, (LEAST_FACE - height) / 2)
    return round(x0 - dx), round(y0 - dy), round(x1 + dx), round(y1 + dy)


def _of(name: str, slot: str = "") -> Callable[[Evidence, str], Value]:
    def measure(evidence: Evidence, region: str) -> Value:
        if evidence.truth is None:
            raise NotMeasured("needs a true video")
        gen, truth = evidence.gen.frames, evidence.truth.frames
        if region != "whole":
            tracks = evidence.found.tracks.get(region, ()), evidence.found_in_truth.tracks.get(region, ())
            gen, truth = (
                published_crops(frames, found[0] if found else None, region)
                for frames, found in zip((gen, truth), tracks, strict=True)
            )
        blue_first = gen[..., ::-1], truth[..., ::-1]
        function: Any = getattr(jwb_compat, name)
        if not slot:
            return Value(function(*blue_first))
        if name in ("fid", "efid") and min(len(gen), len(truth)) < 2:
            raise NotMeasured("needs two frames")
        return Value(function(*blue_first, _network(evidence.network(slot))))

    return measure


def _network(of_slot: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the formulas call: a tensor in, a tensor out, pixels already normalised."""
    return lambda pixels: torch.from_numpy(np.asarray(of_slot.run(pixels.numpy())))


def _metric(name: str, title: str, about: str, better: Any, slot: str = "", perfect: float = 0.0) -> Metric:
    return Metric(
        name=name,
        title=title,
        about=about,
        better=better,
        regions=REGIONS,
        slot=slot,
        method="jwb-compat",
        truth=True,
        measure=_of(name, slot),
        perfect=perfect,
        first=True,
        version=2,
    )


METRICS = [
    _metric("fid", "FID", "frames of one video against those of its truth, at most 16", "lower", "inception"),
    _metric("fvd", "FVD", "one video against its truth", "lower", "i3d"),
    _metric("ssim", "SSIM", "first 16 frames", "higher", perfect=1.0),
    _metric("psnr", "PSNR", "first 16 frames, infinite where they are equal", "higher", perfect=float("inf")),
    _metric("efid", "E-FID", "FID of Canny edges", "lower", "inception"),
    _metric("csim", "CSIM", "cosine of pixels, first 16 frames", "higher", perfect=1.0),
]
