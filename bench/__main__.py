# SPDX-License-Identifier: Apache-2.0
"""``python -m bench <op>|all|report``: measure ops, or write what was measured into docs and README."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import cases, harness, record, report

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / "bench" / "results"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("what", choices=[*cases.names(), "all", "report"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, three repeats, nothing compiled; written only with --out"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile baselines")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON files (default: bench/results)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: every core)")
    parser.add_argument("--into", type=Path, metavar="DIR", default=_ROOT, help="repository that `report` writes into")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.what == "report":
        try:
            report.publish(report.load(options.out or _RESULTS), options.into)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda needs a CUDA device, and torch finds none", file=sys.stderr)
        return 1
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    setting = harness.Setting(
        torch.device(options.device),
        options.quick,
        not options.no_compile,
        apart=options.device == "cpu" and not options.quick,
    )
    for name in cases.names() if options.what == "all" else (options.what,):
        result = harness.run(name, cases.load(name), setting)
        folder = options.out or (None if options.quick else _RESULTS)
        if folder is not None:
            print(record.save(result, folder, options.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
