# SPDX-License-Identifier: Apache-2.0
"""What a picture is: colours as they are meant, whatever the file; what cannot be read is named."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from talkingdit.errors import UserError
from talkingdit.media import image as media_image
from talkingdit.media.image import image_size, read_image

# Published: to linear sRGB from linear Display P3 and Adobe RGB (1998), both of D65.
P3 = ((1.2249401, -0.2249404, 0.0), (-0.0420569, 1.0420571, 0.0), (-0.0196376, -0.0786361, 1.0982735))
ADOBE = ((1.3983557, -0.3983557, 0.0), (0.0, 1.0, 0.0), (0.0, -0.0429289, 1.0429289))
# Their primaries under D50, as profiles have them.
P3_D50 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_D50 = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def profile(primaries: tuple[tuple[float, ...], ...], gamma: float | None) -> bytes:
    """An ICC profile of three primaries and a curve; None is that of sRGB."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    curve = (
        b"para\0\0\0\0\0\x03\0\0" + b"".join(map(number, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
        if gamma is None
        else b"para\0\0\0\0\0\0\0\0" + number(gamma)
    )
    words = "x".encode("utf-16-be")
    text = b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(words), 28) + words
    tags = {b"desc": text, b"cprt": text, b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(number, (0.9642, 1.0, 0.8249)))}
    for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True):
        tags[name] = b"XYZ \0\0\0\0" + b"".join(map(number, values))
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", at + len(body), len(value))
        body += value
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"\0" * 4, 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    head += b"".join(map(number, (0.9642, 1.0, 0.8249)))
    return head.ljust(128, b"\0") + table + body


def wanted(pixels: np.ndarray, matrix: tuple[tuple[float, ...], ...], gamma: float | None) -> np.ndarray:
    values = pixels / 255
    linear = np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)
    mixed = np.clip((linear if gamma is None else values**gamma) @ np.array(matrix).T, 0, 1)
    encoded = np.where(mixed > 0.0031308, 1.055 * np.maximum(mixed, 1e-12) ** (1 / 2.4) - 0.055, 12.92 * mixed)
    return encoded * 255


