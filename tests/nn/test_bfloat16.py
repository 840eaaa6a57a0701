# SPDX-License-Identifier: Apache-2.0
"""bfloat16 is computed in where that is faster: not on processors without instructions for it."""

from __future__ import annotations

import pytest
import torch

from talkingdit import build_info
from talkingdit.nn import bfloat16


def test_a_processor_multiplies_bfloat16_where_its_instructions_do() -> None:
    expected = build_info()["cpu_isa"] == "avx512_bf16"
    assert bfloat16.multiplies_bfloat16(torch.device("cpu")) is expected
    assert bfloat16.multiplies_bfloat16(torch.device("cuda"))


@pytest.mark.parametrize(("instructions", "dtype"), [("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)])
def test_products_are_in_bfloat16_where_that_is_faster(
    instructions: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16, "_instructions", lambda: instructions)
    layer = torch.nn.Linear(4, 3)
    with bfloat16.bfloat16_products():
        assert layer(torch.ones(2, 4)).dtype == dtype
    assert layer(torch.ones(2, 4)).dtype == torch.float32
