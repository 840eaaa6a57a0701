# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a whole step compares like with like, and counts memory."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import wan_block
from bench.live_memory import LiveMemory
from talkingdit.families.wan_s2v.rope import layout_at
from talkingdit.models import WanInputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_steps_agree(dtype):
    shape = wan_block.SHAPES["tiny"]
    model = wan_block.build(shape, 2, torch.device("cpu"), dtype)
    calls = wan_block.contestants(model, wan_block.inputs(shape, torch.device("cpu")), compiled=False)
    assert calls["ours"]().shape == calls["official"]().shape == (1, 16, 2, 8, 8)


def test_another_computation_is_noticed(monkeypatch):
    shape = wan_block.SHAPES["tiny"]
    model = wan_block.build(shape, 2, torch.device("cpu"), torch.float32)
    forward = wan_block.official_style.forward
    monkeypatch.setattr(wan_block.official_style, "forward", lambda *args, **kwargs: 1.1 * forward(*args, **kwargs))
    with pytest.raises(RuntimeError, match=r"both steps must agree within 0.0001, got a relative difference of 0.0"):
        wan_block.contestants(model, wan_block.inputs(shape, torch.device("cpu")), compiled=False)


def test_the_result_is_written(tmp_path):
    assert wan_block.main(["--device", "cpu", "--shape", "tiny", "--repeats", "1", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    (step,) = json.loads(file.read_text())["steps"]
    assert step["blocks"] == 2
    assert 0 < step["peak_bytes"] < step["official_peak_bytes"]


def test_live_memory_counts_storages_once_while_they_live():
    kept = torch.zeros(100)
    with LiveMemory([kept]) as count:
        a = kept + 1
        assert count.live == 800
        view = a[10:].view(-1)
        del a
        assert count.live == 800  # the view holds it
        b = view * 2
        del view, b
        assert count.live == 400
        assert count.peak == 400 + 400 + 360
        count.reset()
        assert count.peak == 400


def test_a_step_of_the_released_width_takes_a_third_of_the_memory():
    """Counted on tensors without storage, weights aside: a block at 448 x 832 with its audio injection, bfloat16."""
    shape = wan_block.SHAPES["14b-448x832"]
    layout_at.cache_clear()
    peaks = {}
    with FakeTensorMode(), torch.no_grad():
        model = wan_block.build(shape, 2, torch.device("cpu"), torch.bfloat16)
        given = wan_block.inputs(shape, torch.device("cpu"))
        narrow = {k: v if k in ("t", "audio") else v.bfloat16() for k, v in given.items()}
        weights = dict(model.named_parameters())
        with LiveMemory([*weights.values(), *given.values(), *narrow.values()]) as count:
            before = count.live
            conditions = model.encode_conditions(
                WanInputs(
                    given["context"],
                    reference=given["ref"],
                    history=given["motion"],
                    audio=given["audio"],
                    size=(20, 56, 104),
                )
            )
            model(given["x"], given["t"], conditions=conditions)
            peaks["ours"] = count.peak - before
            del conditions
            count.reset()
            with torch.autocast("cpu", torch.bfloat16):
                wan_block.official_style.forward(model.config, weights, **narrow)
            peaks["official"] = count.peak - before
    layout_at.cache_clear()
    assert peaks["ours"] < 0.33 * peaks["official"]
