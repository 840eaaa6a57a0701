# SPDX-License-Identifier: Apache-2.0
"""The pictures of a video: H.264 that every player shows in the same colours, and equal files for equal frames.

Where a width is no multiple of 128, what x264's macroblock tree chooses in its code for AVX-512 depends on what memory
held before. Its code for AVX2 does not depend on it, and gives what machines without AVX-512 give anyway
(docs/reliability.md).
"""

from __future__ import annotations

import functools
import platform
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from talkingdit.media.opening import SCALER_THREADS

if TYPE_CHECKING:
    import av
    from av.container import OutputContainer
    from av.video.stream import VideoStream

LINES_OF_601 = 576  # of standard definition; players take untagged videos of more lines for BT.709
BT709, BT470BG, LIMITED = 1, 5, 1  # code points of ITU-T H.273; the second is BT.601


def add_pictures(
    container: OutputContainer,
    fps: Fraction,
    size: tuple[int, int],
    crf: int,
    preset: str = "medium",
    live: bool = False,
) -> VideoStream:
    """A track of H.264 (yuv420p) for frames of `to_yuv`.

    Args:
        container: opened for writing.
        fps: frames per second.
        size: height and width, both even.
        crf: quality, lower is better.
        preset: of x264.
        live: every frame leaves the encoder at once, and about once a second one begins that needs no others.
    """
    stream: VideoStream = container.add_stream("libx264", rate=fps)
    stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
    options: dict[str, Any] = {"crf": str(crf), "preset": preset}
    if live:
        options |= {"tune": "zerolatency", "g": str(max(1, round(fps)))}
    stream.options = options | repeatable()
    codec: Any = stream.codec_context
    codec.color_range = LIMITED
    if size[0] > LINES_OF_601:
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
    else:
        codec.colorspace = BT470BG
    return stream


def to_yuv(frame: np.ndarray) -> av.VideoFrame:
    """A frame, uint8 [H, W, 3] sRGB, as the encoder takes it: BT.709 above 576 lines, BT.601 up to there."""
    import av
    from av.video.reformatter import Colorspace

    high = frame.shape[0] > LINES_OF_601
    shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    space = Colorspace.ITU709 if high else Colorspace.ITU601
    return shown.reformat(format="yuv420p", dst_colorspace=space, threads=SCALER_THREADS)


@functools.cache
def repeatable() -> dict[str, str]:
    """Options of libx264 by which equal frames give equal files, on this machine."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    features = _features()
    if not features:  # not known here: without the tree, a tenth more bytes
        return {"x264-params": "mbtree=0"}
    return {"x264-params": "asm=AVX2"} if {"avx512f", "avx2", "bmi2", "fma"} <= features else {}


def _features() -> frozenset[str]:
    """What the processor can do, where the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = next(line for line in file if line.startswith("flags")).partition(":")[2]
    except (OSError, StopIteration):
        return frozenset()
    return frozenset(words.split())
