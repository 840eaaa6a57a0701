# SPDX-License-Identifier: Apache-2.0
"""What travels along ComfyUI's wires, and what talkingdit takes and gives.

    IMAGE   float [B, H, W, C] from 0 to 1, C of 1, 3 or 4 (the last is alpha)
    MASK    float [B, H, W] from 0 to 1
    AUDIO   {"waveform": float [B, channels, n], "sample_rate": Hz}
    VIDEO   an object of ComfyUI's, see `get_components`

A picture or a voice is one of a batch of one; a longer batch is refused rather than cut.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from talkingdit.errors import UserError

from . import host

IN_MEMORY = 1 << 30  # bytes of frames; more of them lie on the disk, and are read where they are looked at
BLOCK = 16  # frames that are converted together


def picture_of(image: Any, name: str = "image") -> Any:
    """An IMAGE as a PIL image, with its alpha where it has one.

    Raises:
        UserError: it is none, more than one, or has numbers that are none.
    """
    from PIL import Image

    pixels = _bytes(_one(image, name, "IMAGE [1, H, W, C]", 4), name)
    if pixels.shape[2] not in (1, 3, 4):
        raise UserError(f"{name}: expected an IMAGE of 1, 3 or 4 channels, got {pixels.shape[2]}.")
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def mask_of(mask: Any, name: str = "mask") -> np.ndarray:
    """A MASK as a picture, uint8 [H, W, 3], white where it is 1.

    Raises:
        UserError: it is none, more than one, or black.
    """
    pixels = _bytes(_one(mask, name, "MASK [1, H, W]", 3), name)
    if not pixels.any():
        raise UserError(f"{name}: expected a MASK that is white somewhere, got a black one; paint the face.")
    return np.repeat(pixels[..., None], 3, axis=2)


def sound_of(audio: Any, name: str = "audio") -> tuple[np.ndarray, int]:
    """An AUDIO as float32 samples [n, channels] and their rate in Hz.

    Raises:
        UserError: it is none, more than one, or has no rate.
    """
    if not isinstance(audio, Mapping) or not {"waveform", "sample_rate"} <= set(audio):
        raise UserError(f"{name}: expected an AUDIO with waveform and sample_rate, got {type(audio).__name__}.")
    wave = _one(audio["waveform"], name, "AUDIO [1, channels, n]", 3)
    rate = audio["sample_rate"]
    if isinstance(rate, bool) or int(rate) != rate or rate < 1:
        raise UserError(f"{name}: expected a sample_rate in whole Hz, got {rate!r}.")
    if not wave.is_floating_point():
        wave = wave.float() / -float(torch.iinfo(wave.dtype).min)
    return wave.T.float().cpu().numpy(), int(rate)


def file_of_video(video: Any, name: str = "video") -> tuple[Path, bool]:
    """A VIDEO as a file, and whether that is ours to remove. Pictures that are no file yet are kept without loss.

    Raises:
        UserError: it is none.
    """
    if not hasattr(video, "get_components"):
        raise UserError(f"{name}: expected a VIDEO, got {type(video).__name__}.")
    source = video.get_stream_source() if _is_whole_file(video) else None
    if isinstance(source, str):
        return Path(source), False
    return _lossless(video.get_components(), name), True


def image_of(frames: np.ndarray) -> torch.Tensor:
    """Frames uint8 [T, H, W, 3] as an IMAGE. A long video's lies on the disk, in a file that goes with it."""
    if 4 * frames.size <= IN_MEMORY:
        images = np.empty(frames.shape, np.float32)
    else:
        with tempfile.TemporaryFile(dir=host.scratch_folder()) as held:
            images = np.memmap(held, np.float32, "w+", shape=frames.shape)
    for begin in range(0, len(frames), BLOCK):
        images[begin : begin + BLOCK] = frames[begin : begin + BLOCK] * np.float32(1 / 255)
    return torch.from_numpy(images)


def audio_of(samples: np.ndarray, rate: int) -> dict[str, Any]:
    """Samples [n, channels] as an AUDIO."""
    return {"waveform": torch.from_numpy(np.ascontiguousarray(samples.T))[None], "sample_rate": rate}


def _one(batch: Any, name: str, expected: str, dims: int) -> torch.Tensor:
    """The only one of a batch."""
    if not isinstance(batch, torch.Tensor) or batch.dim() != dims or 0 in batch.shape:
        got = f"shape {list(batch.shape)}" if isinstance(batch, torch.Tensor) else type(batch).__name__
        raise UserError(f"{name}: expected {expected}, got {got}.")
    if len(batch) != 1:
        raise UserError(f"{name}: expected one, {expected}, got a batch of {len(batch)}; take one of them.")
    return batch[0]


def _bytes(values: torch.Tensor, name: str) -> np.ndarray:
    """0 .. 1 to 0 .. 255, to the nearest: a picture that ComfyUI has read from a file is that file's again."""
    values = values.detach().float().cpu()
    if not bool(values.isfinite().all()):
        raise UserError(f"{name}: expected numbers from 0 to 1, got some that are none (NaN or infinite).")
    return (values.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _is_whole_file(video: Any) -> bool:
    """Does a VIDEO stand for all of a file? Newer ones may be a part of it."""
    source = getattr(video, "get_stream_source", lambda: None)()
    if not isinstance(source, str):
        return False
    try:
        return type(video)(source).get_duration() == video.get_duration()
    except (TypeError, ValueError, OSError):
        return False


def _lossless(components: Any, name: str) -> Path:
    """Pictures and their rate as a file of FFV1, in RGB."""
    import av

    images, rate = components.images, Fraction(components.frame_rate).limit_denominator(1001)
    if not isinstance(images, torch.Tensor) or images.dim() != 4 or 0 in images.shape:
        raise UserError(f"{name}: expected a VIDEO with frames, got one without.")
    path = host.scratch_file(".mkv")
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width, stream.pix_fmt = images.shape[1], images.shape[2], "bgr0"
        for image in images:
            frame = av.VideoFrame.from_ndarray(_bytes(image[..., :3], name), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode())
    return path
