# SPDX-License-Identifier: Apache-2.0
"""The bench of precision compares whole videos with those of float32."""

from __future__ import annotations

import pytest

from bench import attention_cpu
from bench.precision import Variant, Videos, run


def test_rows_tell_what_eight_bits_cost() -> None:
    whole, narrow = run([Videos(2, 1, 1)], [Variant("float32"), Variant("float32", "int8")])["rows"]
    assert "psnr" not in whole
    assert 20 < narrow["psnr"] == narrow["worst"] < 80
    assert abs(narrow["r"] - whole["r"]) < 0.1
    assert Videos.parse("8x3x2") == Videos(8, 3, 2)


def test_attention_on_a_processor_is_measured_and_right() -> None:
    (row,) = attention_cpu.run([33], 2, 16, turns=1)["rows"]
    assert all(row[name] > 0 for name in attention_cpu.CONTESTANTS)


def test_attention_on_a_processor_is_measured_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "TRAINED_SHAPES", ((2, 33, 17, 2, 16),))
    (row,) = attention_cpu.run_trained(turns=1)
    assert (row["tokens"], row["keys"]) == (33, 17)
    assert all(row[name] > 0 for name in attention_cpu.TRAINED)
