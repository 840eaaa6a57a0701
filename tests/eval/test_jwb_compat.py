# SPDX-License-Identifier: Apache-2.0
"""The metrics of JWB-DH-V1 as its program computes them, against numbers that this program gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from talkingdit.errors import UserError
from talkingdit.eval import jwb_compat

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "jwb_metrics.safetensors")
PAIRS = ("same_size", "resize", "tiny")


def image_network(x: Tensor) -> Tensor:
    """The stand-in for Inception with which the numbers were made."""
    return torch.cat([adaptive_avg_pool2d(x, 4).flatten(1), x.abs().mean((2, 3))], 1)


def video_network(x: Tensor) -> Tensor:
    return adaptive_avg_pool3d(x, 2).flatten(1)


def pair(name: str) -> tuple[Any, Any]:
    return GOLDEN[f"{name}/in/gen"].numpy(), GOLDEN[f"{name}/in/gt"].numpy()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("metric", ["psnr", "ssim", "csim"])
def test_frame_metrics(name: str, metric: str) -> None:
    assert getattr(jwb_compat, metric)(*pair(name)) == pytest.approx(GOLDEN[f"{name}/out/{metric}"].item(), abs=1e-6)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("metric", ["fid", "efid", "fvd"])
def test_frechet_metrics(name: str, metric: str) -> None:
    network = video_network if metric == "fvd" else image_network
    value = getattr(jwb_compat, metric)(*pair(name), network)
    assert value == pytest.approx(GOLDEN[f"{name}/out/{metric}"].item(), rel=1e-3)


@pytest.mark.parametrize("name", PAIRS)
def test_features_of_the_networks_inputs(name: str) -> None:
    for which, video in zip(("gen", "gt"), pair(name), strict=True):
        frames = video[: jwb_compat.FRAMES]
        plain = image_network(torch.stack([jwb_compat.frame_input(frame) for frame in frames]))
        torch.testing.assert_close(plain, GOLDEN[f"{name}/mid/inception_feats_{which}"], rtol=0, atol=1e-5)
        edges = image_network(torch.stack([jwb_compat.frame_input(frame) for frame in jwb_compat.edge_maps(frames)]))
        torch.testing.assert_close(edges, GOLDEN[f"{name}/mid/edge_feats_{which}"], rtol=0, atol=1e-5)


def test_inputs_of_the_networks() -> None:
    gen = pair("same_size")[0]
    every_eighth = (slice(None), slice(None, None, 8), slice(None, None, 8))
    given = jwb_compat.frame_input(gen[0])[every_eighth]
    torch.testing.assert_close(given, GOLDEN["same_size/mid/inception_input_frame0"], rtol=0, atol=1e-5)
    edges = jwb_compat.edge_maps(gen[:1])
    np.testing.assert_array_equal(edges[0, ..., 0], GOLDEN["same_size/mid/canny_frame0"].numpy())
    given = jwb_compat.frame_input(edges[0])[every_eighth]
    torch.testing.assert_close(given, GOLDEN["same_size/mid/edge_input_frame0"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "metric"),
    [("fid_0", "frechet"), ("fid_1", "frechet"), ("fvd_0", "frechet_video"), ("fvd_1", "frechet_video")],
)
def test_frechet_of_given_features(name: str, metric: str) -> None:
    value = getattr(jwb_compat, metric)(GOLDEN[f"{name}/in/gen"], GOLDEN[f"{name}/in/gt"])
    assert value == pytest.approx(GOLDEN[f"{name}/out"].item(), rel=1e-6)


def test_equal_videos_are_perfect() -> None:
    video = pair("same_size")[1]
    assert jwb_compat.psnr(video, video) == float("inf")
    assert jwb_compat.ssim(video, video) == pytest.approx(1, abs=1e-12)
    assert jwb_compat.csim(video, video) == pytest.approx(1, abs=1e-12)
    assert 0 <= jwb_compat.fid(video, video, image_network) < 1e-9
    assert 0 <= jwb_compat.efid(video, video, image_network) < 1e-9
    assert jwb_compat.fvd(video, video, video_network) == 0


def test_black_frames_have_no_cosine() -> None:
    """The program gives 0 where a frame has no length, also where both are black and so equal."""
    black, grey = np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 8, 8, 3), 9, np.uint8)
    assert [jwb_compat.csim(*two) for two in ((black, black), (black, grey), (grey, black))] == [0, 0, 0]
    assert jwb_compat.csim(grey, grey * 5) == pytest.approx(1, abs=1e-12)
    half = np.concatenate([black[:1], grey[:1]])
    assert jwb_compat.csim(half, half) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    "given", [np.zeros((4, 6, 9), np.uint8), np.zeros((4, 6, 9, 3), np.float32), np.zeros((0, 6, 9, 3), np.uint8)]
)
def test_what_is_no_video_is_named(given: Any) -> None:
    with pytest.raises(UserError, match=r"jwb_compat.psnr: gen must be frames uint8 \[F, H, W, 3\]"):
        jwb_compat.psnr(given, pair("tiny")[1])


def test_only_the_first_frames_count() -> None:
    gen, gt = pair("same_size")
    changed = gen.copy()
    changed[jwb_compat.FRAMES :] = 0
    assert jwb_compat.ssim(gen, gt) == jwb_compat.ssim(changed, gt)
    assert jwb_compat.fid(gen, gt, image_network) == jwb_compat.fid(changed, gt, image_network)
    assert jwb_compat.fvd(gen, gt, video_network) == jwb_compat.fvd(changed, gt, video_network)
