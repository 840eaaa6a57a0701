# SPDX-License-Identifier: Apache-2.0
"""Metrics on drawn clips, whose truth is known: perfect for the truth, worse with every step of a fault."""

from __future__ import annotations

import numpy as np
import pytest

from talkingdit.eval.calibration import FAULTS, Fault, calibrate, figure, scripts
from talkingdit.eval.drawn import DrawnFinder
from talkingdit.eval.evidence import Evidence, NotMeasured
from talkingdit.eval.frechet import frechet_distance
from talkingdit.eval.metric import all_metrics


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_is_noticed_and_ordered(fault: Fault) -> None:
    curves = calibrate(count=1, frames=40, size=64, faults=[fault])
    assert [curve.metric for curve in curves] == list(fault.noticed)
    for curve in curves:
        assert curve.ordered, f"{curve.metric} is {curve.values} at {curve.levels} of {fault.name}"
    assert figure(curves).count("<polyline") == len(curves)


@pytest.fixture(scope="module")
def of_itself() -> Evidence:
    (script,) = scripts(1, 32, 64)
    clip = script.clip()
    return Evidence(clip, clip, DrawnFinder(), frozenset(("whole", "face")), DrawnFinder.backbones)


def test_the_truth_is_perfect(of_itself: Evidence) -> None:
    checked = []
    for metric in all_metrics().values():
        for region in set(metric.regions) & {"whole", "face"}:
            if metric.perfect is None or metric.missing(of_itself.backbones):
                continue
            if metric.measure is not None:
                value = metric.measure(of_itself, region).value
            else:
                assert metric.collect is not None
                value = frechet_distance(*metric.collect(of_itself, region))
            assert value == pytest.approx(metric.perfect, abs=1e-9), (metric.name, region)
            checked.append(metric.name)
    assert {"ssim", "psnr", "csim", "mouth_r", "expression_error", "efid", "found"} <= set(checked)


def test_a_shift_of_the_sound_is_read_back_with_its_sign() -> None:
    (script,) = scripts(1, 64, 64)
    offset = all_metrics()["sync_offset"]
    assert offset.measure is not None
    fault = next(fault for fault in FAULTS if fault.name == "shifted sound")
    late = Evidence(fault.make(script, 250), None, DrawnFinder(), frozenset(("face",)))
    assert offset.measure(late, "face").value == pytest.approx(250, abs=63)


def test_what_cannot_be_measured_says_why() -> None:
    (script,) = scripts(1, 32, 64)
    clip = script.clip()
    silent = clip.__class__(clip.frames, clip.fps, np.zeros_like(clip.sound), "silent")
    metrics = all_metrics()
    for name, given, why in (
        ("sync_r", silent, "silent"),
        ("sync_r", clip.__class__(clip.frames, clip.fps, None, "mute"), "no sound"),
        ("sync_r", clip.__class__(clip.frames[:8], clip.fps, clip.sound, "short"), "needs 1 s"),
        ("ssim", clip, "needs a true video"),
    ):
        measure = metrics[name].measure
        assert measure is not None
        with pytest.raises(NotMeasured, match=why):
            measure(Evidence(given, None, DrawnFinder(), frozenset(("face",))), "face")
