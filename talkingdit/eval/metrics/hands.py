# SPDX-License-Identifier: Apache-2.0
"""How clearly hands can be read and how much they move: HKC and HKV of Wan-S2V (section 4.2), by MediaPipe's hands."""

from __future__ import annotations

import numpy as np

from talkingdit.eval.evidence import Evidence, NotMeasured
from talkingdit.eval.metric import Metric, Value

HANDS = ("hands",)


def _confidence(evidence: Evidence, region: str) -> Value:
    scores = evidence.found.hand_scores[: evidence.frames]
    known = ~np.isnan(scores)
    if not known.any():
        raise NotMeasured("no hand was found")
    curve = tuple(float(s) if seen else None for s, seen in zip(scores, known, strict=True))
    return Value(float(scores[known].mean()), curve)


def _variance(evidence: Evidence, region: str) -> Value:
    """Mean over points of the variance of their places over time, in squared frame heights, times 1000."""
    points = evidence.found.hand_points[: evidence.frames]
    variances = []
    for hand in (points[:, :21], points[:, 21:]):
        shown = hand[~np.isnan(hand[:, 0, 0])]
        if len(shown) > 1:
            variances.append(shown.var(0).sum(-1).mean())
    if not variances:
        raise NotMeasured("no hand was found in two frames")
    return Value(1000 * float(np.mean(variances)))


METRICS = [
    Metric(
        name="hkc",
        title="HKC",
        about="mean score of the hands that are found; the paper averages DWPose's scores of points",
        better="higher",
        regions=HANDS,
        method="mediapipe-hands",
        measure=_confidence,
    ),
    Metric(
        name="hkv",
        title="HKV",
        about="variance of the hands' points over time, in thousandths of a squared frame height",
        better="neither",
        regions=HANDS,
        method="mediapipe-hands",
        measure=_variance,
    ),
]
