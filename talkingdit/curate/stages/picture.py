# SPDX-License-Identifier: Apache-2.0
"""The picture itself: light and contrast, sharpness of face and hands, motion, and text over people."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from talkingdit.curate.look import Look
from talkingdit.curate.settings import Watch
from talkingdit.curate.stages import ClipFindings, Figures
from talkingdit.detect.motion import Flow
from talkingdit.detect.text import texts

SHARP_SIDE = 128  # pixels to which a face or hand is brought before its sharpness is measured
PICTURE_SIDE, TILE = 512, 64  # pixels to which the longer side of a picture is brought for that, and of its parts
SHARPEST = 0.9  # of the parts of a picture, that which is sharper than so many stands for it
FLOW_EVERY = 0.08  # seconds between pictures whose flow is measured
TEXT_STILLS = 3  # of a clip, in which text is read

Box = tuple[float, float, float, float]


class PictureStage:
    """Size and length, and what an exposure meter says. It is no judge of beauty: that is a model of your own."""

    gpu = False

    def __init__(self, watch: Watch) -> None: ...

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        grey = look.pictures[:: max(1, round(look.fps))].mean(-1)
        figures = {
            "clip.seconds": round(look.seconds, 3),
            "clip.height": look.size[0],
            "clip.width": look.size[1],
            "clip.fps": round(look.fps, 4),
            "clip.shot": look.shot,
            "picture.clipped": round(float(np.mean((grey < 3) | (grey > 252))), 4),
            "picture.contrast": round(float(np.mean(grey.std((1, 2))) / 255), 4),
            "picture.brightness": round(float(grey.mean() / 255), 4),
        }
        return figures


class SharpnessStage:
    """Variance of the Laplacian of faces and hands, brought to one size (Wan-S2V, section 2), and of the picture.

    In a picture that is blurred enough no face is found, so its sharpest parts tell. A person in front of a blurred
    background is sharp.
    """

    gpu = False

    def __init__(self, watch: Watch) -> None: ...

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        figures: Figures = {}
        if look.stills:
            figures["sharpness.picture"] = round(
                float(np.median([sharpest(still.picture) for still in look.stills])), 2
            )
        if found.people and look.stills:
            values = []
            for still in look.stills:
                scale = still.picture.shape[0] / look.pictures.shape[1]
                values.append(laplacian(still.picture, found.people[0].boxes[still.index] * scale))
            figures["sharpness.face"] = round(float(np.median(values)), 2)
        if found.hands:
            values = [laplacian(look.stills[n].picture, np.array(box, np.float32)) for n, *box in found.hands]
            figures["sharpness.hands"] = round(float(np.median(values)), 2)
        return figures


def laplacian(picture: NDArray[np.uint8], box: NDArray[np.float32]) -> float:
    """Sharpness of a part of a picture; 0 where nothing of it is inside.

    The part is brought to 128 pixels, so that a face that was made larger is not sharper than it was.
    """
    import cv2

    x0, y0, x1, y1 = (round(float(side)) for side in box)
    part = picture[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)]
    if min(part.shape[:2]) < 2:
        return 0.0
    way = cv2.INTER_AREA if max(part.shape[:2]) > SHARP_SIDE else cv2.INTER_CUBIC
    grey = cv2.cvtColor(cv2.resize(part, (SHARP_SIDE, SHARP_SIDE), interpolation=way), cv2.COLOR_RGB2GRAY)
    return float(cv2.Laplacian(grey, cv2.CV_32F).var())


def sharpest(picture: NDArray[np.uint8]) -> float:
    """Sharpness of the sharper parts of a picture, brought to one size."""
    import cv2

    scale = PICTURE_SIDE / max(picture.shape[:2])
    size = [max(TILE, round(side * scale)) for side in picture.shape[1::-1]]
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    grey = cv2.cvtColor(cv2.resize(picture, size, interpolation=way), cv2.COLOR_RGB2GRAY)
    edges = cv2.Laplacian(grey, cv2.CV_32F)
    down, right = (side // TILE for side in edges.shape)
    tiles = edges[: down * TILE, : right * TILE].reshape(down, TILE, right, TILE)
    return float(np.quantile(tiles.var(axis=(1, 3)), SHARPEST))


class MotionStage:
    """Optical flow: of everything, and of what is not the person; and how much it jumps."""

    gpu = False

    def __init__(self, watch: Watch) -> None:
        self._flow = Flow()

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        step = max(1, round(FLOW_EVERY * look.fps))
        pairs = range(0, len(look.pictures) - step, max(step, len(look.pictures) // 24))
        if not len(pairs):
            return {}
        means, edges = [], []
        for at in pairs:
            flow = np.linalg.norm(self._flow(look.pictures[at], look.pictures[at + step]), axis=-1)
            means.append(float(flow.mean()))
            rim = np.concatenate(
                [flow[:, : max(1, flow.shape[1] // 10)].ravel(), flow[: max(1, len(flow) // 10)].ravel()]
            )
            edges.append(float(np.median(rim)))
        per_second = look.fps / step
        return {
            "motion.mean": round(float(np.mean(means)) * per_second, 5),
            "motion.most": round(float(np.max(means)) * per_second, 5),
            "motion.camera": round(float(np.mean(edges)) * per_second, 5),
        }


class TextStage:
    """Text, and how much of it lies over a face or a hand (subtitles; Wan-S2V, section 2)."""

    gpu = False

    def __init__(self, watch: Watch) -> None:
        texts(np.zeros((64, 64, 3), np.uint8))

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        if not look.stills:
            return {}
        chosen = {round(at) for at in np.linspace(0, len(look.stills) - 1, TEXT_STILLS)}
        share, over, words = 0.0, 0.0, ""
        for number in sorted(chosen):
            still = look.stills[number]
            lines = texts(still.picture)
            height, width = still.picture.shape[:2]
            scale = height / look.pictures.shape[1]
            people: list[Box] = [tuple(p.boxes[still.index] * scale) for p in found.people]
            people += [(x0, y0, x1, y1) for n, x0, y0, x1, y1 in found.hands if n == number]
            share = max(share, sum(_area(line.box) for line in lines) / (height * width))
            for box in people:
                over = max(over, sum(_common(line.box, box) for line in lines) / max(1.0, _area(box)))
            if lines and not words:
                words = " / ".join(line.words for line in lines)[:200]
        return {"text.share": round(share, 4), "text.over_person": round(float(over), 4), "text.words": words}


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _common(a: Box, b: Box) -> float:
    return _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
