# SPDX-License-Identifier: Apache-2.0
"""Text in a picture: PP-OCR, with the weights that the package rapidocr carries, run by ONNX Runtime."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.detect.packages import NotInstalledError, package_file

GET = "pip install 'talkingdit[curate]'"
_LOCK = threading.Lock()


@dataclass(frozen=True)
class TextLine:
    """A line of text.

    Attributes:
        words: as they were read.
        score: 0 to 1.
        box: x0, y0, x1, y1 in pixels.
    """

    words: str
    score: float
    box: tuple[float, float, float, float]


def texts(frame: NDArray[np.uint8], threshold: float = 0.6, longest: int = 736) -> list[TextLine]:
    """The lines of text of a picture.

    Args:
        frame: uint8 [H, W, 3], RGB.
        threshold: least score of what was read; a pattern that only looks like text is read with a low one.
        longest: pictures with a longer side are looked at reduced to it.

    Raises:
        NotInstalledError: the weights, or what runs them, are not installed.
    """
    import cv2

    scale = min(1.0, longest / max(frame.shape[:2]))
    if scale < 1:
        sides = max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale))
        frame = np.asarray(cv2.resize(frame, sides, interpolation=cv2.INTER_AREA), np.uint8)
    with _LOCK:
        found = _engine()(np.ascontiguousarray(frame[..., ::-1]), use_cls=False)
    if found.boxes is None or found.txts is None:
        return []
    lines = []
    for box, words, score in zip(found.boxes, found.txts, found.scores, strict=True):
        corners = np.concatenate([np.min(box, 0), np.max(box, 0)]) / scale
        if score >= threshold and sum(letter.isalnum() for letter in words) >= 2:
            lines.append(TextLine(words, float(score), tuple(map(float, corners))))  # type: ignore[arg-type]
    return lines


@lru_cache(maxsize=1)
def _engine() -> Any:
    package_file("rapidocr", "__init__.py", GET)
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise NotInstalledError(f"onnxruntime is not installed; `{GET}` brings it.") from error
    from rapidocr import RapidOCR

    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    return RapidOCR(params=threads | {"Global.log_level": "error", "Det.limit_side_len": 320, "Det.limit_type": "min"})
