# SPDX-License-Identifier: Apache-2.0
"""The table in the README, made from the JSON files of a results folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness import write

BEGIN, END = "<!-- bench:start -->", "<!-- bench:end -->"
_HEAD = ("op", "shape", "dtype", "direction", "µs", "GB/s", "share of copy", "times faster than")
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_NOTE = (
    "Two figures are a fresh result and a preallocated one (`out=`). Bandwidth counts inputs and results once; the "
    "copy is `Tensor.copy_` of as many bytes in the same run. Factors compare fresh results."
)


def load(folder: Path) -> list[dict[str, Any]]:
    """Results of full runs, in order of file names.

    Raises:
        FileNotFoundError: there is none.
    """
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    results = [result for result in found if "rows" in result and not result.get("quick")]
    if not results:
        raise FileNotFoundError(f"bench report: no results of full runs in {folder}: run `python -m bench all` first")
    return results


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def _pair(row: Mapping[str, Any], fresh: str, warm: str, show: Callable[[float], str] = _number) -> str:
    return " / ".join(show(row[key]) for key in (fresh, warm) if key in row)


def _row(row: Mapping[str, Any]) -> str:
    factors = ", ".join(f"{name} {us / row['median_us']:.1f}" for name, us in row["baselines"].items())
    cells = (
        f"`{row['op']}`",
        row["shape"],
        _DTYPES.get(row["dtype"], row["dtype"]),
        row["direction"],
        _pair(row, "median_us", "out_us"),
        _pair(row, "gbps", "out_gbps"),
        _pair(row, "share_of_copy", "out_share_of_copy", "{:.0%}".format),
        factors,
    )
    return "| " + " | ".join(cells) + " |"


def _spread(values: Iterable[float]) -> str:
    low, *_, high = sorted([*(values := list(values)), *values])
    return _number(low) if _number(low) == _number(high) else f"{_number(low)} to {_number(high)}"


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one table per device."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for result in results:
        key = (result["device"], result["machine"], str(result["threads"]), result["versions"]["torch"])
        groups.setdefault(key, []).append(result)
    parts = []
    for (device, machine, threads, torch_version), group in groups.items():
        place = f"{machine}, {threads} threads" if device == "cpu" else f"{device} ({machine})"
        commits = ", ".join(dict.fromkeys(result["commit"] for result in group))
        copy = _spread(result["copy_gbps"] for result in group)
        lines = [f"{place}; torch {torch_version}; copy {copy} GB/s; commit {commits}.", ""]
        lines += ["| " + " | ".join(_HEAD) + " |", "|---|---|---|---|---:|---:|---:|---|"]
        lines += [_row(row) for result in group for row in result["rows"]]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, _NOTE])


def insert(document: Path, content: str) -> None:
    """Replaces what stands between the markers.

    Raises:
        ValueError: the markers are not there, each once and in order.
    """
    text = document.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"bench report: {document.name} must hold the markers {BEGIN} and {END}, each once, in order")
    head, rest = text.split(BEGIN)
    write(document, f"{head}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}")
