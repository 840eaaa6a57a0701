#!/usr/bin/env bash
# Ground: deep (libswscale's code for AVX2, which PyAV and FFmpeg's filters call).
# Versions: av 18.1.0 (its wheel, libswscale 9.5.102; av 17.0.0 does the same), Python 3.10 or newer, x86 with AVX2.
#
# yuv420p, which nearly every video decodes to, becomes planar RGB without its last columns: `to_ndarray(format="gbrp")`
# of a portrait video of 1080 x 1920 leaves 8 columns at the right edge as the memory happened to be, often a piece of
# an earlier picture of the same video, so that it looks right wherever the edge is still. Widths that leave 1 to 8 when
# they are divided by 16 lose as many columns (854 x 480: 6), also in a filter ("format=gbrp"), whose rows have more
# room behind them. PyAV's rgba and bgra lose up to 4 columns in the same way (852 x 480: 4), those of a filter none.
# yuv422p and yuvj420p are like yuv420p; rgb24 and bgr24 are right at every width. Nothing is raised or logged.
#
# What to do: convert to rgb24, and take the planes apart or add the alpha channel with numpy.
#
# Seen, columns of an even grey picture that are not grey, fresh memory being filled by the C library with 85:
#     1080 x 1920: rgb24 0, gbrp 8 (85), in a filter: rgb24 0, gbrp 8
#     854 x 480: rgb24 0, gbrp 6 (85), in a filter: rgb24 0, gbrp 6
#     852 x 480: rgb24 0, gbrp 4 (85), rgba 4 (85), in a filter: rgb24 0, gbrp 4, rgba 0
#     720 x 1280: rgb24 0, gbrp 0, in a filter: rgb24 0, gbrp 0
# The script fails where this changes. Without AVX2 other code runs, and it says so.
set -euo pipefail
if ! grep -qw avx2 /proc/cpuinfo; then
    echo "this CPU has no avx2: nothing to see here"
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check av==18.1.0 numpy==2.3.5
cat >"$folder/look.py" <<'PYTHON'
from fractions import Fraction

import av
import numpy as np


def grey(width, height):
    return av.VideoFrame.from_ndarray(np.full((height * 3 // 2, width), 128, np.uint8), "yuv420p")


def filtered(frame, form):
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format="yuv420p", time_base=Fraction(1, 25))
    changed, sink = graph.add("format", form), graph.add("buffersink")
    source.link_to(changed)
    changed.link_to(sink)
    graph.configure()
    frame.pts = 0
    graph.push(frame)
    return graph.pull()


def wrong(pixels, told):
    pixels = pixels[..., :3]
    off = (pixels != pixels[0, 0]).any(-1)
    values = np.unique(pixels[off])
    return f"{off.any(0).sum()}" + (f" ({', '.join(map(str, values))})" if told and len(values) else "")


for width, height in ((1080, 1920), (854, 480), (852, 480), (720, 1280)):
    seen, also = [], []
    for form in ("rgb24", "gbrp", "rgba")[: 3 if width == 852 else 2]:
        seen.append(f"{form} {wrong(grey(width, height).to_ndarray(format=form, threads=1), True)}")
        also.append(f"{form} {wrong(filtered(grey(width, height), form).to_ndarray(), False)}")
    print(f"{width} x {height}: {', '.join(seen)}, in a filter: {', '.join(also)}")
PYTHON
MALLOC_PERTURB_=170 "$folder/venv/bin/python" "$folder/look.py" | tee "$folder/seen"
sed -n '/^# Seen,/,/^# The script/s/^#     //p' "$0" | diff - "$folder/seen"
