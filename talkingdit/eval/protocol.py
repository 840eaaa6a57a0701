# SPDX-License-Identifier: Apache-2.0
"""The two readings of JWB-DH-V1: `jwb-compat` computes what its program computes, `jwb` what its paper means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from talkingdit.eval.metric import Metric, all_metrics
from talkingdit.eval.metrics import compat

Name = Literal["jwb", "jwb-compat"]

# The rows of the published table, then those of other papers, then our own.
ROWS: tuple[str, ...] = ("SC", "BC", "MS", "DD", "AQ", "IQ", "FID", "FVD", "SSIM", "PSNR", "E-FID", "CSIM")
ROWS += ("Sync-C", "Sync-D", "HKC", "HKV", "expression similarity", "CLIP-I", "DINO-I", "WER", "speech MOS")
REGION_ROWS = ("whole", "face", "hands", "left_hand", "right_hand", "body", "sound")


@dataclass(frozen=True)
class Deviation:
    """Something that the two protocols do differently."""

    topic: str
    compat: str
    corrected: str


DEVIATIONS = (
    Deviation(
        "frames",
        "the first 16 of each video",
        "all; networks see at most 64 of them, evenly spread",
    ),
    Deviation(
        "time",
        "frame i against frame i, whatever the frame rates",
        "the true video is read at the times of the generated frames",
    ),
    Deviation(
        "frames without the region",
        "dropped, so that later frames are compared with others' times",
        "marked and left out of means in both videos; the share is a metric, found",
    ),
    Deviation(
        "crops",
        "boxes of single frames, half a side added at each end; those of unusual area left out; all resized to the "
        "first one's size, whatever their proportions",
        "squares of two longer sides of the box, smoothed over five frames",
    ),
    Deviation("people", "the first of them", "each, matched with the true video's by place; the mean of all"),
    Deviation(
        "FID",
        "of each pair of videos, 16 against 16 frames in 2048 dimensions, then averaged",
        "of the set: all frames against all true frames, with a warning below 2,048",
    ),
    Deviation(
        "FVD",
        "of each pair of videos: a single sample each, in effect the squared distance of features",
        "of the set: every 16 frames of all videos, with a warning below 256",
    ),
    Deviation(
        "E-FID",
        "FID of maps of Canny edges",
        "Frechet distance of expressions, as in papers on talking heads: efid[mesh]",
    ),
    Deviation(
        "CSIM",
        "cosine of all pixels",
        "cosine of identity embeddings: csim[...]; the cosine of pixels is pixel_cosine",
    ),
    Deviation(
        "PSNR",
        "infinite for a video with one frame equal to its truth",
        "an equal frame counts 100 dB",
    ),
    Deviation(
        "Frechet distances",
        "a matrix square root that gives numbers below zero or complex ones; FVD adds 1e-6 to the covariances inside "
        "the root only",
        "singular values of centred features: never below zero (also in jwb-compat, where the root is the same number)",
    ),
    Deviation(
        "SC, BC, MS, DD, AQ, IQ",
        "computed elsewhere by VBench; videos that failed count as 0",
        "computed here in VBench's form, under the names of their networks; what failed is counted, not averaged",
    ),
    Deviation("detector", "DWPose, whose weights are not given", "CenterFace and MediaPipe, in both protocols"),
)


def metrics_of(protocol: Name) -> dict[str, Metric]:
    """All metrics of a protocol by name. In jwb-compat those of the published program have its formulas."""
    found = all_metrics()
    if protocol == "jwb-compat":
        found |= {metric.name: metric for metric in compat.METRICS}
    return found


def row_order(title: str) -> int:
    """Where a metric stands in tables."""
    return ROWS.index(title) if title in ROWS else len(ROWS)
