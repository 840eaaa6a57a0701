# SPDX-License-Identifier: Apache-2.0
"""Which way of x264 to give equal files costs least: PSNR at equal bytes against x264's own choice.

    PYTHONPATH=. python tools/compare_encodings.py

Drawn characters, and a soft noise like that of photographs of which a part moves, in the sizes that videos have.
Prints the difference in dB to `default`, whose files are not always equal, over the rates of crf 14 to 22.
"""

from __future__ import annotations

import io
import sys

import av
import numpy as np

from talkingdit.puppets.render import render
from talkingdit.puppets.world import Motion, Scene

WAYS = {
    "default": {},
    "no B-frames": {"bf": "0"},
    "mbtree=0": {"x264-params": "mbtree=0"},
    "padded": {},
    "asm=AVX2": {"x264-params": "asm=AVX2"},  # on machines that have it
}
SIZES = ((96, 96), (384, 384), (480, 832), (832, 480), (704, 1024), (720, 1280))
FRAMES, FPS = 40, 16
CRFS = (14, 16, 18, 20, 22)


def drawn(height: int, width: int) -> np.ndarray:
    """A drawn character that speaks, [F, H, W, 3]."""
    rng = np.random.default_rng(0)
    scene = Scene.random(rng)
    people = len(scene.characters)
    mouth = np.clip(rng.normal(0.4, 0.3, (people, FRAMES)), 0, 1).astype(np.float32)
    motion = [Motion.random(rng, FRAMES) for _ in range(people)]
    frames = render(scene, mouth, mouth, motion, max(height, width))
    top, left = (max(height, width) - height) // 2, (max(height, width) - width) // 2
    return np.ascontiguousarray(frames[:, top : top + height, left : left + width])


def soft(height: int, width: int) -> np.ndarray:
    """Noise with the spectrum of photographs; its middle sways and flickers, the rest is nearly still."""
    rng = np.random.default_rng(1)
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    distance = np.hypot(fy, fx)
    spectrum = np.exp(2j * np.pi * rng.random((3, height, width))) / (distance + 1 / max(height, width)) ** 1.2
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    inside = np.clip(3 - 6 * np.hypot(y, x), 0, 1)
    frames = []
    for i in range(FRAMES):
        parts = []
        for dy, dx in ((0.0, 0.05 * i), (3 * np.sin(i / 5), 4 * np.cos(i / 7))):
            moved = np.fft.ifft2(spectrum * np.exp(2j * np.pi * (fy * dy + fx * dx))).real
            parts.append((moved - moved.mean()) / moved.std())
        mixed = parts[0] * (1 - inside) + parts[1] * inside * (1 + 0.1 * np.sin(i))
        frame = 128 + 45 * mixed.transpose(1, 2, 0) + rng.normal(0, 1, (height, width, 3))
        frames.append(np.clip(frame, 0, 255).astype(np.uint8))
    return np.stack(frames)


def encoded(frames: list[av.VideoFrame], way: str, crf: int) -> bytes:
    height, width = frames[0].height, frames[0].width
    options = {"crf": str(crf), "preset": "medium"} | WAYS[way]
    right = -width % 128 if way == "padded" else 0
    if right:
        options["x264-params"] = f"crop-rect=0,0,{right},0"
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = height, width + right, "yuv420p"
        stream.options = options
        for number, frame in enumerate(frames):
            if right:
                planes = [
                    np.pad(plane, ((0, 0), (0, right // (1 + bool(i)))), "edge")
                    for i, plane in enumerate(planes_of(frame))
                ]
                frame = av.VideoFrame(width + right, height, "yuv420p")
                for plane, values in zip(frame.planes, planes, strict=True):
                    whole = np.zeros((plane.height, plane.line_size), np.uint8)
                    whole[:, : plane.width] = values
                    plane.update(whole.tobytes())
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def planes_of(frame: av.VideoFrame) -> list[np.ndarray]:
    return [np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in frame.planes]


def psnr(data: bytes, frames: list[av.VideoFrame]) -> float:
    wrong = 0.0
    with av.open(io.BytesIO(data)) as container:
        for found, right in zip(container.decode(video=0), frames, strict=True):
            wrong += np.mean((planes_of(found)[0].astype(float) - planes_of(right)[0]) ** 2)
    return 10 * np.log10(255**2 / (wrong / len(frames)))


def main() -> None:
    for kind in (drawn, soft):
        for size in SIZES:
            pictures = [av.VideoFrame.from_ndarray(p, format="rgb24").reformat(format="yuv420p") for p in kind(*size)]
            curves = {}
            for way in WAYS:
                made = [encoded(pictures, way, crf) for crf in CRFS]
                curves[way] = np.log([len(data) for data in made]), np.array([psnr(data, pictures) for data in made])
            low = max(rates.min() for rates, _ in curves.values())
            high = min(rates.max() for rates, _ in curves.values())
            at = np.linspace(low, high, 50)
            base = np.interp(at, curves["default"][0][::-1], curves["default"][1][::-1])
            told = [f"{kind.__name__} {size[1]}x{size[0]}: {np.exp(curves['default'][0][1]) / 1000:.0f} kB at crf 16"]
            for way in list(WAYS)[1:]:
                rates, values = curves[way]
                told.append(f"{way} {np.mean(np.interp(at, rates[::-1], values[::-1]) - base):+.2f} dB")
            sys.stdout.write("; ".join(told) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
