#!/usr/bin/env bash
# Ground: costly (an approximation that takes a multiple of what it approximates).
# Versions: torch 2.13.0 (CPU wheel, x86-64); Python 3.10 or newer.
#
# On CPUs GELU with tanh, which exists because it was cheaper than the one with erf, takes a multiple of its time, forward and
# backward, in float32 and in bfloat16: on a processor with AVX-512 2.1 ns an element and thread, with erf 0.4. In a Wan
# transformer on a processor that multiplies bfloat16 matrices it is a large part of the feed-forward. It is not tanh itself:
# `torch.tanh` of as many numbers takes 0.4 ns too.
#
# It is not the better function either. In float32 its values for x between -8 and -5.5 are -0 or wrong in the first
# digit (1 + tanh has no digits left there), and its gradient at large x is NaN where x^2 overflows (bfloat16
# has the same range).
#
# What to do: x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), is the same function, and keeps its digits.
#
# Seen (one thread, medians of turns; times with tanh over times with erf, the value at -7 and the true one, the gradient at 1e20):
#     float32 4.7, bfloat16 5.1; -0.0e+00, -2.3e-15; nan
# The script fails where this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import statistics
import time

import torch
import torch.nn.functional as F


def ratio(dtype):
    x = torch.randn(1 << 18).to(dtype)
    times = {"tanh": [], "none": []}
    for _ in range(40):
        for form, found in times.items():
            begin = time.process_time()
            F.gelu(x, approximate=form)
            found.append(time.process_time() - begin)
    return statistics.median(times["tanh"]) / statistics.median(times["none"])


torch.set_num_threads(1)
ratios = {str(dtype): ratio(dtype) for dtype in (torch.float32, torch.bfloat16)}
x = torch.tensor([-7.0])
value, truth = F.gelu(x, approximate="tanh").item(), F.gelu(x.double(), approximate="tanh").item()
far = torch.tensor([1e20], requires_grad=True)
F.gelu(far, approximate="tanh").sum().backward()
gradient = far.grad.item()
print(", ".join(f"{name} {found:.1f}" for name, found in ratios.items()) + f"; {value:.1e}, {truth:.1e}; {gradient}")
assert all(found > 2 for found in ratios.values()), "it is no longer slow"
assert value == 0 and truth < 0, "it keeps its digits now"
assert gradient != gradient, "the gradient is a number now"
PYTHON
