# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in a `DiffusionPipeline`: plain calls of diffusers save it, load it, and find its models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api_world import World
from diffusers import AutoModel, DiffusionPipeline
from tiny_families import avatar, gloria, s2v, skyreels
from torch import nn

import talkingdit
from talkingdit.api.diffusers_face import TalkingDiffusionPipeline
from talkingdit.errors import UserError


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("face") / "saved"
    TalkingDiffusionPipeline.from_pretrained(world.checkpoint).save_pretrained(folder)
    return folder


def test_what_was_saved_makes_the_same_video_by_every_door(
    world: World, saved: Path, whole: np.ndarray, tmp_path: Path
) -> None:
    pipe = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    assert sorted(name for name, part in pipe.components.items() if part is not None) == [
        "text_encoder",
        "transformer",
        "vae",
    ]
    np.testing.assert_array_equal(pipe(**world.given).frames, whole)
    pipe.save_pretrained(tmp_path / "again")
    pipe.enable_group_offload("cpu")
    np.testing.assert_array_equal(pipe(**world.given).frames, whole)
    named = DiffusionPipeline.from_pretrained(
        tmp_path / "again", custom_pipeline=str(tmp_path / "again" / "pipeline.py"), trust_remote_code=True
    )
    np.testing.assert_array_equal(named(**world.given).frames, whole)
    for again in (TalkingDiffusionPipeline, talkingdit.TalkingPipeline):
        np.testing.assert_array_equal(again.from_pretrained(tmp_path / "again")(**world.given).frames, whole)


def test_auto_model_finds_the_transformer(world: World, saved: Path) -> None:
    model = AutoModel.from_pretrained(str(saved), subfolder="transformer", dtype=torch.bfloat16)
    assert type(model).__name__ == "WanS2VModel"
    assert model.dtype == torch.bfloat16
    plain = talkingdit.models.load(world.checkpoint / "transformer", dtype=torch.bfloat16)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


def test_it_moves_as_pipelines_do(world: World, saved: Path, whole: np.ndarray) -> None:
    pipe = TalkingDiffusionPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.to(torch.float32).transformer.dtype == torch.float32
    once_rounded = pipe(**world.given).frames
    assert 0 < np.abs(once_rounded.astype(int) - whole).mean() < 8
    np.testing.assert_array_equal(np.concatenate(list(pipe.talking.stream(**world.given))), once_rounded)
    pipe.to(torch.bfloat16)  # all parts, as it is with pipelines
    assert np.abs(pipe(**world.given).frames.astype(int) - whole).mean() < 16


def test_the_folder_says_what_is_in_it(saved: Path) -> None:
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "TalkingDiffusionPipeline"]
    assert index["transformer"] == ["talkingdit.families.wan_s2v.model", "WanS2VModel"]
    assert (saved / "pipeline.json").exists()


def test_what_cannot_be_saved_is_said(world: World, tmp_path: Path) -> None:
    pipe = TalkingDiffusionPipeline.from_pretrained(world.checkpoint)
    pipe.text_encoder = nn.Linear(1, 1)
    with pytest.raises(UserError, match="expected parts that are models of diffusers, got text_encoder of Linear"):
        pipe.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="'device_map' is for DiffusionPipeline"):
        TalkingDiffusionPipeline.from_pretrained(world.checkpoint, device_map="balanced")


@pytest.mark.parametrize("make", [s2v, avatar, gloria, skyreels])
def test_families_with_encoders_of_transformers_are_saved_whole(
    make: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    """From the layouts that they are released in; weights as they are now, encoders as the files that they were."""
    given = make(tmp_path) | {"steps": 1}
    pipe = TalkingDiffusionPipeline.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        next(iter(pipe.transformer.parameters())).mul_(1.1)
    pipe.save_pretrained(tmp_path / "saved")
    expected = pipe(**given).frames
    found = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    kinds = {name: type(part) for name, part in pipe.components.items()}
    assert {name: type(part) for name, part in found.components.items()} == kinds
    np.testing.assert_array_equal(found(**given).frames, expected)
    ours = talkingdit.TalkingPipeline.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(ours(**given).frames, expected)
    found.save_pretrained(tmp_path / "again")
    names = [
        {str(path.relative_to(root)) for path in root.rglob("*.*")} for root in (tmp_path / "saved", tmp_path / "again")
    ]
    assert names[0] == names[1]
