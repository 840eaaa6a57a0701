# SPDX-License-Identifier: Apache-2.0
"""Where the time of a call goes: kernels of a profile, summed by what they do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The first pattern that is found in a kernel's name gives its kind.
KINDS = {
    "talkingdit": r"talkingdit|\btd::|_ZN2td",
    "attention": r"flash|fmha|attention|sdpa|attn",
    "matrix product": r"gemm|nvjet|cutlass|cublas|splitk|addmm|matmul|::mm\b|::bmm\b|linear",
    "norm": r"layer_?norm|rms_?norm|softmax",
    "copy": r"memcpy|memset|copy|clone|\bcat|::fill",
    "elementwise": r"elementwise|vectorized|reduce|triton|mul|add|sub|div|pow|rsqrt|mean|gelu|silu|pointwise",
}


def kind(name: str) -> str:
    """Of a kernel (or, on the CPU, of an operator) by its name; "other" where no pattern fits."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def summary(call: Callable[[], Any], device: torch.device, calls: int = 3) -> dict[str, Any]:
    """Microseconds per call by kind, and of the ten kernels that take the longest."""
    cuda = device.type == "cuda"
    call()
    if cuda:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        for _ in range(calls):
            call()
        if cuda:
            torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profiled.key_averages():
        # On a GPU only kernels count: operators carry the time of the kernels they launched once more.
        if cuda == (event.device_type == torch.autograd.DeviceType.CUDA):
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[event.key] = times.get(event.key, 0.0) + spent / calls
    kinds: dict[str, float] = {}
    for name, spent in times.items():
        kinds[kind(name)] = kinds.get(kind(name), 0.0) + spent
    longest = sorted(times.items(), key=lambda item: -item[1])[:10]
    return {
        "kinds_us": {name: round(spent, 1) for name, spent in sorted(kinds.items(), key=lambda item: -item[1])},
        "longest_us": {name[:120]: round(spent, 1) for name, spent in longest},
    }
