# SPDX-License-Identifier: Apache-2.0
"""The table of ablations and its figure, docs/ablations.md, made of bench/results/ablations.json.

python -m bench.ablations_page
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from bench.ablations import RESULTS
from bench.record import write
from bench.report import insert

ROOT = Path(__file__).resolve().parent.parent
PAGE, FIGURE = ROOT / "docs" / "ablations.md", ROOT / "docs" / "figures" / "ablations.svg"
_WIDTH, _LEFT, _BAR = 640, 230, 18

Cells = Mapping[str, Mapping[str, Any]]
Claims = dict[tuple[str, str], dict[str, Mapping[str, Any]]]


def claims_of(cells: Cells) -> Claims:
    """(study, claim): row: cell, in the order in which they were measured; of several seeds the last."""
    found: Claims = {}
    for key, cell in cells.items():
        study, claim, row, _ = key.split("/")
        found.setdefault((study, claim), {})[row] = cell
    return found


def table(cells: Cells) -> str:
    """A line per claim and row; an arrow tells whether more is better where the claim says so.

    Cells of right videos have no steps of training, nor have those that were measured before steps were kept.
    """
    lines = ["| claim | row | steps | measured |", "|---|---|---|---|"]
    for (_, claim), rows in claims_of(cells).items():
        for number, (row, cell) in enumerate(rows.items()):
            better = cell["better"]
            measured = ", ".join(
                f"{name.replace('_', ' ')}{'' if name not in better else ' ↑' if better[name] else ' ↓'} {value:.3g}"
                for name, value in cell["measured"].items()
            )
            about = f"{claim.replace('_', ' ')}: {cell['says']}" if number == 0 else ""
            steps = "" if cell.get("steps") is None else f"{cell['steps']:,}"
            lines.append(f"| {about} | {row.replace('_', ' ')} | {steps} | {measured} |")
    return "\n".join(lines)


def effort(cells: Cells) -> str:
    """Hours that the rows of the table took: each model once, and every cell; a thread each, so of one core."""
    models = {
        (key.split("/")[0], cell["training"]["row"], key.split("/")[-1]): cell["training"]["seconds"]
        for key, cell in cells.items()
        if cell.get("training") is not None
    }
    training, measuring = sum(models.values()) / 3600, sum(cell.get("seconds", 0.0) for cell in cells.values()) / 3600
    return (
        f"Training of the {len(models)} models of this table took {training:.1f} hours of one core, measuring its "
        f"{len(cells)} rows {measuring:.1f}: {(training + measuring) / 2:.1f} hours of two cores, after the clips "
        "are drawn."
    )


def figure(cells: Cells) -> str:
    """Bars of the first measure of every claim, as SVG."""
    parts, y = [], 24
    for (study, claim), rows in claims_of(cells).items():
        name = next(iter(next(iter(rows.values()))["better"]))
        values = {row: float(cell["measured"][name]) for row, cell in rows.items() if name in cell["measured"]}
        largest = max(max(map(abs, values.values()), default=0.0), 1e-9)
        parts.append(
            _text(12, y, f"{study.replace('_', '-')}, {claim.replace('_', ' ')}: {name.replace('_', ' ')}", "bold")
        )
        y += 10
        for row, value in values.items():
            length = max(0.0, value) / largest * (_WIDTH - _LEFT - 80)
            parts.append(_text(_LEFT - 8, y + 13, row.replace("_", " "), anchor="end"))
            parts.append(
                f'<rect x="{_LEFT}" y="{y + 2}" width="{length:.1f}" height="{_BAR - 4}" fill="#2f6fde"/>'
                + _text(round(_LEFT + length + 6), y + 13, f"{value:.3g}")
            )
            y += _BAR
        y += 26
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" viewBox="0 0 {_WIDTH} {y}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _text(x: int, y: int, words: str, weight: str = "normal", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-weight="{weight}" text-anchor="{anchor}" fill="#222">{escape(words)}</text>'


def main() -> int:
    cells = json.loads(RESULTS.read_text())
    insert(PAGE, f"{table(cells)}\n\n{effort(cells)}")
    write(FIGURE, figure(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
