# SPDX-License-Identifier: Apache-2.0
"""The frame metrics of JWB-DH-V1 (section 3.3) exactly as its published program computes them.

They are there to compare with published tables, odd as some are: `protocol.py` lists every difference from the
corrected forms. Common to all: only the first 16 frames of a pair count; frame i is compared with frame i up to the end
of the shorter video; a generated frame is brought to the size of the true one by OpenCV's bilinear resize. Videos are
uint8 [F, H, W, 3] in OpenCV's order blue, green, red.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from talkingdit.errors import UserError
from talkingdit.eval.frechet import FloatArray, as_features, centred_rows, check_pair, distance_of, frechet_distance
from talkingdit.eval.similarity import cosine, peak_signal_to_noise, structural_similarity

FRAMES = 16
SIDE, VIDEO_SIDE = 299, 224  # of the inputs of the image and of the video network
RIDGE = 1e-6  # on the covariances of FVD
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EDGES = (100, 200)  # thresholds of Canny

Video = npt.NDArray[np.uint8]
Network = Callable[[Tensor], Tensor]


def psnr(gen: Any, gt: Any) -> float:
    """Mean over frames of the peak signal-to-noise ratio in dB (range 255); infinite where a frame equals its truth."""
    return _mean_over_frames("psnr", peak_signal_to_noise, gen, gt)


def ssim(gen: Any, gt: Any) -> float:
    """Mean structural similarity: uniform window of 7, on small frames less but at least 3; channels averaged."""
    return _mean_over_frames("ssim", structural_similarity, gen, gt)


def csim(gen: Any, gt: Any) -> float:
    """Mean cosine of all pixels of two frames, 0 where either is black, also where both are.

    Not the cosine of identity embeddings that others call so.
    """
    return _mean_over_frames("csim", lambda a, b: cosine(a, b) if a.any() else 0.0, gen, gt)


def fid(gen: Any, gt: Any, network: Network) -> float:
    """Frechet distance between the frames of one video and those of the other, not between two sets of videos.

    Args:
        network: normalised frames [n, 3, 299, 299] -> features [n, d].
    """
    return frechet(*(_frame_features("fid", video, network) for video in _videos("fid", gen, gt)))


def efid(gen: Any, gt: Any, network: Network) -> float:
    """`fid` on maps of Canny edges. Not the distance of expressions that others call E-FID."""
    edges = (edge_maps(video[:FRAMES]) for video in _videos("efid", gen, gt))
    return frechet(*(_frame_features("efid", video, network) for video in edges))


def fvd(gen: Any, gt: Any, network: Network) -> float:
    """`frechet_video` between two single videos: in effect the squared distance of their features.

    Args:
        network: videos [n, 3, 16, 224, 224] in 0..1, red first, filled up with black frames -> features [n, d].
    """
    clips = [video_input(video)[None] for video in _videos("fvd", gen, gt)]
    with torch.inference_mode():
        return frechet_video(*(network(clip) for clip in clips))


def frechet(a: Any, b: Any) -> float:
    """Frechet distance of features [n, d] and [m, d]; see `frechet_distance`."""
    return frechet_distance(a, b)


def frechet_video(a: Any, b: Any) -> float:
    """Frechet distance of features of videos as the program has it.

    A single sample gets the covariance 1e-6 I; 1e-6 I is added to both covariances inside the matrix root and not in
    the traces, so that equal sets would be below zero: they are zero here.
    """
    first, second = as_features(a, "a"), as_features(b, "b")
    check_pair(first, second, least=1)
    return distance_of(first.mean(0), second.mean(0), [_video_rows(first)], [_video_rows(second)], ridge=RIDGE)


def frame_input(frame: Video) -> Tensor:
    """A frame [H, W, 3], blue first, as the image network reads it: [3, 299, 299], normalised as for ImageNet."""
    red_first = Image.fromarray(np.ascontiguousarray(frame[..., ::-1]))
    resized = np.asarray(red_first.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32) / np.float32(255)
    normalised = (resized - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1)))


def edge_maps(frames: Video) -> Video:
    """Canny edges of each frame, 0 or 255, in three equal channels: [F, H, W, 3]."""
    grey = (cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_BGR2GRAY) for frame in frames)
    return np.stack([np.repeat(np.asarray(cv2.Canny(one, *EDGES))[..., None], 3, axis=-1) for one in grey])


def video_input(frames: Video) -> Tensor:
    """The first 16 frames as the video network reads them: [3, 16, 224, 224] in 0..1, black where there are fewer."""
    filled = np.zeros((FRAMES, VIDEO_SIDE, VIDEO_SIDE, 3), np.float32)
    for i, frame in enumerate(frames[:FRAMES]):
        small = cv2.resize(np.ascontiguousarray(frame), (VIDEO_SIDE, VIDEO_SIDE), interpolation=cv2.INTER_AREA)
        filled[i] = np.asarray(small, np.float32)[..., ::-1] / np.float32(255)
    return torch.from_numpy(filled.transpose(3, 0, 1, 2).copy())


def resized_like(frame: Video, like: Video) -> Video:
    """A frame at the size of another, bilinear as OpenCV does it; itself where the sizes are equal."""
    if frame.shape == like.shape:
        return frame
    size = (like.shape[1], like.shape[0])
    return np.asarray(cv2.resize(np.ascontiguousarray(frame), size, interpolation=cv2.INTER_LINEAR), np.uint8)


def _frame_features(name: str, video: Video, network: Network) -> FloatArray:
    with torch.inference_mode():
        features = network(torch.stack([frame_input(frame) for frame in video[:FRAMES]]))
    return as_features(features, f"what the network of {name} gives")


def _video_rows(features: FloatArray) -> FloatArray:
    """Rows whose X^T X is the covariance, for a single sample 1e-6 I."""
    if len(features) > 1:
        return centred_rows(features)
    rows: FloatArray = np.sqrt(RIDGE) * np.eye(features.shape[1])
    return rows


def _mean_over_frames(name: str, measure: Callable[[Video, Video], float], gen: Any, gt: Any) -> float:
    return float(np.mean([measure(a, b) for a, b in _pairs(*_videos(name, gen, gt))]))


def _pairs(gen: Video, gt: Video) -> Iterator[tuple[Video, Video]]:
    for one, true in zip(gen[:FRAMES], gt[:FRAMES], strict=False):
        yield resized_like(one, true), true


def _videos(name: str, *given: Any) -> tuple[Video, ...]:
    return tuple(_video(name, one, which) for one, which in zip(given, ("gen", "gt"), strict=True))


def _video(name: str, given: Any, which: str) -> Video:
    video = np.asarray(given)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise UserError(
            f"jwb_compat.{name}: {which} must be frames uint8 [F, H, W, 3] with at least one frame, "
            f"got {video.dtype} {list(video.shape)}."
        )
    return video