def chart() -> np.ndarray:
    """[32, 32, 3]: soft colours, none far outside sRGB, and greys."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.float64)
    pixels[:16] = pixels[:16].mean(axis=2, keepdims=True) * 0.6 + pixels[:16] * 0.4
    return pixels.round().astype(np.uint8)


def off(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(found.astype(float) - right).max())


WAYS: dict[str, tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...], float | None]] = {
    "p3": (P3_D50, P3, None),
    "adobe": (ADOBE_D50, ADOBE, 563 / 256),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "transparent", "palette", "avif", "heic"])
def test_a_profile_is_converted_to_srgb(tmp_path: Path, way: str, kind: str) -> None:
    primaries, matrix, gamma = WAYS[way]
    icc, pixels = profile(primaries, gamma), chart()
    path, picture = tmp_path / f"a.{kind}", Image.fromarray(pixels)
    near = 1.5
    if kind == "transparent":
        path = tmp_path / "a.png"
        picture.putalpha(Image.fromarray(np.full((32, 32), 255, np.uint8)))
        picture.save(path, icc_profile=icc)
    elif kind == "palette":
        path, picture = tmp_path / "a.png", picture.quantize(200)
        pixels = np.asarray(picture.convert("RGB"))
        picture.save(path, icc_profile=icc)
    elif kind in ("avif", "heic"):
        if kind == "heic":
            pytest.importorskip("pillow_heif").register_heif_opener()
        pixels = np.repeat(np.repeat(pixels[::8, ::8], 32, 0), 32, 1)  # compression is not what is tested
        Image.fromarray(pixels).save(path, icc_profile=icc, quality=100, subsampling="4:4:4", chroma=444)
        pixels, near = pixels[16::32, 16::32], 14
    else:
        picture.save(path, icc_profile=icc, **({"lossless": True} if kind == "webp" else {}))
    found = read_image(path)
    found = found[16::32, 16::32] if kind in ("avif", "heic") else found
    right = wanted(pixels, matrix, gamma)
    assert off(found, right) <= near
    assert off(pixels, right) > 40  # as it was read before


def test_what_is_srgb_stays_as_it_is(tmp_path: Path) -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for number, more in enumerate(({}, {"icc_profile": icc}, {"icc_profile": b"damaged" * 40})):
        Image.fromarray(chart()).save(tmp_path / f"{number}.png", **more)
        np.testing.assert_array_equal(read_image(tmp_path / f"{number}.png"), chart())


def png(path: Path, pixels: np.ndarray, **chunks: bytes) -> None:
    info = PngImagePlugin.PngInfo()
    for name, content in chunks.items():
        info.add(name.encode(), content)
    Image.fromarray(pixels).save(path, pnginfo=info)


def chromaticities(*values: float) -> bytes:
    return b"".join(struct.pack(">I", round(value * 100000)) for value in values)


P3_XY = chromaticities(0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)


@pytest.mark.parametrize(
    ("chunks", "matrix", "gamma"),
    [
        ({"cHRM": P3_XY}, P3, None),
        ({"cHRM": P3_XY, "gAMA": struct.pack(">I", 45455)}, P3, None),
        ({"cICP": bytes((12, 13, 0, 1))}, P3, None),
        ({"gAMA": struct.pack(">I", 100000)}, np.eye(3), 1.0),
        ({"gAMA": struct.pack(">I", 45455)}, np.eye(3), None),
        ({"sRGB": b"\0", "cHRM": P3_XY, "gAMA": struct.pack(">I", 100000)}, np.eye(3), None),
        ({"cHRM": b"\0" * 32}, np.eye(3), None),  # of no colour space
    ],
)
def test_colours_that_a_png_names_without_a_profile(
    tmp_path: Path, chunks: dict[str, bytes], matrix: np.ndarray, gamma: float | None
) -> None:
    png(tmp_path / "a.png", chart(), **chunks)
    assert off(read_image(tmp_path / "a.png"), wanted(chart(), matrix, gamma)) <= 1.0


def test_a_camera_that_says_adobe_in_its_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xA001: 65535, 0xA005: {1: "R03"}})
    flat = np.full((16, 16, 3), (90, 180, 60), np.uint8)
    Image.fromarray(flat).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    assert off(read_image(tmp_path / "a.jpg"), wanted(flat, ADOBE, 563 / 256)) <= 3


@pytest.mark.parametrize("kind", ["avif", "heic"])
def test_colours_that_a_phone_names_without_a_profile(tmp_path: Path, kind: str) -> None:
    if kind == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    path = tmp_path / f"a.{kind}"
    flat = np.full((64, 64, 3), (90, 180, 60), np.uint8)
    Image.fromarray(flat).save(path, quality=100, subsampling="4:4:4", chroma=444)
    head, mark, rest = path.read_bytes().partition(b"colrnclx")
    assert mark
    path.write_bytes(head + mark + struct.pack(">HH", 12, 13) + rest[4:])
    assert off(read_image(path), wanted(flat, P3, None)) <= 8  # compression; as it is, 49
    path.write_bytes(head + mark + struct.pack(">HH", 9, 18) + rest[4:])
    with pytest.raises(UserError, match=r"high-range image \(HLG\)"):
        read_image(path)


def test_high_range_is_named(tmp_path: Path) -> None:
    png(tmp_path / "a.png", chart(), cICP=bytes((9, 16, 0, 1)))
    with pytest.raises(UserError, match=r"a\.png.*expected colours of standard range, got a high-range image \(PQ\)"):
        read_image(tmp_path / "a.png")


def test_cmyk_lab_and_grey_with_profiles(tmp_path: Path) -> None:
    lab = ImageCms.profileToProfile(
        Image.fromarray(chart()[:16]), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    lab.save(tmp_path / "lab.tif")
    assert off(read_image(tmp_path / "lab.tif"), chart()[:16]) <= 8  # Lab of 8 bits is coarse
    Image.fromarray(chart()).convert("CMYK").save(tmp_path / "c.jpg", quality=95, icc_profile=profile(P3_D50, None))
    assert read_image(tmp_path / "c.jpg").shape == (32, 32, 3)  # a profile of other pixels is left out
    grey = chart()[..., 0]
    Image.fromarray(grey).save(tmp_path / "g.png", icc_profile=profile(ADOBE_D50, 563 / 256))
    right = wanted(np.repeat(grey[..., None], 3, 2), np.eye(3), 563 / 256)
    assert off(read_image(tmp_path / "g.png"), right) <= 1.5


def test_numbers_of_more_bits_are_scaled_or_refused_by_name(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "float.tif")
    assert off(read_image(tmp_path / "float.tif")[0, :, 0], np.arange(256)) <= 0.5
    Image.fromarray(ramp * 812).save(tmp_path / "linear.tif")
    with pytest.raises(UserError, match=r"linear\.tif.*floats from 0 to 1, got floats of 0 to 812"):
        read_image(tmp_path / "linear.tif")
    Image.fromarray(ramp * np.nan).save(tmp_path / "nan.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=r"nan\.tif.*floats from 0 to 1"):
            read_image(tmp_path / "nan.tif")
    Image.fromarray((ramp * 2e9).astype(np.int32)).save(tmp_path / "whole.tif")
    with pytest.raises(UserError, match=r"whole\.tif.*expected 8 or 16 bits, got 32-bit signed integers; save it"):
        read_image(tmp_path / "whole.tif")
    Image.fromarray((ramp * 65535).round().astype(np.uint16)).save(tmp_path / "grey.tif")
    assert off(read_image(tmp_path / "grey.tif")[0, :, 0], np.arange(256)) <= 1
    steps = (np.arange(256) * 257).astype(">u2")
    (tmp_path / "grey.pgm").write_bytes(b"P5 256 1 65535\n" + steps.tobytes())
    assert read_image(tmp_path / "grey.pgm")[0, :, 1].tolist() == list(range(256))


def test_colour_tiffs_of_floats_are_named(tmp_path: Path) -> None:
    import cv2

    cv2.imwrite(str(tmp_path / "a.tif"), np.zeros((8, 8, 3), np.float32))
    with pytest.raises(UserError, match=r"a\.tif.*got a TIFF of 3 x 32-bit floats; save it with 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


def test_heic_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + b"\0" * 100)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match=r"a\.heic.*HEIC needs pillow-heif; `pip install pillow-heif` brings it"):
        read_image(tmp_path / "a.heic")


@pytest.mark.parametrize("kind", ["heic", "avif"])
def test_what_phones_write_is_read_under_any_name(tmp_path: Path, kind: str) -> None:
    if kind == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32, :32] = (250, 120, 30)
    Image.fromarray(pixels).save(tmp_path / f"a.{kind}", quality=95)
    (tmp_path / f"a.{kind}").rename(tmp_path / "portrait.png")
    found = read_image(tmp_path / "portrait.png")
    assert found.shape == (64, 96, 3)
    assert off(found[10, 10], np.array((250, 120, 30))) < 12
    assert found[50, 70].max() < 12
    assert image_size(tmp_path / "portrait.png") == (64, 96)


@pytest.mark.parametrize("kind", ["png", "jpg", "1.png", "p.png", "tif"])
def test_very_large_images_are_read_reduced_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Also upright, and in their colours; the limits are made small here."""
    monkeypatch.setattr(media_image, "WHOLE_IMAGE", 120 * 160 - 1)
    monkeypatch.setattr(media_image, "REDUCED_IMAGE", 60 * 80)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    pixels = np.full((120, 160, 3), 20, np.uint8)
    pixels[:60, :80] = (200, 200, 200)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(pixels)
    if kind[1:2] == ".":
        picture = picture.convert(kind[0].upper())
    path = tmp_path / f"a.{kind}"
    picture.save(path, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_image(path)
        assert image_size(path) == (160, 120)
    assert found.shape == (80, 60, 3)
    assert found[20, 45].min() > 180
    assert found[20, 15].max() < 60  # a palette is coarse
    assert Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(media_image, "LARGEST_IMAGE", 120 * 160 - 1)
    with pytest.raises(UserError, match=r"expected at most 0 million pixels, got (160 x 120|120 x 160)"):
        read_image(path)


def test_a_hundred_megapixels_take_less_than_a_gigabyte(tmp_path: Path) -> None:
    import subprocess

    path = tmp_path / "a.png"
    rows = zlib.compress(b"\0" * (10001 * 3 + 1) * 9500, 1)  # black, quick to make
    header = struct.pack(">IIBBBBB", 10001, 9500, 8, 2, 0, 0, 0)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, content in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
            file.write(struct.pack(">I", len(content)) + name + content)
            file.write(struct.pack(">I", zlib.crc32(name + content)))
    code = (
        "import resource, sys; from talkingdit.media.image import read_image; import PIL.Image, numpy\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(read_image(sys.argv[1]).shape, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("(4750, 5000, 3)") or done.stdout.startswith("(4750, 5001, 3)")
    assert int(done.stdout.split()[-1]) < 1_000_000  # KiB


def inflating(path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a" * 70_000_000, zip=True)
    Image.fromarray(chart()).save(path, "PNG", pnginfo=info)


def cut(kind: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, kind)
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])

    return make


@pytest.mark.parametrize("make", [inflating, *map(cut, ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "AVIF", "JPEG2000"))])
def test_what_no_decoder_takes_is_one_sentence(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert "a.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_exif_is_no_reason_to_refuse_a_picture(tmp_path: Path) -> None:
    Image.fromarray(chart()).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff damaged")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), chart())


def tiff(path: Path, values: np.ndarray, colours: int = 1, planes: int = 1, tags: dict[int, int] | None = None) -> Path:
    """A TIFF without compression, of any kind of numbers [H, W] or [H, W, channels]."""
    height, width, channels = (*values.shape, 1)[:3]
    order = np.moveaxis(values.reshape(height, width, channels), 2, 0) if planes == 2 else values
    data, bits = np.ascontiguousarray(order).tobytes(), 8 * values.itemsize
    behind = 8 + len(data)
    extra = struct.pack(f"<{channels}H", *[bits] * channels)
    strips = channels if planes == 2 else 1
    places = [8 + n * len(data) // strips for n in range(strips)]
    first, second = behind + len(extra), behind + len(extra) + 4 * strips
    extra += struct.pack(f"<{2 * strips}I", *places, *[len(data) // strips] * strips)
    kind = {"f": 3, "i": 2, "u": 1}[values.dtype.kind]
    entries = {256: width, 257: height, 259: 1, 262: colours, 277: channels, 278: height, 284: planes, **(tags or {})}
    rows = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries.items()]
    rows.append(struct.pack("<HHI", 258, 3, channels) + struct.pack("<I", bits if channels == 1 else behind))
    rows.append(struct.pack("<HHI", 339, 3, 1) + struct.pack("<I", kind))
    rows.append(struct.pack("<HHI", 273, 4, strips) + struct.pack("<I", places[0] if strips == 1 else first))
    rows.append(struct.pack("<HHI", 279, 4, strips) + struct.pack("<I", len(data) if strips == 1 else second))
    rows.sort(key=lambda row: row[:2][::-1])
    table = struct.pack("<H", len(rows)) + b"".join(rows) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", behind + len(extra)) + data + extra + table)
    return path


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_a_tiff_whose_white_is_zero_is_no_negative(kind: type, white_is_zero: bool, tmp_path: Path) -> None:
    grey = np.linspace(0, 255, 64).round().reshape(8, 8).astype(np.uint8)
    numbers = {np.uint8: grey, np.uint16: grey.astype(np.uint16) * 257, np.float32: (grey / 255).astype(np.float32)}
    values, most = numbers[kind], {np.uint8: 255, np.uint16: 65535, np.float32: 1}[kind]
    path = tiff(tmp_path / "a.tif", (most - values).astype(kind) if white_is_zero else values, int(not white_is_zero))
    assert np.abs(read_image(path).astype(int) - grey[..., None]).max() <= (kind is np.float32)


def test_a_tiff_of_16_bits_in_planes_is_named(tmp_path: Path) -> None:
    """Pillow takes its numbers for those of 8 bits: stripes."""
    values = np.random.default_rng(0).integers(0, 65535, (8, 8, 3), dtype=np.uint16)
    assert np.abs(read_image(tiff(tmp_path / "a.tif", values, 2)) - values / 257).max() < 1
    for read in (read_image, image_size):
        with pytest.raises(UserError, match=r"got a TIFF of 16 bits whose colours lie in planes; export it as a PNG"):
            read(tiff(tmp_path / "b.tif", values, 2, planes=2))


def test_the_preview_in_a_raw_file_is_not_the_picture(tmp_path: Path) -> None:
    """A DNG has a small picture first, which Pillow opens."""
    small = np.zeros((8, 8, 3), np.uint8)
    for tags in ({254: 1}, {50706: 1}):
        with pytest.raises(UserError, match=r"got a camera's raw file, whose preview is 8 x 8; export it as a PNG"):
            read_image(tiff(tmp_path / "a.dng", small, 2, tags=tags))
    with pytest.raises(UserError, match="got a camera's raw file; export it"):
        read_image(tiff(tmp_path / "b.dng", np.zeros((8, 8), np.uint16), 32803))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"%PDF-1.7\n", "a PDF"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS, which other programs"),
        (b"\xff\x0a", "JPEG XL"), (b"\0\0\0\x0cJXL \r\n", "JPEG XL"), (b"\x76\x2f\x31\x01", "OpenEXR"),
        (b"#?RADIANCE\n", "a high-range image of Radiance"), (b"8BPS\0\2", "a Photoshop file"), (b"PF\n2 2\n", "PFM"),
        (b"<?xml version='1.0'?><svg width='9'/>", "SVG"), (b"<html><p>404", "a web page"), (b"PK\3\4", "an archive"),
    ],
)  # fmt: skip
def test_what_is_no_image_to_us_is_called_by_its_name(data: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data + bytes(300))
    with pytest.raises(UserError, match=f"got .*{name}.*; export it as a PNG or JPEG$"):
        read_image(tmp_path / "a.png")
