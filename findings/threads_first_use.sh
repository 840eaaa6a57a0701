#!/usr/bin/env bash
# Ground: deep (when torch's number of threads becomes a thread's own).
# Versions: torch 2.13.0 (CPU, OpenMP); Python 3.10 or newer.
#
# `torch.set_num_threads(n)` holds for the Python thread that calls it, and for threads that use torch for the first time
# from then on. But the first use of the CALLING thread comes later than its call: until it has asked for the number or
# run a parallel operation, the number that it set is not its own yet. If another thread sets a number meanwhile, the first
# one silently goes on with that: a program that says 4 at its start and lets a helper thread say 1 computes with 1.
# Nothing tells, and which of the two happens depends on whether any operation was large enough to be parallel before.
#
# What to do: call torch.get_num_threads() in a thread right after setting the number; that makes it the thread's own.
#
# Seen (the main thread sets 4, asks or not, a second thread sets 1, the main thread asks):
#     asked before: 4
#     not asked before: 1
# The script fails where this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat >"$folder/ask.py" <<'PYTHON'
import sys
import threading

import torch

torch.set_num_threads(4)
if sys.argv[1] == "asked":
    torch.get_num_threads()
other = threading.Thread(target=torch.set_num_threads, args=(1,))
other.start()
other.join()
print(torch.get_num_threads())
PYTHON
asked=$("$folder/venv/bin/python" "$folder/ask.py" asked)
silent=$("$folder/venv/bin/python" "$folder/ask.py" silent)
echo "asked before: $asked"
echo "not asked before: $silent"
[ "$asked" = 4 ] && [ "$silent" = 1 ]
