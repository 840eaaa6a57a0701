# SPDX-License-Identifier: Apache-2.0
"""How much a video of Gloria's looks at its anchors, as `--attention-figure` writes it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile
import tiny_families

import talkingdit


def test_predictions_one_after_the_other_look_as_those_in_one_pass(tmp_path: Path) -> None:
    """The conditioned prediction alone is told, however the others are made."""
    tiny_families.gloria(tmp_path)
    picture, voice = tmp_path / "face.png", tmp_path / "voice.wav"
    cv2.imwrite(str(picture), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    soundfile.write(voice, 0.1 * np.random.default_rng(1).standard_normal(16000), 16000)
    told = []
    for sequential in (False, True):
        figure = tmp_path / f"{sequential}.png"
        talkingdit.generate(
            picture,
            voice,
            tmp_path / f"{sequential}.mp4",
            checkpoint=tmp_path / "model",
            steps=2,
            guidance=5.0,
            sequential=sequential,
            attention_figure=figure,
        )
        told.append(np.loadtxt(figure.with_suffix(".csv"), delimiter=",", skiprows=1))
    assert told[0][:, 1:].max() > 0
    assert told[1] == pytest.approx(told[0], abs=2e-6)
