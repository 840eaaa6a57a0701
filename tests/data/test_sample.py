# SPDX-License-Identifier: Apache-2.0
"""What sources and training agree on."""

import pickle

import pytest

from talkingdit.data import BrokenSample, ClipRequest, Shape


def test_broken_sample_keeps_its_reason_across_processes():
    """Workers of a data loader pickle what they raise; the log needs key and reason on the other side."""
    error = pickle.loads(pickle.dumps(BrokenSample("a/1", "v.mp4 ends after 3 frames")))
    assert (error.key, error.reason) == ("a/1", "v.mp4 ends after 3 frames")
    assert str(error) == "a/1: v.mp4 ends after 3 frames"


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"height": 3}, {"width": 0}, {"height": -2}])
def test_impossible_requests_are_refused(wrong):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"ClipRequest: {name} must be a multiple of"):
        ClipRequest(**wrong)


def test_seconds_of_a_shape():
    assert Shape(frames=20, height=8, width=8, fps=16).seconds == 5.0
