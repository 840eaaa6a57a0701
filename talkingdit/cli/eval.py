# SPDX-License-Identifier: Apache-2.0
"""The verb `talkingdit eval`: judge generated videos region by region, against the truth and each other."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from talkingdit.cli.flags import Group, Values, read
from talkingdit.cli.messages import warn
from talkingdit.errors import UserError
from talkingdit.families.flag import Flag

if TYPE_CHECKING:
    from talkingdit.eval.job import Pair, SpokenText
    from talkingdit.eval.judge_video import JudgePlan
    from talkingdit.eval.run import Results
    from talkingdit.eval.win_rate import Judge

COMMAND = "talkingdit eval"
REPORT, WIN_RATES, LOCK = "report.html", "win_rates.json", ".eval.lock"
ABOUT = "Judge videos region by region, with and without true videos; run again, it goes on where it was stopped."


def read_named(text: str) -> tuple[str, Path]:
    """NAME=PATH, or a path, which is called as its last part.

    Raises:
        ValueError: a part is empty.
    """
    name, sign, path = text.partition("=")
    if not sign:
        name, path = Path(text).name or "generated", text
    if not name or not path:
        raise ValueError(f"must be NAME=PATH, got {text!r}")
    return name, Path(path).expanduser()


NAMED = Flag("NAME=PATH", read=read_named, many=True)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What is judged, and how."""

    generated: Annotated[tuple[tuple[str, Path], ...], NAMED] = ()
    """folder of videos (or a video) of a system; may be given again"""
    truth: Annotated[Path | None, Flag("DIR")] = None
    """true videos of the same names"""
    out: Annotated[Path | None, Flag("DIR", also=("-o",))] = None
    """folder of results"""
    protocol: Literal["jwb", "jwb-compat"] = "jwb"
    """corrected formulas, or those of the published program"""
    metrics: Annotated[str | None, Flag("LIST")] = None
    """names, with commas between (default: all; see --list)"""
    regions: Annotated[str, Flag("LIST")] = "whole,face,hands"
    """of whole,face,hands,left_hand,right_hand,body"""
    backbone: Annotated[tuple[tuple[str, Path], ...], Flag("SLOT=PATH", read=read_named, many=True)] = ()
    """network of a slot (see --list); may be given again"""
    texts: Annotated[Path | None, Flag("FILE")] = None
    """what is said: .csv or .jsonl with name, text, category"""
    baseline: Annotated[str | None, Flag("NAME")] = None
    """system that others are compared with (default: the first)"""
    judge: Annotated[str | None, Flag("COMMAND")] = None
    """program that prints 1, 2 or 0 for FIRST SECOND TEXT: win rates"""
    finder: Annotated[str, Flag("NAME")] = "real"
    """of people: real, or drawn for the drawn world"""
    workers: Annotated[int, Flag("N")] = 1
    """processes"""
    calibrate: bool = False
    """instead: plant faults in drawn clips and show what metrics make of them"""
    list: bool = False
    """say what can be measured here and what is missing, and stop"""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"eval: workers must be at least 1, got {self.workers}")


def eval(argv: Sequence[str]) -> None:
    """Carry out the verb.

    Raises:
        UserError: something is wrong with the command line, a file or a network.
        KeyboardInterrupt: with a sentence about what is kept.
        SystemExit: after the help.
    """
    values = read(COMMAND, ABOUT, [Group(Flags)], argv)
    values.refuse_unknown()
    flags = values.make(Flags)
    if flags.calibrate:
        _calibrate(flags, values)
        return
    if not flags.list:
        _check(flags, values)
    plan = _plan(flags, values)
    if flags.list:
        sys.stdout.write(_listed(plan))
        return
    from talkingdit.eval.job import pairs_of, read_texts, texts_aside
    from talkingdit.eval.win_rate import command_judge
    from talkingdit.lock import RunLock

    assert flags.out is not None
    _check_results(flags)
    judge = None if flags.judge is None else command_judge(flags.judge)
    texts: dict[str, SpokenText] = {} if flags.texts is None else read_texts(flags.texts)
    pairs = pairs_of(dict(flags.generated), flags.truth, texts)
    for line in [] if flags.texts is None else texts_aside(pairs, texts):
        warn(f"eval: --texts {str(flags.texts)!r}: {line}")
    with _told(flags.out):
        flags.out.mkdir(parents=True, exist_ok=True)
        with RunLock(flags.out / LOCK, flags.out, COMMAND):
            results = _run(flags, pairs, plan)
            _write(flags, results, pairs, judge)


