# SPDX-License-Identifier: Apache-2.0
"""Boxes of one thing over the frames of a video, and square crops along them. Frames without it are marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from talkingdit.detect.boxes import Box, overlap

Boxes = npt.NDArray[np.float64]

LEAST_OVERLAP = 0.1  # of boxes in neighbouring frames that are the same thing
LONGEST_GAP = 12  # frames after which what reappears is something new
LEAST_SHARE = 0.2  # of the frames that a track must have; the published protocol reports videos below it
SMOOTHED = 5  # frames over which boxes are averaged before cropping
LEAST_SIDE = 8.0  # pixels of a crop's square


@dataclass(frozen=True)
class Track:
    """One thing.

    Attributes:
        boxes: [F, 4] as x0, y0, x1, y1 in pixels; NaN in frames in which it was not found.
        scores: [F], of the detector; NaN likewise.
        items: [F] indices of the detections, -1 where there is none.
    """

    boxes: Boxes
    scores: npt.NDArray[np.float64]
    items: npt.NDArray[np.int64]

    @property
    def found(self) -> npt.NDArray[np.bool_]:
        """In which frames it was found: [F]."""
        return ~np.isnan(self.boxes[:, 0])


def link(detections: Sequence[Sequence[tuple[Box, float]]]) -> list[Track]:
    """Join detections of single frames to tracks, the longest first; those in few frames are left out.

    Args:
        detections: for each frame the boxes that were found, with their scores.
    """
    frames = len(detections)
    open_: list[tuple[int, Box, dict[int, int]]] = []  # last frame, last box, detections by frame
    for f, found in enumerate(detections):
        likely = sorted(
            (-overlap(box, last), t, d)
            for t, (seen, last, _) in enumerate(open_)
            if f - seen <= LONGEST_GAP
            for d, (box, _) in enumerate(found)
        )
        taken_tracks: set[int] = set()
        taken: set[int] = set()
        for negative, t, d in likely:
            if -negative >= LEAST_OVERLAP and t not in taken_tracks and d not in taken:
                taken_tracks.add(t)
                taken.add(d)
                open_[t] = (f, found[d][0], open_[t][2] | {f: d})
        open_ += [(f, box, {f: d}) for d, (box, _) in enumerate(found) if d not in taken]
    kept = [members for _, _, members in open_ if len(members) >= LEAST_SHARE * frames]
    return [_track(members, detections) for members in sorted(kept, key=lambda members: -len(members))]


def _track(members: dict[int, int], detections: Sequence[Sequence[tuple[Box, float]]]) -> Track:
    frames = len(detections)
    boxes, scores = np.full((frames, 4), np.nan), np.full(frames, np.nan)
    items = np.full(frames, -1, np.int64)
    for f, d in members.items():
        (boxes[f], scores[f]), items[f] = detections[f][d], d
    return Track(boxes, scores, items)


def match(
    tracks: Sequence[Track], size: tuple[int, int], others: Sequence[Track], size_of_others: tuple[int, int]
) -> list[int]:
    """For each track the index of the other video's track that lies where it does, -1 where there is none left.

    Args:
        size, size_of_others: height and width of the frames, which may differ.
    """
    scale = np.array([size_of_others[1] / size[1], size_of_others[0] / size[0]] * 2)
    likely = sorted(
        (_distance(one.boxes * scale, other.boxes), i, j)
        for i, one in enumerate(tracks)
        for j, other in enumerate(others)
    )
    partner, taken = [-1] * len(tracks), set[int]()
    for _, i, j in likely:
        if partner[i] < 0 and j not in taken:
            partner[i] = j
            taken.add(j)
    return partner


def _distance(a: Boxes, b: Boxes) -> float:
    """Mean distance of the boxes' middles over the frames that have both, in pixels; far apart where none has."""
    frames = min(len(a), len(b))
    gaps = np.linalg.norm(_middles(a[:frames]) - _middles(b[:frames]), axis=1)
    return float(np.nanmean(gaps)) if not np.isnan(gaps).all() else 1e9


def _middles(boxes: Boxes) -> Boxes:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def crops(frames: npt.NDArray[np.uint8], track: Track, side: int, margin: float) -> npt.NDArray[np.uint8]:
    """Square crops along a track, smoothed over five frames: uint8 [F, side, side, 3].

    Frames in which it was not found are black; what lies outside of the picture repeats its edge.

    Args:
        frames: uint8 [F, H, W, 3].
        track: of as many frames.
        side: pixels of the crops.
        margin: side of the square in longer sides of the box.
    """
    middles, sides = _smooth(_middles(track.boxes)), _smooth((track.boxes[:, 2:] - track.boxes[:, :2]).max(1)[:, None])
    out = np.zeros((len(frames), side, side, 3), np.uint8)
    for f in np.nonzero(track.found[: len(frames)])[0]:
        scale = max(LEAST_SIDE, margin * float(sides[f, 0])) / side
        x, y = middles[f] - 0.5 - scale * (side - 1) / 2
        if scale >= 1.5:  # averages pixels, where bilinear would leave some out
            out[f] = _reduced(frames[f], x, y, scale, side)
        else:
            back = np.array([[scale, 0, x], [0, scale, y]])
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            out[f] = cv2.warpAffine(frames[f], back, (side, side), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return out


def _reduced(frame: npt.NDArray[np.uint8], x: float, y: float, scale: float, side: int) -> npt.NDArray[np.uint8]:
    whole = round(scale * side)
    x0, y0 = round(x + 0.5), round(y + 0.5)
    ends = (max(0, -y0), max(0, y0 + whole - frame.shape[0]), max(0, -x0), max(0, x0 + whole - frame.shape[1]))
    padded = cv2.copyMakeBorder(frame, *ends, cv2.BORDER_REPLICATE) if any(ends) else frame
    cut = padded[y0 + ends[0] : y0 + ends[0] + whole, x0 + ends[2] : x0 + ends[2] + whole]
    return np.asarray(cv2.resize(cut, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def _smooth(values: Boxes) -> Boxes:
    """Averages of values [F, n] over the frames of a window in which there is something; NaN stays."""
    known = ~np.isnan(values[:, 0])
    smooth = np.full_like(values, np.nan)
    for f in np.nonzero(known)[0]:
        window = slice(max(0, f - SMOOTHED // 2), f + SMOOTHED // 2 + 1)
        smooth[f] = values[window][known[window]].mean(0)
    return smooth
