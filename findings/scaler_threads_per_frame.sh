#!/usr/bin/env bash
# Ground: deep, costly (PyAV and libswscale).
# Versions: av 18.1.0 (its wheel), Python 3.10 or newer, Linux.
#
# A frame of PyAV that was converted, by `to_ndarray(format="rgb24")` too, keeps the scaler that did it, and the scaler
# keeps a thread for each processor, also for a picture of 64 x 48 pixels. They go when the frame is freed, not when the
# conversion is done: a list of a hundred decoded frames on 16 processors holds 1,600 threads. OMP_NUM_THREADS and the
# thread count of the decoder change nothing. A process that is forked meanwhile (a data worker) gets the scalers without
# their threads, so a parent should not hold such frames then.
#
# What to do: convert with `threads=1`, which PyAV takes from version 17 on.
#
# Seen:
#     before: no threads besides the first
#     three frames converted and held: three times as many as there are processors, or more
#     freed: no threads besides the first
#     three frames converted with threads=1 and held: no threads besides the first
# The script fails where this changes; it needs two processors or more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check av==18.1.0 numpy==2.3.5
cat >"$folder/look.py" <<'PYTHON'
import os

import av
import numpy as np

PROCESSORS = len(os.sched_getaffinity(0))
assert PROCESSORS > 1, "needs two processors"


def threads():
    more = len(os.listdir("/proc/self/task")) - 1
    if more >= 3 * PROCESSORS:
        return "three times as many as there are processors, or more"
    return f"{more or 'no'} threads besides the first"


def converted(**options):
    frames = []
    for _ in range(3):
        frame = av.VideoFrame(64, 48, "yuv420p")
        frame.to_ndarray(format="rgb24", **options)
        frames.append(frame)
    return frames


print("before:", threads())
held = converted()
print("three frames converted and held:", threads())
del held
print("freed:", threads())
held = converted(threads=1)
print("three frames converted with threads=1 and held:", threads())
PYTHON
OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/look.py" | tee "$folder/seen"
sed -n '/^# Seen:/,/^# The script/s/^#     //p' "$0" | diff - "$folder/seen"
