# SPDX-License-Identifier: Apache-2.0
"""Colours of an image file brought to sRGB, whichever way the file says what its numbers mean.

In a PNG `cICP` goes before an ICC profile, that before `sRGB`, and that before `gAMA` and `cHRM` (its specification's
order); in HEIC and AVIF a profile goes before the code points of `nclx` (ITU-T H.273); the EXIF of a camera may say
Adobe RGB. What says nothing is sRGB already.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

Chromaticities = tuple[float, float, float, float, float, float, float, float]  # x and y of white, red, green, blue

D65 = (0.3127, 0.3290)
SRGB: Chromaticities = (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
ADOBE: Chromaticities = (*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
# Colour primaries by their code points.
PRIMARIES: dict[int, Chromaticities] = {
    1: SRGB,
    5: (*D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
LINEAR, HIGH_RANGE = 8, {16: "PQ", 18: "HLG"}  # transfer characteristics
GAMMAS = {4: 2.2, 5: 2.8, 17: 2.6}  # others are meant to be seen as sRGB is
SRGB_GAMMA, NEARLY = 1 / 0.45455, 0.05  # of gAMA; within five per cent it means the curve of sRGB
ROWS = 256  # converted at once
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


@dataclass(frozen=True)
class Space:
    """RGB by the chromaticities of its primaries, and by the exponent of its curve (None: the curve of sRGB)."""

    primaries: Chromaticities = SRGB
    gamma: float | None = None


class HighRange(ValueError):
    """The image is brighter than a screen of sRGB can show; the text says by what curve."""


def to_srgb(image: Image.Image, head: bytes) -> Image.Image:
    """An image of any mode of 8 bits as RGB, or RGBA where it has transparency, in sRGB.

    Args:
        image: loaded.
        head: the beginning of its file.

    Raises:
        HighRange: of PQ or HLG.
    """
    points = _code_points(image, head)
    profile = None if points and image.format == "PNG" else image.info.get("icc_profile")
    named = None if profile else _space(image, points)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA" if image.mode in ("P", "PA", "RGB", "RGBA", "RGBa") else "LA")
        alpha = image.getchannel("A")
        image = image.convert("RGB" if image.mode == "RGBA" else "L")
    elif image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    converted = _by_profile(image, profile) if profile or image.mode == "LAB" else None
    if converted is None:
        converted = image if image.mode == "RGB" else image.convert("RGB")
        if named is not None and named != Space():
            converted = _by_matrix(converted, named)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _by_profile(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """By an ICC profile; None where it is damaged or of other pixels, which nobody can see by its name."""
    from PIL import ImageCms

    try:
        if image.mode == "LAB" and not profile:
            source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        else:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        space = source.profile.xcolor_space.strip()
        fitting = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}.get(space)
        if fitting == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if fitting != image.mode:
            return None
        return ImageCms.profileToProfile(
            image,
            source,
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


# ---- Without a profile -----------------------------------------------------------------------------------------------


def _space(image: Image.Image, points: tuple[int, int] | None) -> Space | None:
    """What a file without a profile says of its colours."""
    if points is not None:
        primaries, transfer = points
        if transfer in HIGH_RANGE:
            raise HighRange(HIGH_RANGE[transfer])
        gamma = 1.0 if transfer == LINEAR else GAMMAS.get(transfer)
        return Space(PRIMARIES.get(primaries, SRGB), gamma)
    if "srgb" in image.info:
        return None
    white = image.info.get("chromaticity")
    encoded = image.info.get("gamma")
    if white is not None or encoded:
        gamma = 1 / encoded if encoded else None
        if gamma is not None and abs(gamma / SRGB_GAMMA - 1) < NEARLY:
            gamma = None
        known = tuple(white) if white is not None and len(white) == 8 else SRGB
        near = np.abs(np.subtract(known, SRGB)).max() < 0.005
        return Space(SRGB if near else known, gamma)
    return Space(ADOBE, 563 / 256) if _is_adobe(image) else None


def _code_points(image: Image.Image, head: bytes) -> tuple[int, int] | None:
    """Colour primaries and transfer characteristics of a PNG, HEIC or AVIF file."""
    if image.format == "PNG":
        found = re.search(rb"\0\0\0\x04cICP(.)(.)", head.partition(b"IDAT")[0], re.DOTALL)
        return (found[1][0], found[2][0]) if found else None
    if image.format in ("HEIF", "AVIF"):
        found = re.search(rb"colrnclx(..)(..)", head, re.DOTALL)
        return (int.from_bytes(found[1], "big"), int.from_bytes(found[2], "big")) if found else None
    return None


def _is_adobe(image: Image.Image) -> bool:
    """Whether EXIF says Adobe RGB, as cameras do that write no profile (DCF 2.0)."""
    from PIL import ExifTags

    try:
        exif = image.getexif()
        about = exif.get_ifd(ExifTags.IFD.Exif)
        index = exif.get_ifd(ExifTags.IFD.Interop).get(1, "")
    except Exception:  # damaged EXIF says nothing
        return False
    name = index.decode("ascii", "replace") if isinstance(index, bytes) else str(index)
    return about.get(ExifTags.Base.ColorSpace) == 2 or name.strip("\0 ") == "R03"


def _by_matrix(image: Image.Image, space: Space) -> Image.Image:
    from PIL import Image as Images

    return Images.fromarray(pixels_to_srgb(np.array(image), space))


def pixels_to_srgb(pixels: NDArray[np.uint8], space: Space) -> NDArray[np.uint8]:
    """Pixels uint8 [H, W, 3] of a space, which are changed in place to those of sRGB, and returned."""
    levels = np.arange(256) / 255
    linear = (_linear(levels) if space.gamma is None else levels**space.gamma).astype(np.float32)
    try:
        matrix = (np.linalg.inv(_to_xyz(SRGB)) @ _to_xyz(space.primaries)).astype(np.float32)
    except np.linalg.LinAlgError:  # chromaticities of no colour space
        return pixels
    for top in range(0, len(pixels), ROWS):
        mixed = linear[pixels[top : top + ROWS]] @ matrix.T
        pixels[top : top + ROWS] = (_encoded(np.clip(mixed, 0, 1)) * 255 + 0.5).astype(np.uint8)
    return pixels


def _to_xyz(primaries: Chromaticities) -> NDArray[np.float64]:
    """[3, 3] from linear RGB to XYZ seen under D65 (SMPTE RP 177, Bradford adaptation)."""
    points: Callable[[Any], Any] = lambda xy: np.stack([xy[:, 0], xy[:, 1], 1 - xy.sum(1)]) / xy[:, 1]  # noqa: E731
    xy = np.array(primaries, dtype=np.float64).reshape(4, 2)
    if not np.isfinite(xy).all() or (xy[:, 1] <= 0).any():
        raise np.linalg.LinAlgError("chromaticities")
    white, colours = points(xy[:1])[:, 0], points(xy[1:])
    matrix = colours * np.linalg.solve(colours, white)
    ours, theirs = BRADFORD @ points(np.array([D65]))[:, 0], BRADFORD @ white
    adapted: NDArray[np.float64] = np.linalg.inv(BRADFORD) @ np.diag(ours / theirs) @ BRADFORD @ matrix
    return adapted


def _linear(values: NDArray[Any]) -> NDArray[Any]:
    return np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)


def _encoded(values: NDArray[Any]) -> NDArray[Any]:
    return np.where(values > 0.0031308, 1.055 * np.maximum(values, 1e-9) ** (1 / 2.4) - 0.055, values * 12.92)
