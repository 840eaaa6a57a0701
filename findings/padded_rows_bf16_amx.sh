#!/usr/bin/env bash
# Ground: deep (torch's CPU backend, oneDNN, on CPUs with AMX).
# Versions: torch 2.13.0 (CPU), which brings oneDNN 3.12.0; Python 3.10 or newer.
#
# A product of bfloat16 matrices reads what lies between the rows of a strided operand. A [28, 27] view of a [28, 32]
# buffer, times [27, 16]: with NaN in the five columns that do not belong to the view, results are NaN, though nothing of
# the view is. Columns that hold numbers are multiplied with zeros and do no harm, so that fresh memory, which often is
# zero, hides it. Seen with an odd length of the sums and 28 rows; 6 rows, an even length, float16, float32, and the same
# with oneDNN kept from AMX (ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16) are right.
#
# What to do: fill the padding of rows with zeros, or multiply contiguous matrices.
#
# Seen on an Intel Xeon with amx_bf16:
#     amx: 28 x 27 nan, 6 x 27 finite, 28 x 26 finite, 28 x 27 padded with zeros finite
#     avx512: 28 x 27 finite, 6 x 27 finite, 28 x 26 finite, 28 x 27 padded with zeros finite
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
cat >"$folder/rows.py" <<'PYTHON'
import torch

torch.manual_seed(0)
seen = []
for rows, length, padding in ((28, 27, float("nan")), (6, 27, float("nan")), (28, 26, float("nan")), (28, 27, 0.0)):
    buffer = torch.full((rows, 32), padding, dtype=torch.bfloat16)
    view = buffer[:, :length].copy_(torch.randn(rows, length))
    weight = torch.randn(16, length).to(torch.bfloat16)
    finite = (view @ weight.T).isfinite().all()
    seen.append(f"{rows} x {length}{' padded with zeros' * (padding == 0)} {'finite' if finite else 'nan'}")
print(", ".join(seen))
PYTHON
amx=$("$folder/venv/bin/python" "$folder/rows.py")
avx=$(ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 "$folder/venv/bin/python" "$folder/rows.py")
echo "amx: $amx"
echo "avx512: $avx"
[ "$amx" = "28 x 27 nan, 6 x 27 finite, 28 x 26 finite, 28 x 27 padded with zeros finite" ] || { echo "the behaviour has changed"; exit 1; }
[ "$avx" = "28 x 27 finite, 6 x 27 finite, 28 x 26 finite, 28 x 27 padded with zeros finite" ] || { echo "the behaviour has changed"; exit 1; }