@contextmanager
def _told(out: Path | None) -> Iterator[None]:
    """Raises: UserError: the folder of results cannot be written to."""
    try:
        yield
    except OSError as error:
        raise UserError(f"eval: results cannot be written to {out} ({error.strerror or error}).") from None


def _calibrate(flags: Flags, values: Values) -> None:
    """Write calibration.json and calibration.svg."""
    import dataclasses
    import json

    if flags.out is None:
        values.refuse("the following arguments are required: --out/-o")
    from talkingdit.atomic import write_whole
    from talkingdit.eval.calibration import calibrate, figure
    from talkingdit.lock import RunLock

    with _told(flags.out):
        flags.out.mkdir(parents=True, exist_ok=True)
        with RunLock(flags.out / LOCK, flags.out, COMMAND):
            curves = calibrate()
            rows = [dataclasses.asdict(one) | {"ordered": one.ordered} for one in curves]
            write_whole(flags.out / "calibration.json", (json.dumps(rows, indent=1) + "\n").encode())
            write_whole(flags.out / "calibration.svg", figure(curves).encode())
    wrong = [one for one in curves if not one.ordered]
    told = "; ".join(f"{one.metric} does not follow {one.fault}" for one in wrong)
    sys.stdout.write(f"{flags.out / 'calibration.svg'}: {len(curves) - len(wrong)} of {len(curves)} in order\n")
    if told:
        raise UserError(f"eval: {told}.")


def _check(flags: Flags, values: Values) -> None:
    lacking = [name for name in ("generated", "out") if not getattr(flags, name)]
    if lacking:
        values.refuse(f"the following arguments are required: {', '.join('--' + name for name in lacking)}")
    from talkingdit.eval.job import TRUTH

    names, slots = [name for name, _ in flags.generated], [name for name, _ in flags.backbone]
    if twice := {name for name in names if names.count(name) > 1}:
        values.refuse(f"argument --generated: {min(twice)!r} is the name of two systems")
    if TRUTH in names:
        values.refuse(f"argument --generated: {TRUTH!r} is the name of the true videos")
    if twice := {name for name in slots if slots.count(name) > 1}:
        values.refuse(f"argument --backbone: {min(twice)!r} is given twice")
    if flags.baseline is not None and flags.baseline not in names:
        values.refuse(f"argument --baseline: expected one of {', '.join(names)}, got {flags.baseline!r}")
    if flags.judge is not None and len(names) < 2:
        values.refuse("argument --judge: needs two systems, got one")
    assert flags.out is not None
    if flags.out.exists() and not flags.out.is_dir():
        values.refuse(f"argument --out/-o: expected a folder, got the file {str(flags.out)!r}")


def _check_results(flags: Flags) -> None:
    """Raises: UserError: results would be written over what is read, or over files of another origin."""
    from talkingdit.eval.run import KEPT
    from talkingdit.eval.tables import RESULTS
    from talkingdit.media.targets import check_apart, check_folder

    assert flags.out is not None
    given = {f"--generated {name}": path for name, path in flags.generated}
    given |= {f"--backbone {name}": path for name, path in flags.backbone}
    read = {**given, "--truth": flags.truth, "--texts": flags.texts}
    check_folder(flags.out, (REPORT, *RESULTS, WIN_RATES), KEPT, read)
    check_apart({"the results' folder": flags.out / KEPT}, read)


def _plan(flags: Flags, values: Values) -> JudgePlan:
    from talkingdit.eval.found import REGIONS
    from talkingdit.eval.judge_video import JudgePlan
    from talkingdit.eval.protocol import metrics_of

    known = metrics_of(flags.protocol)
    metrics = tuple(known) if flags.metrics is None else _some(flags.metrics, tuple(known), "--metrics", values)
    regions = _some(flags.regions, REGIONS, "--regions", values)
    return JudgePlan(metrics, regions, dict(flags.backbone), flags.finder, flags.protocol)


def _some(text: str, known: tuple[str, ...], flag: str, values: Values) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        values.refuse(f"argument {flag}: expected some of {', '.join(known)}, got {(wrong or [text])[0]!r}")
    return names


