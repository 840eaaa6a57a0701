# SPDX-License-Identifier: Apache-2.0
"""Workflows of speakers, anchors and dubbing, run to frames with tiny checkpoints: those of a pipeline that is told the
same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tiny_families import FACE, VOICE, avatar, gloria, skyreels

import talkingdit

USUAL = {"prompt": "a person", "seed": 1, "steps": 1}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


SPEAKERS = {
    "first": node("TalkingDiTSpeaker", name="0", audio=["voice", 0], box="0,0,48,64"),
    "second": node("TalkingDiTSpeaker", name="1", audio=["voice", 0], box="48,0,96,64", speakers=["first", 0]),
    "options": node("TalkingDiTOptions_hunyuan_avatar", size="64x32"),
    "made": node(
        "TalkingDiTGenerate",
        model=["load", 0],
        image=["face", 0],
        speakers=["second", 0],
        options=["options", 0],
        **USUAL,
    ),
}
ANCHORS = {
    "back": node("LoadImage", image="back.png"),
    "anchor": node("TalkingDiTAnchor", image=["back", 0], shows="view/back"),
    "options": node("TalkingDiTOptions_gloria", max_area="64x64"),
    "made": node(
        "TalkingDiTGenerate",
        model=["load", 0],
        image=["face", 0],
        audio=["voice", 0],
        anchors=["anchor", 0],
        options=["options", 0],
        **USUAL,
    ),
}
DUB = {
    "film": node("LoadVideo", file="film.mp4"),
    "options": node("TalkingDiTOptions_skyreels_audio", windows=2),
    "made": node(
        "TalkingDiTDub",
        model=["load", 0],
        video=["film", 0],
        audio=["voice", 0],
        box="16,16,80,60",
        options=["options", 0],
        **USUAL,
    ),
}


@pytest.mark.parametrize(("make", "nodes"), [(avatar, SPEAKERS), (gloria, ANCHORS), (skyreels, DUB)])
def test_a_workflow_makes_the_frames_of_a_pipeline(
    comfy: Any, make: Callable[[Path], dict[str, Any]], nodes: dict[str, Any], tmp_path: Path
) -> None:
    given = make(tmp_path)
    Image.fromarray(FACE).save(comfy.input / "face.png")
    Image.fromarray(FACE[::-1]).save(comfy.input / "back.png")
    soundfile.write(comfy.input / "voice.wav", *VOICE, subtype="FLOAT")
    if "video" in given:
        (comfy.input / "film.mp4").write_bytes(given["video"].read_bytes())
    load = node("TalkingDiTLoad", checkpoint="shipped: drawn characters", path=str(tmp_path / "model"))
    files = {"face": node("LoadImage", image="face.png"), "voice": node("LoadAudio", audio="voice.wav")}
    used = {name: files[name] for name in files if f"['{name}', 0]" in str(nodes)}
    images, audio, fps, video, result = comfy.run({"load": load, **used, **nodes})["made"]
    expected = talkingdit.TalkingPipeline.from_pretrained(tmp_path / "model")(**given | USUAL)
    assert len(expected.frames) > 1
    np.testing.assert_array_equal(result.frames, expected.frames)
    assert torch.equal((images * 255).round().byte(), torch.from_numpy(expected.frames.copy()))
    assert fps == float(expected.fps)
    np.testing.assert_array_equal(audio["waveform"][0].T.numpy(), expected.audio[0])
    assert video.get_components().images.shape == images.shape
