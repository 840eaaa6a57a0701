# SPDX-License-Identifier: Apache-2.0
"""Tables and a chart of the JSON files of a results folder: every row in docs/benchmarks.md, a few in the README."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import cases, chart
from bench.record import adding_to, write
from bench.shapes import TOKENS
from talkingdit.ops._matrix_kernels import ProductRequest

BEGIN, END = "<!-- bench:start -->", "<!-- bench:end -->"
PAGE, FIGURE, README = Path("docs/benchmarks.md"), Path("docs/figures/benchmarks.png"), Path("README.md")
_HEAD = ("op", "shape", "dtype", "direction", "µs", "GB/s", "share of copy", "times faster than")
_BEST = "faster than the best"
_BLOCKS = ("block", "shape", "dtype", "direction", "µs", "times faster than")
_STEPS = ("what", "shape", "tokens", "µs", "official µs", "time", "peak memory", "official", "ratio", "moved", "ratio")
_WIDE_STREAM = " fp32 stream"  # behind the shapes of such rows of frame_linear
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_NOTE = (
    "Two figures are a fresh result and a preallocated one (`out=`). Bandwidth counts inputs and results once; the "
    "copy is `Tensor.copy_` of as many bytes in the same run. Factors compare fresh results. On a GPU `frame_linear` "
    "has the time of the kernel that is chosen by itself today, also where that run took another one."
)

Result = Mapping[str, Any]
Row = Mapping[str, Any]


# ---- results -------------------------------------------------------------------------------------------------------
def load(folder: Path) -> list[dict[str, Any]]:
    """Results of full runs, in order of file names.

    Raises:
        FileNotFoundError: there is none.
        ValueError: one was measured with changes that no commit has, so that nobody could measure it again.
    """
    found = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"), key=lambda path: path.stem)}
    full = {path: result for path, result in found.items() if "device" in result and not result.get("quick")}
    used = {path: result for path, result in full.items() if _of_ops(result)}
    if not used:
        raise FileNotFoundError(f"bench report: no results of full runs in {folder}: run `python -m bench all` first")
    for path, result in used.items():
        if result["commit"].endswith("-dirty"):
            raise ValueError(
                f"bench report: {path.name} was measured with uncommitted changes ({result['commit']}): commit them "
                f"and run `python -m bench {result['name']}` again"
            )
    results = _joined(list(used.values()))
    for result in results:
        if result["device"] != "cpu" and "rows" in result:
            result["rows"] = [_as_chosen(row) for row in result["rows"]]
    return results


def _as_chosen(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose time is that of the kernel that "auto" takes today, where all of them were timed in it.

    In the run itself "auto" may have taken another one, of which tables were filled afterwards.
    """
    if (kernel := _chosen(row)) is None:
        return row
    timed = {name: us for name, us in row["baselines"].items() if name in cases.OURS}
    if kernel not in timed or kernel == min(timed, key=lambda name: abs(timed[name] - row["median_us"])):
        return row
    us = timed[kernel]
    known = {key: value for key, value in row.items() if not key.startswith(("out_", "p20_", "p80_"))}
    shares = {"median_us": us, "gbps": row["bytes"] / us / 1e3, "share_of_copy": row["copy_us"] / us}
    return {**known, **shares, "baselines": {k: v for k, v in row["baselines"].items() if k != kernel}}


def _chosen(row: Row) -> str | None:
    """The kernel that "auto" takes for a row of frame_linear on a GPU that has all of them; None for other ops."""
    if row.get("op") != "frame_linear" or row["dtype"] != "bfloat16":
        return None
    name = row["shape"].removesuffix(_WIDE_STREAM)
    shape = next((shape for shape in TOKENS["cuda"] if shape.name == name), None)
    if shape is None:
        return None
    element = 4 if name != row["shape"] else 2
    sizes = shape.heads * shape.audio, shape.heads * shape.dim, element
    return "cutlass" if ProductRequest("frame_linear", "auto", *sizes, obstacle=None).cutlass() else "general"


def _of_ops(result: Result) -> bool:
    """Are its rows of ops, or its steps of blocks? Others are on pages of their own."""
    return any("op" in row and "baselines" in row for row in result.get("rows", ())) or any(
        "official_us" in step for step in result.get("steps", ()) if isinstance(step, Mapping)
    )


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


def _apart(result: Result) -> bool:
    return bool(result["name"].endswith("-compiled"))


def _key(result: Result, row: Row) -> tuple[str, ...]:
    return (result["device"], result["commit"], row["op"], row["shape"], row["dtype"], row["direction"])