def _listed(plan: JudgePlan) -> str:
    """Metrics with their regions, and what is missing, as text."""
    from talkingdit.eval.judge_video import Tools

    tools = Tools.of(plan)
    lines = []
    for metric in tools.metrics:
        missing = metric.missing(tools.backbones)
        regions = [region for of, region in tools.possible() if of is metric]
        state = f"not available; {missing}" if missing else f"{', '.join(regions) or 'in none of these regions'}"
        lines.append(f"{metric.full_name(tools.backbones)}: {metric.about}\n    {state}")
    absent = [f"region {region}: not available; {line}" for region, line in tools.finder.missing().items()]
    return "\n".join(lines + absent) + "\n"


def _run(flags: Flags, pairs: list[Pair], plan: JudgePlan) -> Results:
    from tqdm import tqdm

    from talkingdit.eval.run import Verdict, run

    assert flags.out is not None
    broken = 0
    try:
        with tqdm(total=len(pairs), unit="video", desc="judging", disable=None) as bar:

            def report(verdict: Verdict) -> None:
                nonlocal broken
                broken += bool(verdict.error)
                bar.set_postfix(broken=broken, refresh=False)
                bar.update()

            return run(pairs, plan, flags.out, flags.workers, report)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; what was judged is kept in {flags.out}; the same command goes on there."
        ) from None


def _write(flags: Flags, results: Results, pairs: list[Pair], judge: Judge | None) -> None:
    from talkingdit.atomic import write_whole
    from talkingdit.eval.report import report
    from talkingdit.eval.run import KEPT
    from talkingdit.eval.summary import comparisons, rows_of
    from talkingdit.eval.tables import write_all
    from talkingdit.eval.win_rate import remembering

    assert flags.out is not None
    rows = rows_of(results)
    baseline = flags.baseline or flags.generated[0][0]
    compared = comparisons(results, rows, baseline)
    write_all(flags.out, results, rows, compared, flags.protocol)
    page = flags.out / REPORT
    write_whole(page, report(results, rows, compared, flags.protocol).encode(errors="backslashreplace"))
    for name, line in results.not_available.items():
        warn(f"eval: {name} is not available; {line}.")
    broken = [verdict for verdict in results.verdicts if verdict.error]
    for sentence in dict.fromkeys(verdict.error for verdict in broken):  # a true video may be of several pairs
        warn(sentence)
    for line in results.remarks():
        warn(f"eval: {line}")
    if len(broken) == len(results.verdicts):
        raise UserError("eval: no video could be judged.")
    (flags.out / WIN_RATES).unlink(missing_ok=True)  # of an earlier run, whose videos may have been others
    if judge is not None:
        _win_rates(flags, pairs, baseline, remembering(judge, str(flags.judge), flags.out / KEPT))
    told = f"; {len(broken)} could not be read" if broken else ""
    if known := sum(verdict.known for verdict in results.verdicts):
        told = f", {known} of them before{told}"
    sys.stdout.write(f"{page}: {len(results.verdicts) - len(broken)} videos judged{told}\n")
    if lost := results.lost():
        raise UserError(f"eval: {', '.join(lost)} failed for every video, as told above; all else is in {page}.")


def _win_rates(flags: Flags, pairs: list[Pair], baseline: str, judge: Judge) -> None:
    """Write win_rates.json and print a line for each system."""
    import json

    from talkingdit.atomic import write_whole
    from talkingdit.eval.win_rate import win_rate

    assert flags.out is not None
    base = {pair.name: pair for pair in pairs if pair.system == baseline}
    out = {}
    for system, _ in flags.generated:
        contests = [
            (pair.gen, base[pair.name].gen, pair.text.words)
            for pair in pairs
            if pair.system == system and pair.name in base
        ]
        if system == baseline or not contests:
            continue
        found = win_rate(contests, judge)
        out[system] = {"rate": found.rate, "low": found.low, "high": found.high, "n": len(contests)}
        sys.stdout.write(f"win rate of {system} against {baseline}: {100 * found.rate:.1f} % of {len(contests)}\n")
    content = json.dumps({"baseline": baseline, "systems": out}, indent=1) + "\n"
    write_whole(flags.out / WIN_RATES, content.encode())
