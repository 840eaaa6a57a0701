# SPDX-License-Identifier: Apache-2.0
"""Several people, frames without the region, and the crops of the published program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from talkingdit.eval.clip import EvalClip
from talkingdit.eval.evidence import Evidence, NotMeasured
from talkingdit.eval.found import Found
from talkingdit.eval.metric import all_metrics
from talkingdit.eval.metrics.compat import published_crops
from talkingdit.eval.tracks import Track

FACE = frozenset(("face",))
FRAMES = np.random.default_rng(0).integers(0, 256, (6, 80, 120, 3), dtype=np.uint8)


def track(x: float, side: float = 24.0, gone: tuple[int, ...] = ()) -> Track:
    boxes = np.tile([x, 20.0, x + side, 20.0 + side], (len(FRAMES), 1))
    boxes[list(gone)] = np.nan
    return Track(boxes, np.ones(len(FRAMES)), np.arange(len(FRAMES)))


class Told:
    """A finder that finds what it was told, one answer after the other: the video first, then its truth."""

    name, version = "told", 1
    backbones: Mapping[str, Any] = {}

    def __init__(self, *answers: tuple[Track, ...]) -> None:
        self.answers = list(answers)

    def missing(self) -> dict[str, str]:
        return {}

    def __call__(self, clip: EvalClip, regions: frozenset[str]) -> Found:
        return Found({"face": self.answers.pop(0)})


def evidence(gen: tuple[Track, ...], truth: tuple[Track, ...]) -> Evidence:
    first, second = EvalClip(FRAMES, 25.0, None, "gen"), EvalClip(FRAMES.copy(), 25.0, None, "truth")
    return Evidence(first, second, Told(gen, truth), FACE)


def measured(name: str, of: Evidence) -> Any:
    measure = all_metrics()[name].measure
    assert measure is not None
    return measure(of, "face")


def test_people_are_compared_with_themselves_whatever_their_order() -> None:
    two = evidence((track(10), track(80)), (track(80), track(10)))
    _ = two.found  # the video is looked at first
    assert measured("ssim", two).value == 1.0
    assert measured("found", two).value == 1.0


def test_a_person_that_is_missing_is_told() -> None:
    one = evidence((track(10),), (track(80), track(10)))
    _ = one.found
    assert measured("found", one).value == 0.5
    assert measured("ssim", one).value == 1.0


def test_frames_without_the_region_are_marked() -> None:
    some = evidence((track(10, gone=(1, 2)),), (track(10, gone=(4,)),))
    _ = some.found
    value = measured("ssim", some)
    assert [v is None for v in value.curve] == [False, True, True, False, True, False]
    assert value.value == 1.0
    assert measured("found", some).value == pytest.approx(3 / 5)  # of the five true frames


def test_nobody_is_no_value() -> None:
    none = evidence((), (track(10),))
    _ = none.found
    with pytest.raises(NotMeasured, match="no face was found"):
        measured("ssim", none)
    assert measured("found", none).value == 0


def test_published_crops() -> None:
    """Half a side at each end, frames without a box dropped, all at the first one's size."""
    cut = published_crops(FRAMES, track(40, 30, gone=(0, 3)), "face")
    assert cut.shape == (4, 60, 60, 3)
    np.testing.assert_array_equal(cut[0], FRAMES[1, 5:65, 25:85])
    assert published_crops(FRAMES, track(40, 10), "face").shape[1:3] == (50, 50)  # at least 50 pixels
    assert published_crops(FRAMES, track(40, 10), "hands").shape[1:3] == (30, 30)  # a whole side for small hands
    with pytest.raises(NotMeasured, match="no hands was found"):
        published_crops(FRAMES, None, "hands")
