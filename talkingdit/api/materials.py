# SPDX-License-Identifier: Apache-2.0
"""Pictures and voices that a program holds, as files: from there on they take the same road as files of people."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.errors import UserError
from talkingdit.scratch import ScratchFolder

MOST_CHANNELS = 64  # of a sound; more are taken for samples in the wrong order


class Materials:
    """A folder for them, made when it is first needed, which goes with this object."""

    def __init__(self) -> None:
        self._held: Any = None

    @property
    def folder(self) -> Path:
        if self._held is None:
            self._held = ScratchFolder()
        return Path(self._held.name)

    def close(self) -> None:
        """Remove the folder now."""
        if self._held is not None:
            self._held.cleanup()
            self._held = None

    def file(self, value: Any, name: str) -> Path:
        """A path as it is; a picture, or a pair of samples and rate, as a file.

        Args:
            value: a path, a PIL image, uint8 [H, W, 3], or (samples, rate).
            name: what messages call it.

        Raises:
            UserError: anything else.
        """
        if isinstance(value, tuple | list):
            return self.sound(value, name)
        return self.image(value, name)

    def image(self, value: Any, name: str = "image") -> Path:
        """A picture: a path, a PIL image, or uint8 [H, W, 3] RGB.

        Raises:
            UserError: anything else, or the disk is full.
        """
        if isinstance(value, str | os.PathLike):
            return Path(value).expanduser()
        from PIL import Image

        picture = value if isinstance(value, Image.Image) else Image.fromarray(_pixels(value, name))
        more: dict[str, Any] = {}
        if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV", "F"):  # a PNG cannot hold them
            picture = picture.convert("RGB")
        elif len(picture.getexif()):
            more["exif"] = picture.getexif()  # which way is up
        path = self._new(name, ".png")
        _written(path, name, lambda: picture.save(path, compress_level=1, **more))
        return path

    def sound(self, value: Any, name: str = "audio") -> Path:
        """A voice: a path, or (samples, rate) with float samples [n] or [n, channels], or int16 ones.

        Raises:
            UserError: anything else, or the disk is full.
        """
        if isinstance(value, str | os.PathLike):
            return Path(value) if str(value) == "-" else Path(value).expanduser()
        samples, rate = _samples(value, name)
        import soundfile

        path = self._new(name, ".wav")
        large = samples.nbytes > 2**31
        kind = "RF64" if large else "WAV"
        _written(path, name, lambda: soundfile.write(path, samples, rate, format=kind, subtype="FLOAT"))
        return path

    def _new(self, name: str, ending: str) -> Path:
        stem = "".join(letter if letter.isalnum() else "_" for letter in name) or "file"
        path, number = self.folder / f"{stem}{ending}", 1
        while path.exists():
            number += 1
            path = self.folder / f"{stem}_{number}{ending}"
        return path


def _pixels(value: Any, name: str) -> NDArray[np.uint8]:
    shape, kind = getattr(value, "shape", None), str(getattr(value, "dtype", "")).removeprefix("torch.")
    if shape is None or len(shape) != 3 or shape[2] != 3 or kind != "uint8" or 0 in shape:
        got = type(value).__name__ if shape is None else f"{kind} of shape {list(shape)}"
        raise UserError(f"{name}: expected a path, a PIL image or a uint8 array [H, W, 3], got {got}.")
    return np.ascontiguousarray(value)


def _samples(value: Any, name: str) -> tuple[NDArray[np.float32], int]:
    expected = f"{name}: expected a path or (samples, rate) with float32 samples [n] or [n, channels]"
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise UserError(f"{expected}, got {type(value).__name__}.")
    given, rate = value
    try:
        samples = np.asarray(given)
    except (TypeError, ValueError, RuntimeError):
        samples = np.asarray(None)
    known = samples.dtype == np.int16 or samples.dtype.kind == "f"
    if not known or samples.ndim not in (1, 2) or (samples.ndim == 2 and not 1 <= samples.shape[1] <= MOST_CHANNELS):
        raise UserError(f"{expected}, got samples of {samples.dtype} and shape {list(samples.shape)}.")
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or not 1 <= rate < 2**31:
        raise UserError(f"{expected}, got the rate {rate!r}.")
    scale = np.float32(2**-15 if samples.dtype == np.int16 else 1)
    return samples.astype(np.float32) * scale, int(rate)


def _written(path: Path, name: str, write: Any) -> None:
    try:
        write()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{name}: cannot be kept in {path.parent} ({error}).") from error
