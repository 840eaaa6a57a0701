# SPDX-License-Identifier: Apache-2.0
"""From values of videos to numbers of systems: means with intervals, distances of sets, paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from talkingdit.eval.frechet import frechet_distance
from talkingdit.eval.job import TRUTH
from talkingdit.eval.judge_video import key_of
from talkingdit.eval.metric import Metric
from talkingdit.eval.protocol import REGION_ROWS, row_order
from talkingdit.eval.run import Results, Verdict
from talkingdit.eval.statistics import Difference, difference, holm, interval, interval_of

FEW_DIMENSIONS = 128  # up to which a distance is cheap enough to bootstrap


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        value, low, high: with its 95 % interval; the ends are None where there is none.
        n: videos it is of, for distances of sets samples.
        missing: videos that have no value.
        warning: what a reader must know.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    missing: int = 0
    warning: str = ""


@dataclass(frozen=True)
class SummaryRow:
    """One metric in one region, by system."""

    key: str
    metric: Metric
    full_name: str
    region: str
    cells: dict[str, Cell] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A system against the baseline in one row; `p` is adjusted for the number of rows (Holm)."""

    row: SummaryRow
    system: str
    baseline: str
    difference: Difference
    p: float

    @property
    def better(self) -> str:
        """ "better", "worse" or "" where the interval or the test leaves it open."""
        found, sign = self.difference, {"higher": 1, "lower": -1}.get(self.row.metric.better, 0)
        if not sign or self.p >= 0.05 or found.low <= 0 <= found.high:
            return ""
        return "better" if found.mean * sign > 0 else "worse"


def rows_of(results: Results) -> list[SummaryRow]:
    """Every metric in every region that has a value, in the papers' order: regions, and metrics in each."""
    order = sorted(results.tools.possible(), key=lambda one: (REGION_ROWS.index(one[1]), row_order(one[0].title)))
    rows = []
    for metric, region in order:
        key = key_of(metric, region, results.tools)
        row = SummaryRow(key, metric, metric.full_name(results.tools.backbones), region)
        for system in results.systems:
            verdicts = [verdict for verdict in results.verdicts if verdict.pair.system == system]
            cell = _set_cell(metric, key, verdicts) if metric.collect else _mean_cell(key, verdicts)
            if cell is not None:
                row.cells[system] = cell
        if row.cells:
            rows.append(row)
    return rows


def values_of(key: str, verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Values of a row by name of the video."""
    out = {}
    for verdict in verdicts:
        found = verdict.judged.values.get(key, {})
        if "value" in found:
            out[verdict.pair.name] = float(found["value"])
    return out


def _mean_cell(key: str, verdicts: Sequence[Verdict]) -> Cell | None:
    values = list(values_of(key, verdicts).values())
    if not values:
        return None
    missing = len(verdicts) - len(values)
    if not np.isfinite(values).all():
        return Cell(float(np.mean(values)), None, None, len(values), missing)
    found = interval(values)
    low, high = (found.low, found.high) if found.n > 1 else (None, None)
    return Cell(found.mean, low, high, found.n, missing)


def _set_cell(metric: Metric, key: str, verdicts: Sequence[Verdict]) -> Cell | None:
    both = [verdict.judged.features[key] for verdict in verdicts if key in verdict.judged.features]
    if not both:
        return None
    gen, truth = (np.concatenate([pair[i] for pair in both]) for i in (0, 1))
    missing = len(verdicts) - len(both)
    if min(len(gen), len(truth)) < 2:
        return None
    warning = ""
    if min(len(gen), len(truth)) < metric.least:
        warning = f"{min(len(gen), len(truth))} samples; the distance depends on their number below {metric.least}"
    low = high = None
    if gen.shape[1] <= FEW_DIMENSIONS and len(both) > 1:
        low, high = interval_of(lambda chosen: _distance(both, chosen), len(both))
        low = max(0.0, low)
    return Cell(frechet_distance(gen, truth), low, high, min(len(gen), len(truth)), missing, warning)


def _distance(both: Sequence[tuple[np.ndarray, np.ndarray]], chosen: np.ndarray) -> float:
    return frechet_distance(*(np.concatenate([both[j][i] for j in chosen]) for i in (0, 1)))


def comparisons(results: Results, rows: Sequence[SummaryRow], baseline: str) -> list[Comparison]:
    """Every other system against the baseline on the videos that both have, p adjusted over all rows.

    Rows without a better direction, and distances of sets, which no single video has, are left out; so are true videos,
    which are no system.
    """
    found: list[tuple[SummaryRow, str, Difference]] = []
    by_system = {
        system: [verdict for verdict in results.verdicts if verdict.pair.system == system]
        for system in results.systems
        if system != TRUTH
    }
    for row in rows:
        if row.metric.collect is not None or row.metric.better == "neither":
            continue
        base = values_of(row.key, by_system.get(baseline, []))
        for system, verdicts in by_system.items():
            if system == baseline:
                continue
            its = values_of(row.key, verdicts)
            names = [name for name in its if name in base and np.isfinite([its[name], base[name]]).all()]
            if len(names) >= 2:
                found.append((row, system, difference([its[n] for n in names], [base[n] for n in names])))
    adjusted = holm([one[2].p for one in found])
    return [Comparison(row, system, baseline, gap, p) for (row, system, gap), p in zip(found, adjusted, strict=True)]


def by_category(results: Results, row: SummaryRow) -> dict[str, dict[str, Cell]]:
    """A row by category of the texts and by system: the protocol's table of word error rates."""
    out: dict[str, dict[str, Cell]] = {}
    for category in dict.fromkeys(verdict.pair.text.category for verdict in results.verdicts):
        for system in results.systems:
            its = [v for v in results.verdicts if (v.pair.system, v.pair.text.category) == (system, category)]
            cell = _mean_cell(row.key, its) if category and its else None
            if cell is not None:
                out.setdefault(category, {})[system] = cell
    return out


def worst_first(results: Results, rows: Sequence[SummaryRow]) -> list[tuple[float, Verdict]]:
    """Videos by how bad they are: the mean over rows of ranks among all videos, 1 worst; broken ones come first.

    True videos judged against themselves are left out.
    """
    scored = [row for row in rows if row.metric.better != "neither" and row.metric.collect is None]
    verdicts = [verdict for verdict in results.verdicts if verdict.pair.gen != verdict.pair.truth]
    ranks: dict[int, list[float]] = {i: [] for i in range(len(verdicts))}
    for row in scored:
        seen = [
            (float(found["value"]), i)
            for i, verdict in enumerate(verdicts)
            if "value" in (found := verdict.judged.values.get(row.key, {}))
        ]
        seen.sort(reverse=row.metric.better == "lower")
        places: dict[float, list[int]] = {}
        for place, (value, _) in enumerate(seen):
            places.setdefault(value, []).append(place)
        for value, i in seen:  # equal values have one rank
            ranks[i].append(1 - float(np.mean(places[value])) / max(1, len(seen) - 1))
    badness = [(2.0 if verdicts[i].error else float(np.mean(r)) if r else 0.0, verdicts[i]) for i, r in ranks.items()]
    return sorted(badness, key=lambda one: -one[0])
