#!/usr/bin/env bash
# Ground: deep (torch's CPU backend, oneDNN, on CPUs with AMX).
# Versions: torch 2.13.0 (CPU), which brings oneDNN 3.12.0; Python 3.10 or newer.
#
# A patch convolution in bfloat16 on a CPU with AMX gives wrong numbers, without a warning. conv3d whose stride is its
# kernel, the history packing of video transformers (FramePack): latents of 16 channels, 20 x 56 x 104, kernel 2 x 4 x 4
# and 4 x 8 x 8 are off by about 1.2 of the result's own norm; kernel 1 x 2 x 2 is right (0.002), and so is everything when
# oneDNN is kept from AMX (ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16) or turned off, and in float32.
#
# What to do: convolve in float32, or write a patch convolution as a reshape and a matrix product.
#
# Seen on an Intel Xeon with amx_bf16 (the wrong ones vary in the second digit):
#     kernel (1, 2, 2): amx 0.0017, avx512 0.0017
#     kernel (2, 4, 4): amx 1.2066, avx512 0.0017
#     kernel (4, 8, 8): amx 1.2240, avx512 0.0017
# The script fails where this changes. Without AMX the fault cannot show, and it says so.
set -euo pipefail
if ! grep -qw amx_bf16 /proc/cpuinfo; then
    echo "this CPU has no amx_bf16: nothing to see here"
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat >"$folder/patch.py" <<'PYTHON'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
for kernel in ((1, 2, 2), (2, 4, 4), (4, 8, 8)):
    x = torch.randn(1, 16, 20, 56, 104, dtype=torch.bfloat16)
    weight = torch.randn(64, 16, *kernel, dtype=torch.bfloat16)
    exact = F.conv3d(x.double(), weight.double(), stride=kernel)
    error = (F.conv3d(x, weight, stride=kernel).double() - exact).norm() / exact.norm()
    print(f"{error:.4f}")
PYTHON
mapfile -t amx < <("$folder/venv/bin/python" "$folder/patch.py")
mapfile -t avx < <(ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 "$folder/venv/bin/python" "$folder/patch.py")
kernels=("(1, 2, 2)" "(2, 4, 4)" "(4, 8, 8)")
for i in 0 1 2; do
    echo "kernel ${kernels[i]}: amx ${amx[i]}, avx512 ${avx[i]}"
done
python3 - "${amx[@]}" "${avx[@]}" <<'PYTHON'
import sys

amx, avx = [float(x) for x in sys.argv[1:4]], [float(x) for x in sys.argv[4:7]]
right = max(avx) < 0.01 and amx[0] < 0.01
wrong = not amx[1] < 0.5 and not amx[2] < 0.5
sys.exit(0 if right and wrong else "the behaviour has changed")
PYTHON
