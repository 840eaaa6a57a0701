# SPDX-License-Identifier: Apache-2.0
"""One HTML file with everything: tables, comparisons, and every video, the worst first, with its frames and curves.

Nothing is loaded from elsewhere: pictures are inside, curves are SVG, and there is no script.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from talkingdit.eval.job import TRUTH
from talkingdit.eval.protocol import DEVIATIONS, Name
from talkingdit.eval.run import Results, Verdict
from talkingdit.eval.summary import Comparison, SummaryRow, worst_first
from talkingdit.eval.tables import ARROWS, TITLES, best_of, by_category, number
from talkingdit.media.style import DARK, FONTS, LIGHT, variables

MOST_VIDEOS = 200
WIDTH, HEIGHT = 260, 64  # of a curve, in pixels
CURVES = ("SSIM", "PSNR", "CSIM", "sync r", "MS", "expression error", "HKC")

THEME = f"""
:root {{ color-scheme: light dark; {variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}
body {{ font: 15px/1.5 {", ".join(FONTS)}; background: var(--paper); color: var(--ink); }}
"""
STYLE = """
body { max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; } h2 { margin-top: 2.5rem; font-size: 1.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:nth-child(-n+2), td:nth-child(-n+2), .left th, .left td { text-align: left; }
td small, .dim { color: var(--dim); } td small { display: block; white-space: nowrap; }
.best { font-weight: 700; color: var(--best); } .best small { font-weight: 400; }
.worse, .error { color: var(--bad); } .better { color: var(--best); }
tr.region td { border-top: 2px solid var(--dim); }
article { background: var(--raised); border: 1px solid var(--line); border-radius: 8px; }
article { padding: 0.8rem 1rem; margin: 1rem 0; }
article h3 { margin: 0 0 0.4rem; font-size: 1rem; } article img { max-width: 100%; display: block; }
.curves { display: flex; flex-wrap: wrap; gap: 0.6rem 1.2rem; margin-top: 0.6rem; }
figure { margin: 0; } figcaption { font-size: 12px; color: var(--dim); }
svg { display: block; background: #8881; border-radius: 4px; }
polyline { fill: none; stroke: var(--accent); stroke-width: 1.4; }
.values { font-size: 13px; margin-top: 0.5rem; columns: 3 220px; } code { font-size: 0.92em; }
"""


def report(results: Results, rows: Sequence[SummaryRow], compared: Sequence[Comparison], protocol: Name) -> str:
    """The page."""
    count = len(results.verdicts)
    broken = sum(bool(verdict.error) for verdict in results.verdicts)
    shown = worst_first(results, rows)
    parts = [
        "<h1>Evaluation</h1>",
        f'<p class="dim">Protocol {protocol}; {count} videos of {len(results.systems)} systems'
        + (f'; <span class="error">{broken} could not be read</span>' if broken else "")
        + ". Means over videos; small: 95 % bootstrap interval. Green: best.</p>",
        *(f'<p class="error">{_safe(remark)}</p>' for remark in results.remarks()),
        '<div class="wide">' + _table(results, rows) + "</div>",
        _categories(results, rows),
        _comparisons(compared),
        _not_available(results),
        f"<h2>Videos, the worst first</h2>{_cut(len(shown))}",
        *(_video(verdict, rows) for _, verdict in shown[:MOST_VIDEOS]),
        _deviations(),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Evaluation</title>'
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{THEME}{STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _table(results: Results, rows: Sequence[SummaryRow]) -> str:
    systems = results.systems
    lines = ["<tr><th>Region<th>Metric" + "".join(f"<th>{_safe(system)}" for system in systems) + "</tr>"]
    region = ""
    for row in rows:
        new, region = row.region != region, row.region
        best = best_of(row)
        cells = []
        for system in systems:
            cell = row.cells.get(system)
            if cell is None:
                cells.append('<td class="dim">–')
                continue
            ends = (
                ""
                if cell.low is None or cell.high is None
                else f"<small>{number(cell.low)} to {number(cell.high)}</small>"
            )
            lacking = f"<small>{cell.missing} without</small>" if cell.missing else ""
            warning = f'<small title="{_safe(cell.warning)}">few samples</small>' if cell.warning else ""
            mark = ' class="best"' if system in best else ""
            cells.append(f"<td{mark}>{number(cell.value)}{ends}{lacking}{warning}")
        title = f'{_safe(row.metric.title)} {ARROWS[row.metric.better]} <code class="dim">{_safe(row.full_name)}</code>'
        kind = ' class="region"' if new else ""
        name = TITLES[row.region] if new else ""
        lines.append(f'<tr{kind}><td>{name}<td title="{_safe(row.metric.about)}">{title}' + "".join(cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _categories(results: Results, rows: Sequence[SummaryRow]) -> str:
    out = ""
    for row in rows:
        found = by_category(results, row) if row.metric.text else {}
        if found:
            lines = ["<tr><th>Category<th>" + "<th>".join(map(_safe, results.systems)) + "</tr>"]
            for category, cells in found.items():
                shown = [number(cells[s].value) if s in cells else "" for s in results.systems]
                lines.append(f"<tr><td>{_safe(category)}<td>" + "<td>".join(shown) + "</tr>")
            out += f"<h2>{_safe(row.full_name)} by category</h2><table>{''.join(lines)}</table>"
    return out


def _comparisons(compared: Sequence[Comparison]) -> str:
    if not compared:
        return ""
    lines = ["<tr><th>Region<th>Metric<th>System<th>Difference<th>95 % interval<th>p, adjusted<th>Videos<th></tr>"]
    for one in compared:
        gap = one.difference
        p = "&lt; 0.001" if one.p < 0.001 else f"{one.p:.3f}"
        lines.append(
            f"<tr><td>{TITLES[one.row.region]}<td>{_safe(one.row.full_name)}<td>{_safe(one.system)}<td>{number(gap.mean)}"
            f'<td>{number(gap.low)} to {number(gap.high)}<td>{p}<td>{gap.n}<td class="{one.better}">{one.better}</tr>'
        )
    return (
        f"<h2>Against {_safe(compared[0].baseline)}</h2><p class=dim>Sign-flip tests on the videos that both have, "
        f"adjusted for {len(compared)} tests (Holm).</p><div class=wide><table>{''.join(lines)}</table></div>"
    )


def _not_available(results: Results) -> str:
    if not results.not_available:
        return ""
    lines = "".join(f"<tr><td>{_safe(name)}<td>{_safe(line)}</tr>" for name, line in results.not_available.items())
    return f'<h2>Not available</h2><table class="left">{lines}</table>'


def _cut(count: int) -> str:
    return (
        f'<p class="dim">The first {MOST_VIDEOS} of {count}; all are in results.json.</p>'
        if count > MOST_VIDEOS
        else ""
    )


def _video(verdict: Verdict, rows: Sequence[SummaryRow]) -> str:
    pair, judged = verdict.pair, verdict.judged
    head = f"<h3>{_safe(pair.system)}: {_safe(pair.name)}</h3>"
    if verdict.error:
        return f'<article>{head}<p class="error">{_safe(verdict.error)}</p></article>'
    facts = judged.facts
    about = f"{facts.get('width')}x{facts.get('height')}, {facts.get('fps')} frames/s, {facts.get('seconds')} s"
    about += f"; {facts['note']}" if facts.get("note") else ""
    about += "; above: generated, below: true" if pair.truth is not None and pair.system != TRUTH else ""
    picture = f'<img alt="frames" src="data:image/jpeg;base64,{judged.sheet}">' if judged.sheet else ""
    curves, values = [], []
    for row in rows:
        found = judged.values.get(row.key, {})
        name = f"{row.region} {row.metric.title}"
        if "value" in found:
            values.append(
                f"<div>{_safe(name)} <b>{number(found['value'])}</b> {_safe(found.get('note', ''))[:90]}</div>"
            )
            if row.metric.title in CURVES and len(found["curve"]) > 1:
                curves.append(
                    f"<figure>{curve(found['curve'])}<figcaption>{_safe(_caption(row))}</figcaption></figure>"
                )
        elif "missing" in found:
            values.append(f'<div class="dim">{_safe(name)}: {_safe(found["missing"])}</div>')
    return (
        f'<article>{head}<p class="dim">{_safe(about)}</p>{picture}<div class="curves">{"".join(curves)}</div>'
        f'<div class="values">{"".join(values)}</div></article>'
    )


def _caption(row: SummaryRow) -> str:
    shown = {"sync r": "mouth opening"}.get(row.metric.title, row.metric.title)
    return f"{TITLES[row.region].lower()}: {shown} by frame"


def curve(values: Sequence[float | None]) -> str:
    """A line over frames as SVG, with gaps where there is no value; the range stands at its ends."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (HEIGHT - 12) / (high - low) if high > low else 0.0
    step = (WIDTH - 52) / max(1, len(values) - 1)
    lines: list[list[str]] = [[]]
    for i, value in enumerate(values):
        if value is None:
            lines.append([])
        else:
            y = HEIGHT - 6 - (value - low) * scale if scale else HEIGHT / 2
            lines[-1].append(f"{i * step:.1f},{y:.1f}")
    drawn = "".join(f'<polyline points="{" ".join(line if len(line) > 1 else line * 2)}"/>' for line in lines if line)
    text = 'font-size="10" fill="currentColor" opacity="0.6"'
    ends = f'<text x="{WIDTH - 48}" y="12" {text}>{number(high)}</text>'
    ends += f'<text x="{WIDTH - 48}" y="{HEIGHT - 4}" {text}>{number(low)}</text>' if scale else ""
    return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{drawn}{ends}</svg>'


def _deviations() -> str:
    lines = "".join(f"<tr><td>{_safe(d.topic)}<td>{_safe(d.compat)}<td>{_safe(d.corrected)}</tr>" for d in DEVIATIONS)
    return f'<h2>jwb-compat and jwb</h2><table class="left"><tr><th><th>as published<th>corrected</tr>{lines}</table>'


def _safe(text: object) -> str:
    return html.escape(str(text), quote=True)