def _groups(results: Sequence[Result]) -> list[list[Result]]:
    """Results of one device and setting stand together."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        key = (result["device"], result["machine"], str(result["threads"]), result["versions"]["torch"])
        groups.setdefault(key, []).append(result)
    return list(groups.values())


def _rows(group: Sequence[Result], block: bool) -> list[Row]:
    """Of ops, or of whole blocks."""
    blocks = [name for name in cases.names() if cases.load(name).block]
    return [
        row
        for result in group
        for row in result.get("rows", ())
        if (result["name"].removesuffix("-compiled").removesuffix("-more") in blocks) == block
    ]


def _headlines(group: Sequence[Result]) -> list[Row]:
    """A row for each op that has one in the README: of its first shape, forward, in bfloat16."""
    chosen = []
    for name in cases.names():
        headline = cases.load(name).headline
        rows = [row for row in _rows(group, block=False) if row["op"] == headline and row["dtype"] == "bfloat16"]
        chosen += [row for row in rows if row["direction"] != "backward"][:1]
    return chosen


# ---- Markdown ------------------------------------------------------------------------------------------------------
def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def _pair(row: Row, fresh: str, warm: str, show: Callable[[float], str] = _number) -> str:
    return " / ".join(show(row[key]) for key in (fresh, warm) if key in row)


def _best(row: Row) -> str:
    others = {name: us for name, us in row["baselines"].items() if name not in cases.OURS}
    if not others:
        return "-"
    name = min(others, key=others.__getitem__)
    return f"{others[name] / row['median_us']:.2f} ({name})"


def _factors(row: Row, digits: int = 1) -> str:
    return ", ".join(f"{name} {us / row['median_us']:.{digits}f}" for name, us in row["baselines"].items())


def _what(row: Row) -> tuple[str, ...]:
    return (f"`{row['op']}`", row["shape"], _DTYPES.get(row["dtype"], row["dtype"]), row["direction"])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(head: Sequence[str], numbers: range, rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a table whose columns ``numbers`` are set to the right, after an empty line; nothing without rows."""
    lines = [_line(row) for row in rows]
    marks = ["---:" if i in numbers else "---" for i in range(len(head))]
    return ["", _line(head), "|" + "|".join(marks) + "|", *lines] if lines else []


def _numbers(row: Row) -> tuple[str, ...]:
    times, rates = _pair(row, "median_us", "out_us"), _pair(row, "gbps", "out_gbps")
    return (*_what(row), times, rates, _pair(row, "share_of_copy", "out_share_of_copy", "{:.0%}".format))


def _op_table(rows: Sequence[Row], best: bool) -> list[str]:
    head = (*_HEAD[:-1], _BEST, _HEAD[-1]) if best else _HEAD
    cells = ((*_numbers(row), *((_best(row),) if best else ()), _factors(row)) for row in rows)
    return _table(head, range(4, len(head) - 1), cells)


def _block_table(rows: Sequence[Row]) -> list[str]:
    cells = ((*_what(row), _number(row["median_us"]), _factors(row, digits=2)) for row in rows)
    return _table(_BLOCKS, range(4, 5), cells)


def _step(name: str, step: Mapping[str, Any]) -> tuple[str, ...]:
    moved = [f"{step['moved_bytes'] / 1e9:.2f} GB", f"{step['moved_ratio']:.2f}"] if "moved_bytes" in step else ["", ""]
    return (
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


def _step_table(group: Sequence[Result]) -> list[str]:
    steps = (_step(result["name"], step) for result in group for step in result.get("steps", ()))
    return _table(_STEPS, range(2, len(_STEPS)), steps)


def _spread(values: Iterable[float]) -> str:
    low, *_, high = sorted([*(values := list(values)), *values])
    return _number(low) if _number(low) == _number(high) else f"{_number(low)} to {_number(high)}"


def _place(group: Sequence[Result]) -> str:
    """Where a group was measured."""
    first = group[0]
    place = f"{first['machine']}, {first['threads']} threads" if first["device"] == "cpu" else ""
    place = place or f"{first['device']} ({first['machine']})"
    commits = ", ".join(dict.fromkeys(result["commit"] for result in group))
    bandwidths = [result["copy_gbps"] for result in group if result.get("rows")]
    copy = f"copy {_spread(bandwidths)} GB/s; " if bandwidths else ""
    return f"{place}; torch {first['versions']['torch']}; {copy}commit {commits}."


def table(results: Sequence[Result]) -> str:
    """For each device a table of ops, one of whole blocks and one of steps, where they were measured."""
    parts = []
    for group in _groups(results):
        ops = _op_table(_rows(group, block=False), best=group[0]["device"] != "cpu")
        lines = [_place(group), *ops, *_block_table(_rows(group, block=True)), *_step_table(group)]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, _NOTE])


def short_table(results: Sequence[Result]) -> str:
    """The rows of the README: a GPU's, where there are some."""
    group = _shown(results)
    head = (*_HEAD[:-1], _BEST)
    cells = ((*_numbers(row), _best(row)) for row in _headlines(group))
    return "\n".join([_place(group), *_table(head, range(4, len(head)), cells)])


def _shown(results: Sequence[Result]) -> list[Result]:
    """The group of results that the README and the chart show."""
    groups = _groups(results)
    return next((group for group in groups if group[0]["device"] != "cpu"), groups[0])


# ---- files ---------------------------------------------------------------------------------------------------------
def insert(document: Path, content: str) -> None:
    """Replaces what stands between the markers.

    Raises:
        ValueError: the markers are not there, each once and in order.
    """
    write(document, _inserted(document, content))


def _inserted(document: Path, content: str) -> str:
    text = document.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"bench report: {document.name} must hold the markers {BEGIN} and {END}, each once, in order")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def publish(results: Sequence[Result], root: Path) -> None:
    """Writes every row into docs/benchmarks.md, the chart, and a few rows with the chart into README.md.

    README and chart show a GPU's results where there are some.

    Raises:
        ValueError: a document lacks the markers; nothing is written then.
    """
    alt = "Bars: how many times faster each op is than the fastest of its baselines"
    short = f"{short_table(results)}\n\n![{alt}]({FIGURE})\n\nEvery row is in [{PAGE}]({PAGE})."
    pages = {root / PAGE: table(results), root / README: short}
    with ExitStack() as held:
        for document in pages:
            held.enter_context(adding_to(document))
        _publish(results, root, {document: _inserted(document, content) for document, content in pages.items()})


def _publish(results: Sequence[Result], root: Path, pages: Mapping[Path, str]) -> None:
    """Write pages and chart, while nobody else changes the pages."""
    group = _shown(results)
    chart.save(root / FIGURE, chart.draw(_rows(group, block=False), _place(group)))
    for document, text in pages.items():
        write(document, text)
