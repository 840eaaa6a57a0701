# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from talkingdit.pipelines.guidance import guidance_branches, guided_step


@pytest.mark.parametrize(("text", "audio"), [(1.0, 1.0), (1.0, 2.5), (3.0, 1.0), (2.0, 2.0), (1.5, 4.0), (0.0, 2.0)])
def test_the_sum_is_the_guidance_formula(text: float, audio: float) -> None:
    v00, vt0, vta = (torch.randn(1, 4, 2, 3, 3, dtype=torch.float64) for _ in range(3))
    x = torch.randn(1, 4, 2, 3, 3, dtype=torch.float64)
    wanted = x - 0.25 * (v00 + text * (vt0 - v00) + audio * (vta - vt0))
    given = {(False, False): v00, (True, False): vt0, (True, True): vta}
    branches = guidance_branches(text, audio)
    predictions = torch.cat([given[branch.text, branch.audio] for branch in branches])
    got = guided_step(x.float(), predictions.float(), [branch.weight for branch in branches], -0.25)
    torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "audio", "evaluations"), [(1, 1, 1), (1, 2, 2), (2, 2, 2), (0, 0, 1), (2, 1, 3), (3, 2, 3)]
)
def test_predictions_of_no_weight_are_not_made(text: float, audio: float, evaluations: int) -> None:
    assert len(guidance_branches(text, audio)) == evaluations


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_impossible_strengths_are_named(value: float) -> None:
    with pytest.raises(ValueError, match="guidance: audio guidance must be a number of at least 0"):
        guidance_branches(1.0, value)
