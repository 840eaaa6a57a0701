# SPDX-License-Identifier: Apache-2.0
"""Motion by optical flow (OpenCV's DIS, Kroeger et al. 2016), in the forms of VBench with another flow: own names."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from talkingdit.detect.motion import flow_between
from talkingdit.eval.evidence import Evidence, NotMeasured, RegionView
from talkingdit.eval.metric import PICTURES, FloatArray, Metric, Value, over_people

Grey = npt.NDArray[np.uint8]

LONGEST = 512  # pixels of a side at which flow is computed
TOP_SHARE = 0.05  # of pixels, whose mean flow is a frame's motion
MOVES = 6.0  # pixels per frame at a shorter side of 256 above which a frame moves
LEAST_SIDE = 8  # pixels in which there is something to see move
NEEDED = 4 / 16  # share of frames that move in a dynamic video


def _greys(view: RegionView) -> list[Grey]:
    """The frames in grey, at most 512 pixels long.

    Raises:
        NotMeasured: they are too small for the flow.
    """
    if min(view.gen.shape[1:3]) < LEAST_SIDE:
        raise NotMeasured(f"needs sides of at least {LEAST_SIDE} pixels, got {view.gen.shape[2]}x{view.gen.shape[1]}")
    scale = min(1.0, LONGEST / max(view.gen.shape[1:3]))
    size = (max(LEAST_SIDE, round(view.gen.shape[2] * scale)), max(LEAST_SIDE, round(view.gen.shape[1] * scale)))
    greys = []
    for frame in view.gen:
        small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA) if scale < 1 else frame
        greys.append(np.asarray(cv2.cvtColor(np.ascontiguousarray(small), cv2.COLOR_RGB2GRAY), np.uint8))
    return greys


def _flow(a: Grey, b: Grey) -> npt.NDArray[np.float32]:
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    return flow_between(dis, a, b)


def _smoothness(evidence: Evidence, region: str) -> Value:
    """1 - mean difference between a frame and what its neighbours say it should be, over 255."""
    values = []
    for view in evidence.views(region):
        greys, shown = _greys(view), view.visible
        curve = np.full(len(greys), np.nan)
        for f in range(1, len(greys) - 1):
            if shown[f - 1 : f + 2].all():
                between = _between(greys[f - 1], greys[f + 1])
                curve[f] = 1 - float(np.abs(between - greys[f]).mean()) / 255
        if np.isnan(curve).all():
            raise NotMeasured("needs three frames in a row")
        values.append((float(np.nanmean(curve)), curve))
    return over_people(values)


def _between(before: Grey, after: Grey) -> FloatArray:
    """The frame half-way between two, by their flow."""
    height, width = before.shape
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    half = _flow(before, after) / 2
    first = cv2.remap(before, x - half[..., 0], y - half[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    last = cv2.remap(after, x + half[..., 0], y + half[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    mean: FloatArray = (first.astype(np.float64) + last) / 2
    return mean


def _amounts(evidence: Evidence, region: str) -> list[tuple[FloatArray, float]]:
    """For each person the motion [F] between each frame and the next, and the threshold above which it counts."""
    out = []
    for view in evidence.views(region):
        greys, shown = _greys(view), view.visible
        curve = np.full(len(greys), np.nan)
        for f in range(len(greys) - 1):
            if shown[f] and shown[f + 1]:
                lengths = np.sort(np.linalg.norm(_flow(greys[f], greys[f + 1]), axis=-1).ravel())
                curve[f] = float(lengths[-max(1, round(TOP_SHARE * len(lengths))) :].mean())
        if np.isnan(curve).all():
            raise NotMeasured("needs two frames in a row")
        out.append((curve, MOVES * min(greys[0].shape) / 256))
    return out


def _dynamic(evidence: Evidence, region: str) -> Value:
    values = []
    for curve, limit in _amounts(evidence, region):
        moving = np.nanmean(np.where(np.isnan(curve), np.nan, curve > limit))
        values.append((float(moving >= NEEDED), curve))
    return over_people(values)


def _amount(evidence: Evidence, region: str) -> Value:
    return over_people(
        [
            (float(np.nanmean(curve)) * MOVES / limit, curve * MOVES / limit)
            for curve, limit in _amounts(evidence, region)
        ]
    )


METRICS = [
    Metric(
        name="motion_smoothness",
        title="MS",
        about="how well a frame is the middle of its neighbours, by optical flow; 1 is perfect",
        better="higher",
        regions=PICTURES,
        method="opencv-dis",
        measure=_smoothness,
    ),
    Metric(
        name="dynamic_degree",
        title="DD",
        about="1 if a quarter of the frames move by more than VBench's threshold; the mean over a set is a share",
        better="neither",
        regions=PICTURES,
        method="opencv-dis",
        measure=_dynamic,
    ),
    Metric(
        name="motion",
        title="motion",
        about="mean flow of the twentieth of pixels that move most, in pixels per frame at a shorter side of 256",
        better="neither",
        regions=PICTURES,
        method="opencv-dis",
        measure=_amount,
    ),
]
