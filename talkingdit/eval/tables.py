# SPDX-License-Identifier: Apache-2.0
"""Results as files: JSON and CSV of every video and of systems, Markdown and LaTeX in the papers' order of rows."""

from __future__ import annotations

import csv
import io
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from talkingdit.atomic import write_whole
from talkingdit.eval.job import TRUTH
from talkingdit.eval.protocol import DEVIATIONS, Name
from talkingdit.eval.run import Results, plain
from talkingdit.eval.summary import Cell, Comparison, SummaryRow, by_category

RESULTS = ("results.json", "systems.csv", "videos.csv", "table.md", "table.tex")
TITLES = {
    "whole": "Whole body",
    "face": "Face",
    "hands": "Hands",
    "left_hand": "Left hand",
    "right_hand": "Right hand",
    "body": "Body box",
    "sound": "Speech",
}
ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}
LATEX_ARROWS = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", "neither": ""}


def number(value: float) -> str:
    """A value with four significant digits, fewer than four decimals."""
    if value != value or value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "-∞" if value < 0 else "?"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:.{digits}f}"


def as_json(
    results: Results, rows: Sequence[SummaryRow], compared: Sequence[Comparison], protocol: Name
) -> dict[str, Any]:
    """Everything but features and pictures."""
    backbones = results.tools.backbones.values()
    content: dict[str, Any] = plain(
        {
            "protocol": protocol,
            "finder": f"{results.tools.finder.name}/{results.tools.finder.version}",
            "backbones": [{"slot": b.slot, "id": b.id, "version": b.version, "licence": b.licence} for b in backbones],
            "python": platform.python_version(),
            "not_available": results.not_available,
            "remarks": results.remarks(),
            "systems": [
                {"metric": row.full_name, "title": row.metric.title, "region": row.region, "better": row.metric.better}
                | {"system": system, "perfect": row.metric.perfect}
                | _cell(cell)
                for row in rows
                for system, cell in row.cells.items()
            ],
            "comparisons": [
                {"metric": c.row.full_name, "region": c.row.region, "system": c.system, "baseline": c.baseline}
                | {"difference": c.difference.mean, "low": c.difference.low, "high": c.difference.high}
                | {"p": c.difference.p, "p_adjusted": c.p, "n": c.difference.n, "verdict": c.better}
                for c in compared
            ],
            "videos": [
                {"system": v.pair.system, "name": v.pair.name, "file": v.pair.gen.name, "error": v.error}
                | {"category": v.pair.text.category, "facts": v.judged.facts, "values": v.judged.values}
                for v in results.verdicts
            ],
        }
    )
    return content


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "value": cell.value,
        "low": cell.low,
        "high": cell.high,
        "n": cell.n,
        "missing": cell.missing,
        "warning": cell.warning,
    }


def systems_csv(rows: Sequence[SummaryRow]) -> str:
    """One line for each number of a system."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["region", "metric", "better", "system", "value", "low", "high", "n", "missing", "warning"])
    for row in rows:
        for system, cell in row.cells.items():
            ends = ["" if end is None else repr(end) for end in (cell.low, cell.high)]
            writer.writerow(
                [row.region, row.full_name, row.metric.better, system, repr(cell.value), *ends]
                + [cell.n, cell.missing, cell.warning]
            )
    return out.getvalue()


def videos_csv(results: Results) -> str:
    """One line for each value of a video, and for each that is missing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["system", "video", "category", "metric", "region", "value", "why_not", "note"])
    for v in results.verdicts:
        head = [v.pair.system, v.pair.name, v.pair.text.category]
        if v.error:
            writer.writerow([*head, "", "", "", v.error, ""])
        for key, found in v.judged.values.items():
            metric, _, region = key.rpartition("|")
            value = repr(found["value"]) if "value" in found else ""
            writer.writerow([*head, metric, region, value, found.get("missing", ""), found.get("note", "")])
    return out.getvalue()


def best_of(row: SummaryRow) -> set[str]:
    """Systems with the best value of a row, the true videos left out."""
    cells = {system: cell.value for system, cell in row.cells.items() if system != TRUTH}
    if row.metric.better == "neither" or len(cells) < 2:
        return set()
    best = (max if row.metric.better == "higher" else min)(cells.values())
    found = {system for system, value in cells.items() if value == best}
    return found if len(found) < len(cells) else set()


