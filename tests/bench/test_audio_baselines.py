# SPDX-License-Identifier: Apache-2.0
"""What audio attention and its block are compared with computes the same."""

from __future__ import annotations

import pytest
import torch

from bench import audio_baselines, audio_block, harness
from bench.audio_attention import SHAPES as AUDIO
from bench.shapes import TOKENS, TokenShape
from talkingdit import ops


@pytest.mark.parametrize(
    "attention",
    [
        audio_baselines.eager,
        audio_baselines.sdpa,
        audio_baselines.sdpa_with("math"),
        audio_baselines.flex,
        audio_baselines.flex_blocks(3, 16, 5, torch.device("cpu")),
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_they_attend_to_the_audio_of_their_frame(attention):
    torch.manual_seed(0)
    q = torch.randn(1, 48, 2, 16)
    k, v = torch.randn(2, 1, 3, 5, 2, 16)
    expected = ops.audio_attention_reference(q.double(), k.double(), v.double(), 16)
    torch.testing.assert_close(attention(q, k, v).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_backend_that_cannot_says_so():
    q, k = torch.randn(1, 48, 2, 16), torch.randn(1, 3, 5, 2, 16)
    with pytest.raises(RuntimeError):
        audio_baselines.sdpa_with("cudnn")(q, k, k)


def test_every_way_through_the_block_gives_the_same():
    shape = TokenShape("hunyuan-tiny", [(0, (3, 4, 4))], heads=2, dim=16, audio=4)
    setting = harness.Setting(torch.device("cpu"), quick=True)
    rows = [harness.run_case(c, setting) for c in audio_block.cases(shape, torch.float32, setting.device)]
    assert [row["op"].removeprefix("audio_block ") for row in rows] == ["none", "value", "full", "1 x 1024 full"]
    assert "unabsorbed" in rows[1]["baselines"]
    assert rows[3]["baselines"].keys() == {"official"}


def test_shapes_are_those_of_the_released_models():
    tokens = {shape.name: shape.tokens for shape in TOKENS["cuda"]}
    assert tokens["wan-s2v-14b-448x832"] == tokens["wan-1.3b-480x832"] == 32_760
    assert tokens["wan-s2v-14b-704x1024"] == 63_360
    assert tokens["wan2.2-ti2v-5b-704x1280"] == 27_280
    assert {shape.audio for shape in AUDIO["cuda"]} == {5, 16, 32, 40}
    assert {shape.name: shape.layout().split for shape in TOKENS["cuda"]}["hunyuan-avatar-13b-704x704"] == (16, 56, 56)
