# SPDX-License-Identifier: Apache-2.0
"""Frame against true frame, pixel by pixel, and how sharp frames are."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from talkingdit.errors import UserError
from talkingdit.eval.evidence import Evidence, NotMeasured, RegionView
from talkingdit.eval.metric import PICTURES, FloatArray, Metric, Value, over_people
from talkingdit.eval.similarity import Frame, cosine, peak_signal_to_noise, structural_similarity

PERFECT_PSNR = 100.0  # dB that an equal frame counts in means, so that they stay finite


def _psnr(gen: Frame, truth: Frame) -> float:
    return min(PERFECT_PSNR, peak_signal_to_noise(gen, truth))


def _paired(measure: Callable[[Frame, Frame], float]) -> Callable[[Evidence, str], Value]:
    def of(evidence: Evidence, region: str) -> Value:
        values = []
        for view in evidence.views(region):
            truth = view.need_truth()
            curve = np.full(len(view.gen), np.nan)
            try:
                for f in np.nonzero(view.visible)[0]:
                    curve[f] = measure(view.gen[f], truth[f])
            except UserError as error:  # frames that are too small
                raise NotMeasured(str(error)) from None
            values.append((float(np.nanmean(curve)), curve))
        return over_people(values)

    return of


def sharpness_of(frame: Frame) -> float:
    """Variance of the Laplacian of the grey frame, which blur lowers (Pech-Pacheco et al. 2000)."""
    grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def _sharpness(evidence: Evidence, region: str) -> Value:
    values = []
    for view in evidence.views(region):
        curve: FloatArray = np.full(len(view.gen), np.nan)
        for f in np.nonzero(view.visible)[0]:
            curve[f] = np.log10(1 + sharpness_of(_as_filmed(view, int(f))))
        values.append((float(np.nanmean(curve)), curve))
    return over_people(values)


def _as_filmed(view: RegionView, f: int) -> Frame:
    """A frame without the enlargement of its crop, which looks like blur."""
    frame = view.gen[f]
    if not view.native or view.native >= len(frame):
        return frame
    return np.asarray(cv2.resize(frame, (view.native, view.native), interpolation=cv2.INTER_AREA), np.uint8)


def _found(evidence: Evidence, region: str) -> Value:
    """Share of the frames in which the truth shows the region (all frames without a truth) that show it as well."""
    n = evidence.frames
    found = evidence.found.tracks.get(region, ())
    if evidence.truth is None:
        shown = np.any([track.found[:n] for track in found], axis=0) if found else np.zeros(n, bool)
        return Value(float(shown.mean()), tuple(map(float, shown)))
    true = evidence.found_in_truth.tracks.get(region, ())
    if not true:
        raise NotMeasured(f"the true video shows no {region.replace('_', ' ')}")
    values = []
    for track, partner in zip(true, evidence.partners[region], strict=True):
        seen = found[partner].found[:n] if partner >= 0 else np.zeros(n, bool)
        curve = np.where(track.found[:n], seen[:n].astype(float), np.nan)
        values.append((float(np.nanmean(curve)), curve))
    return over_people(values)


METRICS = [
    Metric(
        name="ssim",
        title="SSIM",
        about="structural similarity with the true frame (Wang et al. 2004)",
        better="higher",
        regions=PICTURES,
        truth=True,
        measure=_paired(structural_similarity),
        perfect=1.0,
    ),
    Metric(
        name="psnr",
        title="PSNR",
        about=f"peak signal-to-noise ratio in dB; an equal frame counts {PERFECT_PSNR:.0f}",
        better="higher",
        regions=PICTURES,
        truth=True,
        measure=_paired(_psnr),
        perfect=PERFECT_PSNR,
    ),
    Metric(
        name="pixel_cosine",
        title="pixel cosine",
        about="cosine of all pixels with those of the true frame, which the published program calls CSIM",
        better="higher",
        regions=PICTURES,
        truth=True,
        measure=_paired(cosine),
        perfect=1.0,
    ),
    Metric(
        name="sharpness",
        title="sharpness",
        about="log10 of 1 + the variance of the Laplacian; no measure of beauty: noise is sharp as well",
        better="neither",
        regions=PICTURES,
        method="laplacian",
        measure=_sharpness,
    ),
    Metric(
        name="found",
        title="found",
        about="share of the frames with the region in the true video in which it is found here too",
        better="higher",
        regions=PICTURES[1:],
        measure=_found,
        perfect=1.0,
    ),
]
