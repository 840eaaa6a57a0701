# SPDX-License-Identifier: Apache-2.0
"""Words and pictures of the page as HTML. Whatever comes from a person is escaped."""

from __future__ import annotations

import html
import re
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from talkingdit.app.guard import FILE
from talkingdit.app.runs import Run
from talkingdit.media.style import COLOURS, css

STATES = {"waiting": "waiting", "running": "at work", "done": "done", "stopped": "stopped", "failed": "failed"}


def address(run: Run, name: str) -> str:
    """Of a file of a run, relative to the page; another time it is made, another address."""
    return f"talkingdit/runs/{run.id}/{name}?{int(run.started)}"


def status(run: Run | None, before: int, stopping: bool) -> str:
    """How a run goes."""
    if run is None:
        return '<p class="dim">Nothing has been made yet: give a picture and a voice, and press “Make the video”.</p>'
    parts = [f'<p class="state {run.state}"><b>{escaped(run.title)}</b>: {escaped(_words(run, before, stopping))}</p>']
    if run.state == "running":
        share = f'value="{run.done}" max="{run.total}"' if run.total else ""
        parts.append(f'<progress {share} aria-label="Steps that are done"></progress>')
    if run.sentence:
        kind = "error" if run.state == "failed" else "dim"
        parts.append(f'<p class="{kind}">{escaped(in_words_of_the_form(run.sentence, run.folder))}</p>')
    parts += [f'<p class="dim">{escaped(in_words_of_the_form(warning, run.folder))}</p>' for warning in run.warnings]
    if run.state == "done":
        name = quote(f"{run.title or 'video'}.mp4")
        parts.append(f'<p><a href="{address(run, "video.mp4")}" download="{name}">Download the video</a></p>')
    return "".join(parts)


def _words(run: Run, before: int, stopping: bool) -> str:
    if stopping and not run.ended:
        return "stopping; finished clips are kept"
    if run.state == "waiting":
        return "waiting for its turn" + (f", {before} before it" if before else "")
    if run.state == "running":
        if not run.total:
            return run.doing or "starting"
        clip = min(run.clip + 1, run.clips)
        gone = time.time() - run.started
        left = gone / run.done * (run.total - run.done) if run.done else 0
        after = f", about {left:.0f} s to go" if run.done < run.total else ""
        return f"clip {clip} of {run.clips}, step {run.done} of {run.total}{after}"
    if run.state == "done":
        first = "" if run.first_after is None else f", the first frame after {run.first_after:.1f} s"
        return f"done in {run.took:.1f} s{first}"
    return STATES[run.state]


def video(run: Run | None) -> str:
    """The video, while it is made and after."""
    if run is None or not run.video.exists():
        return ""
    source = address(run, "video.mp4")
    play = "autoplay" if not run.ended else ""
    return f'<video controls playsinline {play} src="{source}" aria-label="The video of {escaped(run.title)}"></video>'


def sheet(run: Run | None) -> str:
    """The preview sheet."""
    if run is None or run.state != "done" or not run.sheet.exists():
        return ""
    source = address(run, "sheet.png")
    text = f"Frames of {escaped(run.title)}, its voice and the mouth over time"
    return f'<a href="{source}" target="_blank"><img src="{source}" alt="{text}"></a>'


def title_of(run: Run) -> str:
    """A line of the history."""
    when = time.strftime("%d %b %H:%M", time.localtime(run.created))
    return f"{run.title} · {when} · {STATES[run.state]}"


def boxes(picture: str, size: tuple[int, int], found: Sequence[tuple[str, Sequence[float]]]) -> str:
    """A picture with the boxes of speakers on it.

    Args:
        picture: file that gradio serves.
        size: width and height.
        found: names, and x0, y0, x1, y1.
    """
    wide, high = size
    parts = []
    for number, (name, (x0, y0, x1, y1)) in enumerate(found):
        colour = css(COLOURS[number % len(COLOURS)])
        thick = max(1.0, min(size) / 120)
        parts.append(
            f'<rect x="{x0:g}" y="{y0:g}" width="{x1 - x0:g}" height="{y1 - y0:g}" fill="none" stroke="{colour}" '
            f'stroke-width="{thick:g}"/><text x="{x0 + 2 * thick:g}" y="{y0 + min(size) / 14:g}" fill="{colour}" '
            f'font-size="{min(size) / 14:g}">{escaped(name)}</text>'
        )
    said = ", ".join(f"{name} at {', '.join(f'{side:g}' for side in sides)}" for name, sides in found) or "none yet"
    href = escaped(FILE.lstrip("/") + quote(str(Path(picture))))
    return (
        f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label="{escaped(f"Boxes: {said}")}">'
        f'<image href="{href}" width="{wide}" height="{high}"/>{"".join(parts)}</svg>'
    )


def error(sentence: str) -> str:
    """What is wrong with what was asked for."""
    return f'<p class="error" role="alert">{escaped(sentence)}</p>' if sentence else ""


def in_words_of_the_form(sentence: str, folder: Path) -> str:
    """A sentence whose flags are spelt as the labels of fields, and files of a run without its folder."""
    words = sentence.replace(f"{folder}/", "")
    return re.sub(r"`--([a-z][a-z-]*)`", lambda flag: f"“{flag[1].replace('-', ' ').capitalize()}”", words)


def escaped(text: object) -> str:
    """Words for HTML."""
    return html.escape(str(text), quote=True)
