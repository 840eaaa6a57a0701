# SPDX-License-Identifier: Apache-2.0
"""The funnel as a page: what each limit removed, with pictures of it, and where the figures of all clips lie.

One HTML file that needs nothing besides: pictures are inside.
"""

from __future__ import annotations

import base64
import html
import math
from pathlib import Path
from typing import Any

from talkingdit.atomic import write_whole
from talkingdit.curate.decide import CurateClip, Decisions, FunnelStep
from talkingdit.curate.measure import Record

REPORT = "report.html"
SAMPLES = 6  # pictures of what a limit removed
BARS = 32

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #c0504d; --good: #2e8b57; --dim: #888; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; }
table.small { width: auto; }
td, th { padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
th { text-align: left; font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: var(--line); height: .7rem; border-radius: 2px; }
.bar i { display: block; height: 100%; background: var(--good); border-radius: 2px; }
.dim { color: var(--dim); }
figure { margin: .6rem 0; }
figcaption { font-size: .82rem; color: var(--dim); overflow-wrap: anywhere; }
img { max-width: 100%; border-radius: 3px; }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
svg { display: block; width: 100%; max-width: 640px; height: auto; }
code { font-size: .9em; }
"""


def write_report(
    folder: Path, decisions: Decisions, videos: int, broken: list[Record], lacking: dict[str, str]
) -> None:
    """Write the page; the file is there as a whole or not at all."""
    kept = decisions.kept
    hours = sum(clip.end - clip.start for clip in decisions.clips) / 3600
    left = sum(clip.end - clip.start for clip in kept) / 3600
    parts = [
        f"<h1>{len(kept)} of {len(decisions.clips)} clips are kept</h1>",
        f"<p>{videos} videos, {len(broken)} of them broken; {_hours(left)} of {_hours(hours)}.</p>",
        _funnel(decisions.funnel),
        _anchors(kept),
        "<h2>What was removed</h2>",
        *[_removed(folder, step, decisions.clips) for step in decisions.funnel if step.removed],
        "<h2>What is kept</h2>",
        _pictures(folder, kept, ""),
        _times(decisions.clips),
        _list(
            "Stages that did not measure", [f"<b>{html.escape(n)}</b>: {html.escape(w)}" for n, w in lacking.items()]
        ),
        _list("Broken videos", [html.escape(record["error"]) for record in broken[:200]]),
    ]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>curate</title><style>{STYLE}</style>'
    write_whole(
        folder / REPORT,
        (page + "\n".join(part for part in parts if part) + "</html>\n").encode(errors="backslashreplace"),
    )


def _funnel(steps: list[FunnelStep]) -> str:
    total = max(1, steps[0].came if steps else 1)
    rows = []
    for step in steps:
        left = step.came - step.removed
        cells = [
            f"<td><code>{html.escape(step.name)}</code></td><td>{html.escape(str(step.limit))}</td>",
            f'<td class="n">{step.removed}</td><td class="n dim">{step.alone}</td>',
            f'<td class="n dim">{step.unknown}</td><td class="n">{left}</td>',
            f'<td style="width:22%"><div class="bar"><i style="width:{100 * left / total:.1f}%"></i></div></td>',
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    numbers = "".join(f'<th class="n">{name}</th>' for name in ("removes", "alone", "unknown", "left"))
    head = f"<th>figure</th><th>must be</th>{numbers}<th></th>"
    note = "alone: clips that fail this limit, whatever others say. unknown: clips without this figure."
    return f'<h2>Funnel</h2><table><tr>{head}</tr>{"".join(rows)}</table><p class="dim">{note}</p>'


def _removed(folder: Path, step: FunnelStep, clips: list[CurateClip]) -> str:
    gone = [clip for clip in clips if clip.removed_by == step.name]
    title = f"<h3><code>{html.escape(step.name)}</code>: {step.removed} ({html.escape(str(step.limit))})</h3>"
    return title + _histogram(step, clips) + _pictures(folder, gone, step.name)


def _histogram(step: FunnelStep, clips: list[CurateClip]) -> str:
    """Where the figure of all clips lies; what the limit keeps is green."""
    values = [v for clip in clips if isinstance(v := clip.figures.get(step.name), int | float) and math.isfinite(v)]
    if len(set(values)) < 3:
        return ""
    low, high = min(values), max(values)
    counts, good = [0] * BARS, [0] * BARS
    for value in values:
        bar = min(BARS - 1, int((value - low) / (high - low) * BARS))
        counts[bar] += 1
        good[bar] += step.limit.keeps(value)
    bars = []
    for i, count in enumerate(counts):
        colour = "var(--good)" if 2 * good[i] > count else "var(--bad)"
        tall = 40 * math.sqrt(count / max(counts))
        bars.append(f'<rect x="{i * 10}" y="{42 - tall:.1f}" width="9" height="{tall:.1f}" fill="{colour}"/>')
    ends = f'<text x="0" y="53" font-size="9" fill="currentColor">{low:.3g}</text>'
    ends += f'<text x="{BARS * 10}" y="53" font-size="9" text-anchor="end" fill="currentColor">{high:.3g}</text>'
    return f'<svg viewBox="0 0 {BARS * 10} 54">{"".join(bars)}{ends}</svg>'


def _pictures(folder: Path, clips: list[CurateClip], figure: str) -> str:
    """Some clips, evenly from all of them."""
    shown = [clip for clip in clips if clip.sample and (folder / clip.sample).is_file()]
    chosen = shown[:: max(1, len(shown) // SAMPLES)][:SAMPLES]
    cells = []
    for clip in chosen:
        data = base64.b64encode((folder / clip.sample).read_bytes()).decode()
        value = clip.figures.get(figure)
        said = f", {figure.split('.')[-1]} {_short(value)}" if figure else ""
        said += f", copy of {clip.copy_of}" if clip.copy_of else ""
        said += f"; also {', '.join(clip.failed[1:])}" if clip.failed[1:] else ""
        caption = html.escape(f"{clip.key}, {clip.start:.1f} to {clip.end:.1f} s{said}")
        cells.append(
            f'<figure><img src="data:image/jpeg;base64,{data}" alt=""><figcaption>{caption}</figcaption></figure>'
        )
    return f'<div class="grid">{"".join(cells)}</div>' if cells else ""


def _anchors(clips: list[CurateClip]) -> str:
    counts: dict[str, int] = {}
    for clip in clips:
        for anchor in clip.anchors:
            counts[anchor["kind"]] = counts.get(anchor["kind"], 0) + 1
    if not counts:
        return ""
    cells = "".join(f"<tr><td>{html.escape(kind)}</td><td class=n>{count}</td></tr>" for kind, count in counts.items())
    return f'<h2>Anchors of the clips that are kept</h2><table class="small">{cells}</table>'


def _times(clips: list[CurateClip]) -> str:
    """Processor seconds by stage."""
    spent: dict[str, float] = {}
    for clip in clips:
        for stage, seconds in clip.took.items():
            spent[stage] = spent.get(stage, 0.0) + seconds
    if not spent:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(stage)}</td><td class=n>{seconds:.1f}</td>"
        f"<td class=n>{len(clips) / seconds if seconds else math.inf:.1f}</td></tr>"
        for stage, seconds in sorted(spent.items(), key=lambda item: -item[1])
    )
    head = "<tr><th>stage</th><th class=n>processor seconds</th><th class=n>clips a second and core</th></tr>"
    return f'<h2>Time</h2><table class="small">{head}{rows}</table>'


def _list(title: str, rows: list[str]) -> str:
    return f"<h2>{title}</h2><ul>{''.join(f'<li>{row}</li>' for row in rows)}</ul>" if rows else ""


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)
