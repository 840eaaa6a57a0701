# SPDX-License-Identifier: Apache-2.0
"""The process of one contestant on the CPU, which times itself when `bench.apart` tells it to."""

from __future__ import annotations

import json
import sys
from itertools import islice
from typing import Any

import torch

from bench import cases, harness


def serve(what: dict[str, Any]) -> None:
    """Times the calls whose names come in, line by line."""
    setting = harness.Setting(
        torch.device("cpu"),
        quick=what["quick"],
        compile=what["compile"],
        dtypes=tuple(getattr(torch, name) for name in what["dtypes"]),
        shapes=slice(*what["shapes"]),
    )
    torch.set_num_threads(what["threads"])
    harness.prepare()
    found = harness.cases_of(cases.load(what["benchmark"]), setting)
    case = next(islice(found, what["number"], None))
    calls = harness.calls_alone(case, setting, what["contestant"])
    scratch = torch.empty(0)
    for group in calls.values():
        harness.time_calls(group, setting.device, scratch)  # all there is to compile is compiled
    print(json.dumps(list(calls)), flush=True)
    for line in sys.stdin:
        print(json.dumps(harness.time_calls(calls[line.strip()], setting.device, scratch)), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