def markdown(results: Results, rows: Sequence[SummaryRow]) -> str:
    """The table of all regions, as GitHub shows it; the best in bold."""
    systems = results.systems
    lines = ["| Region | Metric | " + " | ".join(map(_escaped, systems)) + " |", "|---|---|" + "---:|" * len(systems)]
    region = ""
    for row in rows:
        shown = "" if row.region == region else TITLES[row.region]
        region = row.region
        best = best_of(row)
        cells = []
        for system in systems:
            cell = row.cells.get(system)
            text = "" if cell is None else _with_interval(cell)
            cells.append(f"**{text}**" if system in best else text)
        name = f"{row.metric.title} {ARROWS[row.metric.better]} `{row.full_name}`"
        lines.append(f"| {shown} | {name} | " + " | ".join(cells) + " |")
    lines += _categories(results, rows)
    if results.not_available:
        lines += ["", "Not available:", ""]
        lines += [f"- {name}: {line}" for name, line in results.not_available.items()]
    if remarks := results.remarks():
        lines += ["", "Remarks:", "", *(f"- {_escaped(remark)}" for remark in remarks)]
    warnings = {
        f"{row.full_name}, {system}: {cell.warning}"
        for row in rows
        for system, cell in row.cells.items()
        if cell.warning
    }
    if warnings:
        lines += ["", "Warnings:", "", *(f"- {warning}" for warning in sorted(warnings))]
    return "\n".join(lines) + "\n"


def _categories(results: Results, rows: Sequence[SummaryRow]) -> list[str]:
    lines = []
    for row in rows:
        found = by_category(results, row) if row.metric.text else {}
        if found:
            lines += ["", f"`{row.full_name}` by category:", ""]
            lines += ["| Category | " + " | ".join(map(_escaped, results.systems)) + " |"]
            lines += ["|---|" + "---:|" * len(results.systems)]
            for category, cells in found.items():
                shown = [_with_interval(cells[s]) if s in cells else "" for s in results.systems]
                lines.append(f"| {_escaped(category)} | " + " | ".join(shown) + " |")
    return lines


def _with_interval(cell: Cell) -> str:
    if cell.low is None or cell.high is None:
        return number(cell.value)
    return f"{number(cell.value)} ({number(cell.low)} to {number(cell.high)})"


def _escaped(text: str) -> str:
    return " ".join(re.sub(r"([\\|*_<>`\[\]])", r"\\\1", text).split())


def latex(results: Results, rows: Sequence[SummaryRow]) -> str:
    """The same table for booktabs and multirow, without intervals."""
    systems = results.systems
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{tabular}{ll" + "r" * len(systems) + "}",
        r"\toprule",
        "Region & Metric & " + " & ".join(map(_tex, systems)) + r" \\",
    ]
    region = ""
    for row in rows:
        if row.region != region:
            lines.append(r"\midrule")
        shown = "" if row.region == region else TITLES[row.region]
        region = row.region
        best = best_of(row)
        cells = []
        for system in systems:
            cell = row.cells.get(system)
            text = "" if cell is None else number(cell.value).replace("∞", r"$\infty$")
            cells.append(rf"\textbf{{{text}}}" if system in best else text)
        lines.append(
            f"{shown} & {_tex(row.full_name)}{LATEX_ARROWS[row.metric.better]} & " + " & ".join(cells) + r" \\"
        )
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


TEX = {mark: "\\" + mark for mark in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def _tex(text: str) -> str:
    return " ".join("".join(TEX.get(mark, mark) for mark in text).split())


def deviations_markdown() -> str:
    """What the two protocols do differently."""
    lines = ["| | `jwb-compat`, as published | `jwb`, corrected |", "|---|---|---|"]
    return "\n".join(lines + [f"| {d.topic} | {d.compat} | {d.corrected} |" for d in DEVIATIONS]) + "\n"


def write_all(
    out: Path, results: Results, rows: Sequence[SummaryRow], compared: Sequence[Comparison], protocol: Name
) -> list[Path]:
    """Write results.json, systems.csv, videos.csv, table.md and table.tex; returns their paths."""
    content = (
        json.dumps(as_json(results, rows, compared, protocol), indent=1, allow_nan=False) + "\n",
        systems_csv(rows),
        videos_csv(results),
        markdown(results, rows),
        latex(results, rows),
    )
    for name, text in zip(RESULTS, content, strict=True):
        write_whole(out / name, text.encode(errors="backslashreplace"))  # names of files need not be text
    return [out / name for name in RESULTS]
