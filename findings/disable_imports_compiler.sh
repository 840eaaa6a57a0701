#!/usr/bin/env bash
# Ground: costly, crossed (torch.compiler and diffusers).
# Versions: torch 2.13.0 (CPU), diffusers 0.42.1; Python 3.10 or newer.
#
# `torch.compiler.disable` only says that a function is to be left alone by the compiler, but to decorate a function with
# it imports the whole compiler: torch._dynamo, torch._inductor's configuration and sympy, some 800 modules, in a program
# that compiles nothing. `torch.compiler.is_compiling` and torch.library's operators import none of it. diffusers has such
# decorators in its hooks, so that importing any one model of it, an autoencoder too, brings the compiler along: about a
# third of the time of that import.
#
# What to do: leave out the decorator in modules that are imported early, and decide in the function by
# `torch.compiler.is_compiling()`, or decorate when the function is first called.
#
# Seen:
#     is_compiling: torch._dynamo no, sympy no
#     operator of torch.library: torch._dynamo no, sympy no
#     disable: torch._dynamo yes, sympy yes, more than 500 modules
#     an autoencoder of diffusers: torch._dynamo yes, sympy yes
# The script fails where this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 diffusers==0.42.1
cat >"$folder/look.py" <<'PYTHON'
import sys

import torch

case, before = sys.argv[1], set(sys.modules)
if case == "is_compiling":
    torch.compiler.is_compiling()
elif case == "operator of torch.library":
    library = torch.library.Library("finding", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CPU")
    torch.ops.finding.twice(torch.ones(2))
elif case == "disable":

    @torch.compiler.disable
    def left_alone(x: torch.Tensor) -> torch.Tensor:
        return x

else:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan  # noqa: F401
new = set(sys.modules) - before
found = ", ".join(f"{name} {'yes' if name in sys.modules else 'no'}" for name in ("torch._dynamo", "sympy"))
print(f"{case}: {found}" + (", more than 500 modules" if case == "disable" and len(new) > 500 else ""))
PYTHON
for case in "is_compiling" "operator of torch.library" "disable" "an autoencoder of diffusers"; do
    "$folder/venv/bin/python" "$folder/look.py" "$case"
done 2>"$folder/errors" | tee "$folder/seen"
sed -n '/^# Seen:/,/^# The script/s/^#     //p' "$0" | diff - "$folder/seen"
