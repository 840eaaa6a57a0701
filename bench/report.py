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
_BEST = "faster than the best"
_STEPS = ("what", "shape", "tokens", "µs", "official µs", "time", "peak memory", "official", "ratio", "moved", "ratio")
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
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"), key=lambda path: path.stem)]
    full = [result for result in found if "device" in result and not result.get("quick")]
    results = [result for result in full if result.get("rows") or result.get("steps")]
    if not results:
        raise FileNotFoundError(f"bench report: no results of full runs in {folder}: run `python -m bench all` first")
    return _joined(results)


def _joined(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Baselines that were measured apart ("<op>-compiled") stand in the rows of the op, where it was measured."""
    rows = {_key(result, row): row for result in results for row in result.get("rows", ()) if not _apart(result)}
    kept = []
    for result in results:
        if not _apart(result):
            kept.append(result)
            continue
        rest = [row for row in result["rows"] if _key(result, row) not in rows]
        for row in result["rows"]:
            if _key(result, row) in rows:
                rows[_key(result, row)]["baselines"] |= row["baselines"]
        if rest:
            kept.append({**result, "rows": rest})
    return kept


def _apart(result: Mapping[str, Any]) -> bool:
    return bool(result["name"].endswith("-compiled"))


def _key(result: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, ...]:
    return (result["device"], result["commit"], row["op"], row["shape"], row["dtype"], row["direction"])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def _pair(row: Mapping[str, Any], fresh: str, warm: str, show: Callable[[float], str] = _number) -> str:
    return " / ".join(show(row[key]) for key in (fresh, warm) if key in row)


def _best(row: Mapping[str, Any]) -> str:
    if not row["baselines"]:
        return "-"
    name, us = min(row["baselines"].items(), key=lambda item: item[1])
    return f"{us / row['median_us']:.2f} ({name})"


def _row(row: Mapping[str, Any], best: bool) -> str:
    factors = ", ".join(f"{name} {us / row['median_us']:.1f}" for name, us in row["baselines"].items())
    cells = (
        f"`{row['op']}`",
        row["shape"],
        _DTYPES.get(row["dtype"], row["dtype"]),
        row["direction"],
        _pair(row, "median_us", "out_us"),
        _pair(row, "gbps", "out_gbps"),
        _pair(row, "share_of_copy", "out_share_of_copy", "{:.0%}".format),
        *((_best(row),) if best else ()),
        factors,
    )
    return _line(cells)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _step(name: str, step: Mapping[str, Any]) -> str:
    moved = [f"{step['moved_bytes'] / 1e9:.2f} GB", f"{step['moved_ratio']:.2f}"] if "moved_bytes" in step else ["", ""]
    return _line(
        (
            f"{name}, {step['blocks']} block" + "s" * (step["blocks"] != 1),
            step["shape"],
            f"{step['tokens']:,}" if "tokens" in step else "",
            _number(step["median_us"]),
            _number(step["official_us"]),
            f"{step['time_ratio']:.2f}",
            f"{step['peak_bytes'] / 1e9:.2f} GB",
            f"{step['official_peak_bytes'] / 1e9:.2f} GB",
            f"{step['peak_ratio']:.2f}",
            *moved,
        )
    )


def _op_table(group: Sequence[Mapping[str, Any]], best: bool) -> list[str]:
    rows = [_row(row, best) for result in group for row in result.get("rows", ())]
    if not rows:
        return []
    head = (*_HEAD[:-1], _BEST, _HEAD[-1]) if best else _HEAD
    marks = ["---"] * 4 + ["---:"] * (4 if best else 3) + ["---"]
    return ["", _line(head), "|" + "|".join(marks) + "|", *rows]


def _step_table(group: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [_step(result["name"], step) for result in group for step in result.get("steps", ())]
    if not lines:
        return []
    return ["", _line(_STEPS), "|" + "|".join(["---"] * 2 + ["---:"] * (len(_STEPS) - 2)) + "|", *lines]


def _spread(values: Iterable[float]) -> str:
    low, *_, high = sorted([*(values := list(values)), *values])
    return _number(low) if _number(low) == _number(high) else f"{_number(low)} to {_number(high)}"


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: for each device a table of ops and one of whole steps and blocks, where they were measured."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for result in results:
        key = (result["device"], result["machine"], str(result["threads"]), result["versions"]["torch"])
        groups.setdefault(key, []).append(result)
    parts = []
    for (device, machine, threads, torch_version), group in groups.items():
        place = f"{machine}, {threads} threads" if device == "cpu" else f"{device} ({machine})"
        commits = ", ".join(dict.fromkeys(result["commit"] for result in group))
        bandwidths = [result["copy_gbps"] for result in group if result.get("rows")]
        copy = f"copy {_spread(bandwidths)} GB/s; " if bandwidths else ""
        lines = [f"{place}; torch {torch_version}; {copy}commit {commits}."]
        lines += [*_op_table(group, best=device != "cpu"), *_step_table(group)]
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
