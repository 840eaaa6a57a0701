# SPDX-License-Identifier: Apache-2.0
"""Tables of weights for window_fusion: each against the rule that it stands for."""

from __future__ import annotations

import pytest
import torch

from talkingdit import ops


def test_curves() -> None:
    assert ops.fade_curve(5).tolist() == [0, 0.25, 0.5, 0.75, 1]
    log = ops.fade_curve(5, "log")
    assert log[0] == 0
    assert log[-1] == pytest.approx(1)
    assert float(log[2]) == pytest.approx(0.6201145, abs=1e-6)  # ln(1 + 0.5 (e - 1))
    assert ops.fade_curve(1, "log").tolist() == [0]
    assert ops.fade_curve(0, "log").tolist() == []
    with pytest.raises(ValueError, match='scheme must be "linear" or "log", got \'cubic\''):
        ops.fade_curve(3, "cubic")
    with pytest.raises(ValueError, match="overlap must be at least 0, got -1"):
        ops.fade_curve(-1)


def test_ramps_of_neighbours_add_up_to_one() -> None:
    table = ops.ramp_weights(3, 5, 2, "log")
    total = torch.zeros(11, dtype=torch.float64)
    for i in range(3):
        total[3 * i : 3 * i + 5] += table[i]
    torch.testing.assert_close(total, torch.ones(11, dtype=torch.float64))
    with pytest.raises(ValueError, match="overlap must not exceed the 5 frames of a window, got 6"):
        ops.ramp_weights(3, 5, 6)


def test_crossfade_is_the_sequential_loop() -> None:
    """Three windows meet on some frames, so the order decides; the table must give what the loop gives."""
    starts, frames, length, valid = [0, 2, 3, 6], 6, 10, [6, 6, 6, 4]
    windows, curve = torch.randn(4, 2, frames, 3, 4, dtype=torch.float64), ops.fade_curve(4)
    expected = torch.zeros(2, length, 3, 4, dtype=torch.float64)
    written = [False] * length
    for i, start in enumerate(starts):
        for j in range(valid[i]):
            frame = (start + j) % length
            w = float(curve[j]) if j < 4 and written[frame] else 1.0
            expected[:, frame] = w * windows[i, :, j] + (1 - w) * expected[:, frame]
            written[frame] = True
    table = ops.crossfade_weights(starts, frames, length, curve, valid)
    torch.testing.assert_close(ops.window_fusion(windows, starts, table, length), expected)


def test_prefix_keeps_the_first_window() -> None:
    windows = torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 1, 4, 1, 1)
    table = ops.prefix_weights([0, 2, 5], 4, 9)
    assert ops.window_fusion(windows, [0, 2, 5], table, 9).flatten().tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    overwrite = ops.crossfade_weights([0, 2, 5], 4, 9, torch.zeros(0))
    assert ops.window_fusion(windows, [0, 2, 5], overwrite, 9).flatten().tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
