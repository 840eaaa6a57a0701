# SPDX-License-Identifier: Apache-2.0
"""What attention on a processor may be: PyTorch's flash kernel, also on float32 copies, and products in slices.

    python -m bench.attention_cpu [--tokens 512 2048] [--heads 12] [--dim 128] [--out bench/results]

Then the same with gradients, where whole products in bfloat16 compete too (`talkingdit.nn.bfloat16_attention`).

Contestants take turns, the fastest turn counts: run it on a machine at rest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import record
from talkingdit.nn import bfloat16_attention

_RESULTS = Path(__file__).resolve().parent / "results"
_SCORES = 1 << 22  # elements of the matrix of weights that plain products have at once

Contestant = Callable[[Tensor, Tensor, Tensor], Tensor]


def widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash kernel on float32 copies."""
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Products of bfloat16, some queries after the other, with the softmax in float32."""
    scale, step = q.shape[-1] ** -0.5, max(1, _SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = [((part @ k.mT).float() * scale).softmax(-1).to(v.dtype) @ v for part in q.split(step, dim=2)]
    return torch.cat(parts, dim=2)


CONTESTANTS: dict[str, Contestant] = {
    "flash": F.scaled_dot_product_attention,
    "flash, float32 copies": widened,
    "products in slices": products,
}


def whole_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `talkingdit` takes where gradients are recorded and all weights fit."""
    return bfloat16_attention.attend(*(x.transpose(1, 2) for x in (q, k, v)), None).transpose(1, 2)


TRAINED: dict[str, Contestant] = {
    "flash": F.scaled_dot_product_attention,
    "flash, float32 copies": widened,
    "whole products": whole_products,
}
# Samples, tokens, keys, heads, channels: of puppets.toml, larger, and many tokens with few keys and with more.
TRAINED_SHAPES = ((4, 385, 385, 2, 64), (1, 1024, 1024, 12, 128), (1, 16384, 36, 12, 128), (1, 4096, 512, 12, 128))


def run_trained(turns: int = 7) -> list[dict[str, Any]]:
    """Milliseconds of a forward and a backward of every contestant, in bfloat16."""
    rows = []
    for batch, tokens, keys, heads, dim in TRAINED_SHAPES:
        q, k, v = (torch.randn(batch, heads, n, dim).bfloat16().requires_grad_() for n in (tokens, keys, keys))
        grad = torch.randn(batch, heads, tokens, dim).bfloat16()
        best = dict.fromkeys(TRAINED, float("inf"))
        for _ in range(turns):
            for name, function in TRAINED.items():
                begin = time.perf_counter()
                torch.autograd.grad(function(q, k, v), (q, k, v), grad)
                best[name] = min(best[name], time.perf_counter() - begin)
        shape = {"batch": batch, "tokens": tokens, "keys": keys, "heads": heads, "dim": dim, "gradients": True}
        rows.append({**shape, **{n: round(1e3 * s, 3) for n, s in best.items()}})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


@torch.no_grad()
def run(tokens: Sequence[int], heads: int, dim: int, turns: int = 7) -> dict[str, Any]:
    """Milliseconds and errors against float64 of every contestant, in bfloat16."""
    result: dict[str, Any] = {**record.header("attention_cpu", torch.device("cpu"), quick=turns < 3), "rows": []}
    for length in tokens:
        q, k, v = torch.randn(3, 1, heads, length, dim).bfloat16()
        truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        best = dict.fromkeys(CONTESTANTS, float("inf"))
        for _ in range(turns):
            for name, function in CONTESTANTS.items():
                begin = time.perf_counter()
                out = function(q, k, v)
                best[name] = min(best[name], time.perf_counter() - begin)
                assert float((out.double() - truth).norm() / truth.norm()) < 2e-2, name
        row = {"tokens": length, "heads": heads, "dim": dim, **{n: round(1e3 * s, 3) for n, s in best.items()}}
        result["rows"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.attention_cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], metavar="N")
    parser.add_argument("--heads", type=int, default=12, metavar="N")
    parser.add_argument("--dim", type=int, default=128, metavar="N")
    parser.add_argument("--out", type=Path, metavar="DIR", default=_RESULTS)
    options = parser.parse_args(arguments)
    path = options.out / "cpu-attention_cpu.json"
    result = run(options.tokens, options.heads, options.dim)
    result["rows"] += run_trained()
    record.write(path, json.dumps(result, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
