#!/usr/bin/env bash
# Ground: costly (a shorter dtype that takes many times as long, where widening by hand takes no time at all).
# Versions: torch 2.13.0 (CPU wheel, x86-64 with AVX2 and without AVX-512); Python 3.10 or newer.
#
# On processors without AVX-512 PyTorch does not hand products of bfloat16 matrices to oneDNN, nor widen them for the library
# that multiplies float32: a loop of its own takes many times as long as the same product in float32. To widen both
# matrices by hand, multiply in float32 and round the result is as fast as float32, and sums are as wide. `nn.Linear`,
# `bmm` and convolutions are hit, so that a model in bfloat16 (or under autocast to it) trains and infers several times slower
# than the same model in float32, and no warning says so.
#
# What to do: compute in float32 there; or widen in front of each product and round behind it.
#
# Seen (one thread, medians of turns; bfloat16 over widened by hand):
#     linear 5.9, bmm 10.7, conv2d 22.0
# The script fails where this changes; on other processors there is nothing to see.
set -euo pipefail
if ! grep -qw avx2 /proc/cpuinfo || grep -qw avx512f /proc/cpuinfo; then
    echo "not run: this is about processors with AVX2 and without AVX-512"
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import statistics
import time

import torch
import torch.nn.functional as F


def seconds(call):
    begin = time.process_time()
    call()
    return time.process_time() - begin


def ratio(function, *given):
    short = [tensor.bfloat16() for tensor in given]
    calls = {
        "bfloat16": lambda: function(*short),
        "widened": lambda: function(*(tensor.float() for tensor in short)).bfloat16(),
    }
    times = {name: [] for name in calls}
    for _ in range(7):
        for name, call in calls.items():
            times[name].append(seconds(call))
    assert torch.allclose(*(call().float() for call in calls.values()), rtol=1e-2, atol=1e-1)
    return statistics.median(times["bfloat16"]) / statistics.median(times["widened"])


torch.set_num_threads(1)
torch.manual_seed(0)
found = {
    "linear": ratio(F.linear, torch.randn(512, 256), torch.randn(1024, 256)),
    "bmm": ratio(torch.bmm, torch.randn(8, 128, 64), torch.randn(8, 64, 128)),
    "conv2d": ratio(F.conv2d, torch.randn(4, 64, 24, 24), torch.randn(64, 64, 3, 3)),
}
print(", ".join(f"{name} {value:.1f}" for name, value in found.items()))
assert all(value > 2 for value in found.values()), "it is no longer slow"
PYTHON
