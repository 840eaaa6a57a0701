# SPDX-License-Identifier: Apache-2.0
"""Small drawn videos with sound for tests of evaluation."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from talkingdit.eval.calibration import FPS, Scripted, scripts
from talkingdit.media.files import VideoWriter
from talkingdit.media.sound import SPEECH_RATE

FRAMES, SIZE = 20, 64


def write(path: Path, script: Scripted, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, FPS, frames.shape[1:3], script.sound, SPEECH_RATE) as video:
        video.write(frames)


def blurred(frames: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in frames])


def folders(root: Path, count: int = 2) -> tuple[Path, Path, Path]:
    """Folders of true videos, of slightly and of much blurred ones."""
    for i, script in enumerate(scripts(count, FRAMES, SIZE)):
        frames = script.draw()
        write(root / "truth" / f"clip{i}.mp4", script, frames)
        write(root / "sharp" / f"clip{i}.mp4", script, blurred(frames, 0.5))
        write(root / "soft" / f"clip{i}.mp4", script, blurred(frames, 2.0))
    return root / "truth", root / "sharp", root / "soft"
