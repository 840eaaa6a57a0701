# SPDX-License-Identifier: Apache-2.0
"""What a file is that is no image to us, in words: what a person has, and why it is not taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from talkingdit.media.opening import open_media

EXPORT = "export it as a PNG or JPEG"
# How files begin; the first that fits. Some have their names in the midst.
BEGINNINGS = (
    (b"%PDF", 0, "a PDF"),
    (b"%!PS", 0, "PostScript"),
    (b"\xc5\xd0\xd3\xc6", 0, "PostScript"),
    (b"8BPS", 0, "a Photoshop file of a kind that is not read"),
    (b"\xff\x0a", 0, "JPEG XL"),
    (b"JXL ", 4, "JPEG XL"),
    (b"\x76\x2f\x31\x01", 0, "OpenEXR"),
    (b"#?RADIANCE", 0, "a high-range image of Radiance"),
    (b"#?RGBE", 0, "a high-range image of Radiance"),
    (b"PF\n", 0, "a high-range image (PFM)"),
    (b"P7\n", 0, "a PAM"),
    (b"FUJIFILM", 0, "a camera's raw file"),
    (b"IIU\0", 0, "a camera's raw file"),
    (b"crx ", 8, "a camera's raw file"),
    (b"gimp xcf", 0, "a file of GIMP"),
    (b"PK\x03\x04", 0, "an archive"),
    (b"<!DOCTYPE html", 0, "a web page"),
    (b"<html", 0, "a web page"),
)
PROGRAMS = ("EPS", "WMF")  # Pillow has other programs draw them
PHOTOMETRIC = {0: "grey", 1: "grey", 2: "RGB", 3: "a palette", 5: "CMYK", 6: "YCbCr", 8: "Lab", 9: "Lab", 10: "Lab"}
RAW = (32803, 34892)  # of TIFF: what a sensor saw
REDUCED, SUBFILE, DNG_VERSION, PLANES, BITS = 1, 254, 50706, 284, 258


def kind_of(source: Path, head: bytes) -> str:
    """What a file is that Pillow does not know, as far as others can tell.

    Args:
        head: how it begins, 64 bytes or more.
    """
    import av

    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff_kind(source)
    for beginning, at, name in BEGINNINGS:
        if head[at : at + len(beginning)].lower() == beginning.lower():
            return f"{name}; {EXPORT}"
    if b"<svg" in head:
        return f"SVG; {EXPORT}"
    try:
        with open_media(source) as container:
            # FFmpeg plays text as a terminal, and believes the name of a file that should be an image.
            guessed = container.format.name in ("tty", "image2") or container.format.name.endswith("_pipe")
            if container.streams.video and not guessed:
                return "a video"
            if container.streams.audio:
                return "a sound file"
    except (av.FFmpegError, ValueError):
        pass
    return "a file of another kind"


def flaw_of(opened: Any) -> str | None:
    """Why an image must not be read that Pillow can open, in words; None for all others.

    Args:
        opened: of Pillow; no pixel was decoded.
    """
    if opened.format in PROGRAMS:
        return f"{opened.format}, which other programs draw; {EXPORT}"
    if opened.format != "TIFF":
        return None
    tags = opened.tag_v2
    if DNG_VERSION in tags or int(tags.get(SUBFILE, 0)) & REDUCED:
        return f"a camera's raw file, whose preview is {opened.width} x {opened.height}; {EXPORT}"
    if tags.get(PLANES) == 2 and max(tags.get(BITS, (8,))) > 8:  # whose numbers Pillow takes for those of 8 bits
        return f"a TIFF of {tags[BITS][0]} bits whose colours lie in planes; {EXPORT}"
    return None


def _tiff_kind(source: Path) -> str:
    """TIFF holds anything; by name what Pillow has no mode for."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    try:
        with source.open("rb") as file:
            tags = ImageFileDirectory_v2(file.read(8))
            file.seek(tags.next)
            tags.load(file)
        bits, kind, colours = tags.get(BITS, (1,)), tags.get(339, (1,)), tags.get(262, -1)
        if colours in RAW or DNG_VERSION in tags:
            return f"a camera's raw file; {EXPORT}"
        what = {2: "signed integers", 3: "floats"}.get(kind[0], "integers")
        if bits[0] > 16 or what == "floats":
            return f"a TIFF of {len(bits)} x {bits[0]}-bit {what}; save it with 8 or 16 bits"
        named = PHOTOMETRIC.get(colours, "of no known colours")
        return f"a TIFF of {len(bits)} x {bits[0]}-bit {what}, {named}; {EXPORT}"
    except Exception:  # what is damaged in it does not matter here
        return "a damaged TIFF"
