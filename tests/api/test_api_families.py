# SPDX-License-Identifier: Apache-2.0
"""Every family by the same door: speakers, anchors and a video to dub from memory; callbacks that replace latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_families import avatar, gloria, s2v, skyreels

import talkingdit


@pytest.mark.parametrize("make", [s2v, avatar, gloria, skyreels])
def test_the_last_latents_are_what_the_frames_are_made_of(
    make: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    """Those of another seed in their place give its video. With its large models taking turns it is the same one."""
    given = make(tmp_path)
    pipe = talkingdit.TalkingPipeline.from_pretrained(tmp_path / "model")
    kept: dict[int, Any] = {}

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        kept.setdefault(step, tensors["latents"].clone())

    def put(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": kept[1]} if step == 1 else tensors

    plain = np.concatenate(list(pipe.stream(**given)))
    other = pipe(**given, seed=1, callback_on_step_end=keep).frames
    assert sorted(kept) == [0, 1]
    assert kept[0].dim() == 5
    assert (plain != other).any()
    pipe.enable_model_cpu_offload(device="cpu")
    np.testing.assert_array_equal(pipe(**given, callback_on_step_end=put).frames, other)
