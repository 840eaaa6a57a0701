#!/usr/bin/env bash
# Ground: crossed (Python's interrupts meet FFmpeg's write callback).
# Versions: av 18.1.0 (PyAV), numpy 2.3.5; Python 3.10 or newer.
#
# A container that PyAV writes into a Python object calls the object's `write` from FFmpeg. An error that `write` raises
# comes out of `mux`, if it is an Exception. A KeyboardInterrupt does not: it is printed as "Exception ignored in
# 'av.container.pyio.pyio_write_gil'", `mux` returns as if nothing had happened, and the program goes on. As Python
# raises Ctrl-C in whatever Python code runs next, and in a loop of encoding and muxing that is often `write`, a program
# that streams a video into a pipe or a socket in this way has to be interrupted more than once. Context managers and
# `finally` around the loop see nothing of the first time.
#
# What to do: let FFmpeg call something that runs no Python code, such as the `append` of a deque, and write what it has
# collected after `mux` is back.
#
# Seen (the object raises once, in the middle of a video of 64 frames):
#     OSError: told OSError, frames after it: no
#     KeyboardInterrupt: told nothing, frames after it: yes
# The script fails where this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check av==18.1.0 numpy==2.3.5
cat >"$folder/stream.py" <<'PYTHON'
import sys

import av
import numpy as np

error = {"OSError": OSError, "KeyboardInterrupt": KeyboardInterrupt}[sys.argv[1]]


class Target:
    def __init__(self):
        self.size, self.raised, self.frames_after = 0, False, 0

    def write(self, data):
        self.size += len(data)
        if self.size > 20_000 and not self.raised:
            self.raised = True
            raise error
        return len(data)


target = Target()
rng = np.random.default_rng(0)
told = "nothing"
try:
    options = {"movflags": "frag_keyframe+empty_moov", "frag_duration": "200000"}
    with av.open(target, "w", format="mp4", options=options) as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(64):
            frame = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            target.frames_after += target.raised
        container.mux(stream.encode())
except BaseException as found:
    told = type(found).__name__
print(f"told {told}, frames after it: {'yes' if target.frames_after > 1 else 'no'}")
PYTHON
plain=$("$folder/venv/bin/python" "$folder/stream.py" OSError 2>/dev/null)
interrupt=$("$folder/venv/bin/python" "$folder/stream.py" KeyboardInterrupt 2>/dev/null)
echo "OSError: $plain"
echo "KeyboardInterrupt: $interrupt"
[ "$plain" = "told OSError, frames after it: no" ] && [ "$interrupt" = "told nothing, frames after it: yes" ]
