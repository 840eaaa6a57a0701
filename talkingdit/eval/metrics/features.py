# SPDX-License-Identifier: Apache-2.0
"""Metrics on features of networks that users give: distances of sets, likeness to the truth, consistency over time."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from talkingdit.eval.evidence import Evidence, NotMeasured, RegionView, spread
from talkingdit.eval.metric import PICTURES, FloatArray, Metric, Value, over_people

MOST_FRAMES = 64  # of a video that are looked at, evenly spread
CLIP_FRAMES, CLIP_SIDE = 16, 224  # of the video network
FID_SAMPLES, FVD_SAMPLES = 2048, 256  # below which a distance depends much on the number of samples


def _unit(features: FloatArray) -> FloatArray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def alike(slot: str, most: int = MOST_FRAMES) -> Callable[[Evidence, str], Value]:
    """Mean cosine of the features of frames and of the true frames, of at most so many of them."""

    def of(evidence: Evidence, region: str) -> Value:
        values = []
        for view in evidence.views(region):
            view.need_truth()
            chosen = spread(view.visible, most)
            if not len(chosen):
                continue
            gen = evidence.features(slot, region, view, False, chosen)
            truth = evidence.features(slot, region, view, True, chosen)
            values.append(_curve(view, chosen, (_unit(gen) * _unit(truth)).sum(1)))
        return over_people(_some(values))

    return of


def consistent(slot: str) -> Callable[[Evidence, str], Value]:
    """VBench's consistency: the mean of a frame's cosines with the first and with the frame before, not below 0."""

    def of(evidence: Evidence, region: str) -> Value:
        values = []
        for view in evidence.views(region):
            chosen = spread(view.visible, MOST_FRAMES)
            if len(chosen) < 2:
                continue
            unit = _unit(evidence.features(slot, region, view, False, chosen))
            first, before = (unit[1:] @ unit[0]).clip(0), (unit[1:] * unit[:-1]).sum(1).clip(0)
            values.append(_curve(view, chosen[1:], (first + before) / 2))
        return over_people(_some(values))

    return of


def scored(slot: str) -> Callable[[Evidence, str], Value]:
    """The mean score of frames."""

    def of(evidence: Evidence, region: str) -> Value:
        values = []
        for view in evidence.views(region):
            chosen = spread(view.visible, MOST_FRAMES)
            if len(chosen):
                values.append(_curve(view, chosen, evidence.features(slot, region, view, False, chosen)[:, 0]))
        return over_people(_some(values))

    return of


def _frames_of(slot: str) -> Callable[[Evidence, str], tuple[FloatArray, FloatArray]]:
    def of(evidence: Evidence, region: str) -> tuple[FloatArray, FloatArray]:
        gen, truth = [], []
        for view in evidence.views(region):
            chosen = spread(view.visible, MOST_FRAMES)
            view.need_truth()
            gen.append(evidence.features(slot, region, view, False, chosen))
            truth.append(evidence.features(slot, region, view, True, chosen))
        return np.concatenate(gen), np.concatenate(truth)

    return of


def _clips(evidence: Evidence, region: str) -> tuple[FloatArray, FloatArray]:
    """Features of every 16 frames in a row; a rest is left out, a video of fewer frames is filled with its last one."""
    network = evidence.network("i3d")
    gen: list[FloatArray] = []
    truth: list[FloatArray] = []
    for view in evidence.views(region):
        for frames, into in ((view.gen, gen), (view.need_truth(), truth)):
            into.append(network(np.stack(_windows(frames, view))))
    return np.concatenate(gen), np.concatenate(truth)


def _windows(frames: np.ndarray, view: RegionView) -> list[np.ndarray]:
    """Inputs [3, 16, 224, 224] in 0..1."""
    shown = frames[view.visible]
    if not len(shown):
        raise NotMeasured("no frame shows the region in both videos")
    if len(shown) < CLIP_FRAMES:
        shown = np.concatenate([shown, np.repeat(shown[-1:], CLIP_FRAMES - len(shown), axis=0)])
    out = []
    for first in range(0, len(shown) - CLIP_FRAMES + 1, CLIP_FRAMES):
        small = [
            cv2.resize(np.ascontiguousarray(frame), (CLIP_SIDE, CLIP_SIDE), interpolation=cv2.INTER_AREA)
            for frame in shown[first : first + CLIP_FRAMES]
        ]
        out.append(np.stack(small).astype(np.float32).transpose(3, 0, 1, 2) / 255)
    return out


def _curve(view: RegionView, chosen: np.ndarray, found: FloatArray) -> tuple[float, FloatArray]:
    curve = np.full(len(view.gen), np.nan)
    curve[chosen] = found
    return float(found.mean()), curve


def _some(values: list[tuple[float, FloatArray]]) -> list[tuple[float, FloatArray]]:
    if not values:
        raise NotMeasured("too few frames show the region in both videos")
    return values


METRICS = [
    Metric(
        name="subject_consistency",
        title="SC",
        about="likeness of frames to the first and to the one before, by DINO (VBench)",
        better="higher",
        regions=PICTURES,
        slot="dino",
        measure=consistent("dino"),
    ),
    Metric(
        name="background_consistency",
        title="BC",
        about="likeness of frames to the first and to the one before, by CLIP (VBench)",
        better="higher",
        regions=PICTURES,
        slot="clip",
        measure=consistent("clip"),
    ),
    Metric(
        name="aesthetic_quality",
        title="AQ",
        about="LAION's aesthetic score of frames (AES in other papers)",
        better="higher",
        regions=PICTURES,
        slot="aesthetic",
        measure=scored("aesthetic"),
    ),
    Metric(
        name="imaging_quality",
        title="IQ",
        about="MUSIQ's score of frames (IQA in other papers)",
        better="higher",
        regions=PICTURES,
        slot="quality",
        measure=scored("quality"),
    ),
    Metric(
        name="fid",
        title="FID",
        about="Frechet distance between the frames of all videos and all true frames",
        better="lower",
        regions=PICTURES,
        slot="inception",
        truth=True,
        collect=_frames_of("inception"),
        least=FID_SAMPLES,
        perfect=0.0,
    ),
    Metric(
        name="fvd",
        title="FVD",
        about="Frechet distance between every 16 frames of all videos and of all true videos",
        better="lower",
        regions=PICTURES,
        slot="i3d",
        truth=True,
        collect=_clips,
        least=FVD_SAMPLES,
        perfect=0.0,
    ),
    Metric(
        name="clip_i",
        title="CLIP-I",
        about="cosine of CLIP's features with the true frame's",
        better="higher",
        regions=PICTURES,
        slot="clip",
        truth=True,
        measure=alike("clip"),
        perfect=1.0,
    ),
    Metric(
        name="dino_i",
        title="DINO-I",
        about="cosine of DINO's features with the true frame's",
        better="higher",
        regions=PICTURES,
        slot="dino",
        truth=True,
        measure=alike("dino"),
        perfect=1.0,
    ),
]
