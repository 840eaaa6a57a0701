# SPDX-License-Identifier: Apache-2.0
"""Images as people have them: any camera's, any program's, as upright sRGB of 8 bits."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from talkingdit.errors import UserError
from talkingdit.media.checks import existing_file, reason_of
from talkingdit.media.foreign import flaw_of, kind_of
from talkingdit.media.profiles import HighRange, to_srgb

if TYPE_CHECKING:
    from PIL import Image

LARGEST_IMAGE = 250_000_000  # pixels; one takes four bytes while it is decoded
WHOLE_IMAGE = 89_478_485  # read whole up to here, where Pillow begins to warn
REDUCED_IMAGE = 40_000_000  # larger ones are read with so many pixels at most, more than any video has
HEAD = 1 << 16  # bytes of a file that tell what it is
PHOTOMETRIC = 262  # the tag of a TIFF that says what its numbers are; 0: white is zero
HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
AVIF = (b"avif", b"avis")


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image upright (EXIF orientation applied), in sRGB, transparency over white.

    Colour profiles are converted. Above 89 million pixels an image is read reduced. 16-bit images and floats from 0 to
    1 are scaled.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        UserError: no such file, empty, not an image, truncated, more than 250 million pixels, of numbers whose meaning
            nothing tells, or of a kind that needs a package which is not installed.
    """
    source = existing_file(path, "image")
    with _opened(source) as opened:
        with _decoding(source):
            with _LIMITS:
                image = _loaded(opened, source)
            image = _upright(image)
            image = _eight_bits(image, source)
            image = to_srgb(image, _head(source))
        if image.mode == "RGB":
            return np.array(image)
        return _over_white(image)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width of an image as it is shown; no pixel is decoded.

    Raises:
        UserError: as `read_image`, for what the beginning of the file tells.
    """
    source = existing_file(path, "image")
    with _opened(source) as opened, _decoding(source):
        # Pillow gives the size of a TIFF as it is turned already.
        turned = opened.format != "TIFF" and opened.getexif().get(0x0112, 1) > 4
        return (opened.width, opened.height) if turned else (opened.height, opened.width)


class _OurLimits:
    """Pillow warns of large images and refuses larger ones, by a number for the whole program: ours says it here."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: int | None = None

    def __enter__(self) -> None:
        from PIL import Image

        with self._lock:
            if not self._inside:
                self._before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        from PIL import Image

        with self._lock:
            self._inside -= 1
            if not self._inside:
                Image.MAX_IMAGE_PIXELS = self._before


_LIMITS = _OurLimits()

# ---- Opening ---------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(source: Path) -> Iterator[Image.Image]:
    from PIL import Image, UnidentifiedImageError

    _prepare(source)
    with _decoding(source):
        try:
            with _LIMITS:
                opened = Image.open(source)
        except UnidentifiedImageError:
            raise UserError(
                f"image {str(source)!r}: expected an image (PNG, JPEG, WebP), got {kind_of(source, _head(source))}"
            ) from None
    with opened:
        with _decoding(source):
            flaw = flaw_of(opened)
        if flaw is not None:
            raise UserError(f"image {str(source)!r}: expected an image (PNG, JPEG, WebP), got {flaw}")
        yield opened


@contextmanager
def _decoding(source: Path) -> Iterator[None]:
    """Decoders raise whatever they come across; a person gets one sentence."""
    try:
        yield
    except UserError:
        raise
    except HighRange as error:
        raise UserError(
            f"image {str(source)!r}: expected colours of standard range, got a high-range image ({error}); "
            "export it as a JPEG or PNG of standard range"
        ) from None
    except Exception as error:
        raise UserError(
            f"image {str(source)!r}: expected a whole image, got one that cannot be decoded ({reason_of(error)})"
        ) from None


def _prepare(source: Path) -> None:
    """Make sure that Pillow can open what phones write."""
    from PIL import features

    head = _head(source, 64)
    if head[4:8] != b"ftyp":
        return
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, int.from_bytes(head[:4], "big"), 4))]
    if any(brand in AVIF for brand in brands):
        if not features.check("avif"):
            raise UserError(f"image {str(source)!r}: AVIF needs a newer Pillow; `pip install -U pillow` brings it")
    elif any(brand in HEIC for brand in brands):
        try:
            import pillow_heif
        except ImportError:
            raise UserError(
                f"image {str(source)!r}: HEIC needs pillow-heif; `pip install pillow-heif` brings it"
            ) from None
        pillow_heif.register_heif_opener()


def _head(source: Path, size: int = HEAD) -> bytes:
    with source.open("rb") as file:
        return file.read(size)


# ---- Pixels ----------------------------------------------------------------------------------------------------------


def _loaded(opened: Image.Image, source: Path) -> Image.Image:
    """The image with its pixels, reduced where it is very large."""
    pixels = opened.width * opened.height
    if pixels > LARGEST_IMAGE:
        raise UserError(
            f"image {str(source)!r}: expected at most {LARGEST_IMAGE // 1_000_000} million pixels, "
            f"got {opened.width} x {opened.height}"
        )
    if pixels <= WHOLE_IMAGE:
        opened.load()
        return opened
    factor = 2
    while pixels / factor**2 > REDUCED_IMAGE:
        factor *= 2
    about, size, exif = dict(opened.info), opened.size, opened.getexif()
    opened.draft(None, (opened.width // factor, opened.height // factor))  # JPEG alone can do it; may do nothing
    opened.load()
    rest = max(1, round(factor * opened.width / size[0]))
    reduced = opened.reduce(rest) if rest > 1 and opened.mode not in ("P", "1") else opened
    if rest > 1 and reduced is opened:
        reduced = opened.resize((opened.width // rest, opened.height // rest))
    reduced.info.update(about)
    reduced.format = opened.format
    reduced.getexif().update(exif)
    return reduced


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    with contextlib.suppress(Exception):  # EXIF is damaged more often than pixels are
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _eight_bits(image: Image.Image, source: Path) -> Image.Image:
    """Numbers of more than 8 bits scaled, which Pillow would clip.

    Raises:
        UserError: nothing tells what the largest number means.
    """
    from PIL import Image as Images

    grey: Any
    # Pillow inverts 8 bits alone.
    white_is_zero = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32) // 257
    elif image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1 or values.max() < 1 / 255:
            got = f"{np.nanmin(values):.4g} to {np.nanmax(values):.4g}"
            raise UserError(f"image {str(source)!r}: expected 8 or 16 bits, or floats from 0 to 1, got floats of {got}")
        grey = values * 255 + 0.5
    elif image.mode == "I":
        if image.format not in ("PPM", "PNG"):  # these mean 16 bits by it
            raise UserError(
                f"image {str(source)!r}: expected 8 or 16 bits, got {_bits(image)}; save it with 8 or 16 bits"
            )
        grey = np.asarray(image).astype(np.uint32) // 257
    else:
        return image
    grey = grey.astype(np.uint8)
    plain = Images.fromarray(255 - grey if white_is_zero else grey)
    plain.info.update({name: value for name, value in image.info.items() if name != "transparency"})
    plain.format = image.format
    return plain


def _bits(image: Any) -> str:
    tags = getattr(image, "tag_v2", {})
    bits, kind = tags.get(258, (32,))[0], tags.get(339, (1,))[0]
    return f"{bits}-bit {'signed ' if kind == 2 else ''}integers"


def _over_white(image: Image.Image) -> np.ndarray:
    from PIL import Image as Images

    white = Images.new("RGB", image.size, (255, 255, 255))
    white.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return np.array(white)
