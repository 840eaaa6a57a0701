# SPDX-License-Identifier: Apache-2.0
"""Light-ASD against its authors' program, and heads as it is to see them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from talkingdit.detect.light_asd import LightASD, _Seen
from talkingdit.detect.talking import heads, mouths
from talkingdit.errors import UserError

# Scores of the authors' program (github.com/Junhua-Liao/Light-ASD, commit ed38c23, MIT): its networks, its loop over
# six durations (Columbia_test.py) and python_speech_features 0.6, on weights, mouths and sound of `drawn_weights` and
# `drawn_clip`. It drops the last picture, whose sound is cut off.
OFFICIAL = [
    *(-0.18827, -0.20857, -0.29916, -0.31322, -0.31421, -0.27042, -0.3672, -0.33696, -0.1752, -0.08832, -0.15324),
    *(-0.14268, -0.04672, -0.16422, -0.02188, -0.01982, -0.08826, -0.12507, -0.20194, -0.18241, -0.15182, -0.13844),
    *(-0.09788, -0.08503, -0.00236, -0.11429, -0.21113, -0.22216, -0.24705, -0.27102, -0.16344, -0.292, -0.44564),
    *(-0.44559, -0.35283, -0.22208, -0.25889, -0.24678, -0.23007, -0.14183, -0.20859, -0.16992, -0.18778, -0.19988),
    *(-0.22709, -0.276, -0.16872, -0.13509, -0.06098, 0.0732, -0.17736, -0.18254, -0.21207, -0.27364, -0.14824),
    *(-0.19386, -0.0583, 0.01935, 0.1204, 0.19069, 0.37322),
]
# Of the released files: names and shapes of some weights, and how many there are with the second head.
RELEASED = {
    "model.visualEncoder.block1.s_5.weight": (32, 1, 1, 5, 5),
    "model.visualEncoder.block2.t_3.weight": (64, 64, 3, 1, 1),
    "model.visualEncoder.block3.bn_last.running_var": (128,),
    "model.audioEncoder.block1.m_3.weight": (32, 1, 3, 1),
    "model.audioEncoder.block3.t_5.weight": (128, 128, 1, 5),
    "model.GRU.gru_backward.weight_hh_l0": (384, 128),
    "lossAV.FC.weight": (2, 128),
}
SECOND_HEAD = {"lossV.FC.weight": (2, 128), "lossV.FC.bias": (2,)}


def drawn_weights() -> dict[str, torch.Tensor]:
    """Weights of a seed under the released names, in the order of these."""
    shapes = {name: tuple(value.shape) for name, value in LightASD().state_dict().items()} | SECOND_HEAD
    rng, made = np.random.default_rng(0), {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("num_batches_tracked"):
            made[name] = torch.tensor(0)
            continue
        value = rng.standard_normal(shape)
        if name.endswith("running_var"):
            value = np.abs(value) + 0.5
        elif name.endswith("weight"):
            value = 1 + value / 4 if len(shape) == 1 else value * math.sqrt(2 / np.prod(shape[1:]))
        else:
            value = value / 4
        made[name] = torch.tensor(value, dtype=torch.float32)
    return made


def drawn_clip() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    seen = rng.integers(0, 256, (62, 112, 112), dtype=np.uint8)
    return seen, ((rng.standard_normal(39700) * 3000).astype(np.int16) / 32767).astype(np.float32)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> LightASD:
    file = tmp_path_factory.mktemp("weights") / "finetuning_TalkSet.model"
    torch.save(drawn_weights(), file)
    return LightASD.from_file(file)


def test_scores_are_those_of_the_authors_program(network: LightASD) -> None:
    found = network.judge(drawn_clip()[0], 25.0, drawn_clip()[1])
    assert len(found) == 62
    np.testing.assert_allclose(found[:61], OFFICIAL, atol=2e-5)
    assert found[61] == found[60]  # its sound has ended


def test_names_are_those_of_the_released_files() -> None:
    names = {name: tuple(value.shape) for name, value in LightASD().state_dict().items()}
    assert len(names | SECOND_HEAD) == 192
    assert names.items() >= RELEASED.items()


def test_pieces_share_features_and_stay_what_they_are(network: LightASD) -> None:
    """Features of a piece are those of its own pictures alone; the last one is shorter than what the encoder sees."""
    seen = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (54, 32, 32), dtype=np.uint8))
    with torch.inference_mode():
        shared = _Seen(network, seen)
        for first, last in ((0, 25), (25, 50), (0, 50), (50, 54), (0, 54)):
            torch.testing.assert_close(shared.part(first, last), network.see(seen[None, first:last])[0])


def test_other_frame_rates_are_read_at_25(network: LightASD) -> None:
    seen, sound = drawn_clip()[0][:14], drawn_clip()[1][:12000]
    slow = network.judge(seen, 25.0, sound)
    fast = network.judge(np.repeat(seen, 2, 0), 50.0, sound)
    assert len(fast) == 28
    np.testing.assert_allclose(fast[::2], slow, atol=1e-6)


def test_what_is_not_light_asd_is_one_sentence(tmp_path: Path, network: LightASD) -> None:
    other = tmp_path / "other.model"
    for what in (b"nothing", {"a": torch.zeros(1)}, [1, 2]):
        if isinstance(what, bytes):
            other.write_bytes(what)
        else:
            torch.save(what, other)
        with pytest.raises(UserError, match=r"other\.model: expected the weights finetuning_TalkSet") as caught:
            LightASD.from_file(other)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"needs 0\.04 s of pictures and sound"):
        network.judge(drawn_clip()[0], 25.0, np.zeros(0, np.float32))


def test_heads_hang_from_the_upper_edge_of_the_face() -> None:
    """Where red is x and green is y, colours tell from where pixels are: 1.4 boxes around, 0.8 half boxes below."""
    y, x = np.mgrid[:200, :250].astype(np.uint8)
    picture = np.stack([x, y, np.full_like(x, 7)], -1)[None]
    box = np.array([[100.0, 60.0, 140.0, 100.0]], np.float32)  # middle 120, 80; half 20
    (head,) = heads(picture, box)
    corners = head[0, 0, :2], head[-1, -1, :2]
    np.testing.assert_allclose(corners, [[92, 60], [147, 115]], atol=1)
    (mouth,) = mouths(head[None])
    assert mouth.shape == (112, 112)
    np.testing.assert_allclose(mouth[56, 56], 0.299 * 120 + 0.587 * 88 + 0.114 * 7, atol=2)
    outside = heads(picture, box - np.array([100, 60, 100, 60], np.float32))[0]
    assert (outside[:, 0] == 110).all()


def test_a_box_that_jumps_for_a_picture_is_steadied() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1, 80, 80, 3), dtype=np.uint8)
    boxes = np.tile(np.array([20.0, 20.0, 50.0, 50.0], np.float32), (15, 1))
    boxes[7] += 25
    seen = heads(np.repeat(picture, 15, 0), boxes)
    assert (seen == seen[0]).all()
