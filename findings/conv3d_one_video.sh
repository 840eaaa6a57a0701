#!/usr/bin/env bash
# Ground: deep (which kernel torch's CPU backend takes for a convolution).
# Versions: torch 2.13.0 (CPU), which brings oneDNN 3.12.0; Python 3.10 or newer.
#
# A float32 conv3d of ONE small video does not reach oneDNN; of two videos it does, so that two take less time than one.
# Whether torch calls oneDNN for a batch of 1 is decided by a product of the first four sizes, more than 20,480, which is
# meant for pictures: of a video it is channels x frames x rows, and its columns are not counted. A causal video
# autoencoder that decodes one latent at a time (16 channels, 4 frames and 2 of its cache, 50 rows) stays below, however
# wide the frames are, and gets a kernel that was six times as slow. The last rows are the two sides of the limit.
#
# What to do: sum convolutions of frames (conv2d of a batch of frames is decided by the frames, and channels_last needs
# no reordering), or give conv3d two videos.
#
# Seen (batch, channels, frames, rows, columns, by sums or not; kernel 3 x 3 x 3 to 16 channels; times are not checked):
#     1 16 6 50 50 0: oneDNN no, took 7.2 ms
#     2 16 6 50 50 0: oneDNN yes, took 2.1 ms
#     1 16 6 50 800 0: oneDNN no, took 213.6 ms
#     1 16 6 50 50 1: oneDNN yes, took 1.2 ms       (the first as sums of frames)
#     1 16 16 80 8 0: oneDNN no, took 3.3 ms        (16 x 16 x 80 = 20,480)
#     1 16 16 81 8 0: oneDNN yes, took 0.9 ms
# The script fails where this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat >"$folder/conv.py" <<'PYTHON'
import sys
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
*shape, summed = map(int, sys.argv[1:])
x, weight = torch.randn(shape), torch.randn(16, 16, 3, 3, 3)
frames = x[0].transpose(0, 1).contiguous(memory_format=torch.channels_last)
taps = [tap.contiguous(memory_format=torch.channels_last) for tap in weight.unbind(2)]


def whole():
    return F.conv3d(x, weight)


def sums():
    count = shape[2] - 2
    return sum(F.conv2d(frames[i : i + count], taps[i]) for i in range(3)).transpose(0, 1)[None]


with torch.inference_mode():
    assert torch.allclose(whole(), sums(), atol=1e-3) or shape[0] > 1
    run = sums if summed else whole
    taken = []
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        run()
    for _ in range(9):
        begin = time.process_time()
        run()
        taken.append(time.process_time() - begin)
print(f"took {min(taken) * 1e3:.1f} ms")
PYTHON
look() { # N C T H W, by sums of frames or not
    local said kernel=no
    said=$("$folder/venv/bin/python" "$folder/conv.py" "$@")
    if grep -q "exec.*,convolution," <<<"$said"; then kernel=yes; fi
    echo "$*: oneDNN $kernel, $(grep -o 'took.*' <<<"$said")"
    found+=("$kernel")
}
found=()
look 1 16 6 50 50 0
look 2 16 6 50 50 0
look 1 16 6 50 800 0
look 1 16 6 50 50 1
look 1 16 16 80 8 0
look 1 16 16 81 8 0
if [[ "${found[*]}" != "no yes no yes no yes" ]]; then
    echo "the behaviour has changed: ${found[*]}"
    exit 1
fi
