# SPDX-License-Identifier: Apache-2.0
"""Judge all videos of a job, in several processes, and keep what is known of each, so that nothing is measured twice.

What is known of a video lies in `<out>/videos/`, in a file whose name is the digest of the bytes of the video, of its
truth, of the text and of the finder: a changed file is judged anew, a renamed one is not. A metric whose version or
network changed is measured again, all others are kept.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from talkingdit.atomic import write_whole
from talkingdit.errors import UserError
from talkingdit.eval.job import Pair
from talkingdit.eval.judge_video import Judged, JudgePlan, Tools, judge, key_of
from talkingdit.eval.parts import PART_SECONDS, is_long
from talkingdit.media.checks import digest_of

KEPT = "videos"  # folder of what is known


@dataclass(frozen=True)
class Verdict:
    """What is known of one video, or why nothing is; and whether an earlier run had found all of it."""

    pair: Pair
    judged: Judged
    error: str = ""
    known: bool = False


@dataclass
class Results:
    """Everything that reports are made of.

    Attributes:
        verdicts: one for every pair, in order.
        tools: metrics and networks.
        not_available: what was not measured, with the line that says what to give.
    """

    verdicts: list[Verdict]
    tools: Tools
    not_available: dict[str, str] = field(default_factory=dict)

    @property
    def systems(self) -> list[str]:
        """Names of systems, in order."""
        return list(dict.fromkeys(verdict.pair.system for verdict in self.verdicts))


def run(
    pairs: Sequence[Pair],
    plan: JudgePlan,
    out: Path,
    workers: int = 1,
    report: Callable[[Verdict], None] = lambda verdict: None,
) -> Results:
    """Judge all pairs; what an earlier run found is taken from its files.

    Args:
        pairs: what to judge.
        plan: how.
        out: folder in which `videos/` is kept.
        workers: processes; 1 works in this one.
        report: called after every video.

    Raises:
        UserError: the plan names something that is not there, or a worker died; what is finished is kept.
    """
    tools = Tools.of(plan)
    keep = out / KEPT
    keep.mkdir(parents=True, exist_ok=True)
    verdicts: list[Verdict | None] = [None] * len(pairs)

    def done(i: int, verdict: Verdict) -> None:
        verdicts[i] = verdict
        report(verdict)

    if workers <= 1 or len(pairs) <= 1:
        for i in _order(pairs):
            done(i, _one(pairs[i], tools, keep))
    else:
        _in_processes(pairs, plan, keep, workers, done)
    return Results([verdict for verdict in verdicts if verdict is not None], tools, tools.not_available())


def _order(pairs: Sequence[Pair]) -> list[int]:
    """By name, so that videos of one truth follow each other and share what was found in it."""
    return sorted(range(len(pairs)), key=lambda i: pairs[i].name)


def _in_processes(
    pairs: Sequence[Pair], plan: JudgePlan, keep: Path, workers: int, done: Callable[[int, Verdict], None]
) -> None:
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _prepare, (plan, threads))
    try:
        waiting = {pool.submit(_in_worker, pairs[i], keep): i for i in _order(pairs)}
        for future in concurrent.futures.as_completed(waiting):
            done(waiting[future], future.result())
    except BrokenProcessPool:
        raise UserError(
            f"eval: a worker process died (is there enough memory for {workers} of them?); "
            f"what was finished is kept in {keep}, and the same command goes on there."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_TOOLS: list[Tools] = []  # of a worker process


def _prepare(plan: JudgePlan, threads: int) -> None:
    import cv2
    import torch

    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    _TOOLS[:] = [Tools.of(plan)]


def _in_worker(pair: Pair, keep: Path) -> Verdict:
    return _one(pair, _TOOLS[0], keep)


def _one(pair: Pair, tools: Tools, keep: Path) -> Verdict:
    """What is known of a video, measured as far as needed."""
    try:
        file = keep / f"{identity_of(pair, tools)}.json"
        versions = {key_of(metric, region, tools): metric.key(tools.backbones) for metric, region in tools.possible()}
        known = load(file, versions)
        have = set(known.values) | set(known.features)
        if known.facts and have >= set(versions):
            return Verdict(pair, known, known=True)
        found = judge(pair, tools, tuple(have))
        judged = Judged(known.values | found.values, known.features | found.features, found.facts, found.sheet)
        save(file, judged, versions)
    except UserError as error:
        return Verdict(pair, Judged(), str(error))
    return Verdict(pair, judged)


def identity_of(pair: Pair, tools: Tools) -> str:
    """What the values of a pair depend on besides metrics: a digest of 32 hexadecimal digits."""
    parts = [
        digest_of(pair.gen),
        "" if pair.truth is None else digest_of(pair.truth),
        pair.text.words,
        f"{tools.finder.name}/{tools.finder.version}",
    ]
    if is_long(pair.gen):
        parts.append(f"parts of {PART_SECONDS:g} s")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def save(file: Path, judged: Judged, versions: Mapping[str, str]) -> None:
    """Keep what is known; features lie beside it, and come first, so that a file of values has its features."""
    from safetensors.numpy import save as packed

    if judged.features:
        arrays = {f"{key}#{i}": np.ascontiguousarray(both[i]) for key, both in judged.features.items() for i in (0, 1)}
        write_whole(file.with_suffix(".safetensors"), packed(arrays))  # save_file has a temporary file of its own
    content = {
        "values": judged.values,
        "features": sorted(judged.features),
        "facts": judged.facts,
        "sheet": judged.sheet,
        "versions": {key: versions.get(key, "") for key in [*judged.values, *judged.features]},
    }
    write_whole(file, json.dumps(plain(content), allow_nan=False).encode())


def load(file: Path, versions: Mapping[str, str]) -> Judged:
    """What was kept and still holds: values whose metric has the version it had. Empty where nothing was."""
    try:
        content = json.loads(file.read_text("utf-8"))
        kept = content["versions"]
        fresh = {key for key, version in versions.items() if kept.get(key) == version}
        values = {key: _number(value) for key, value in content["values"].items() if key in fresh}
        features = _features(file.with_suffix(".safetensors"), [key for key in content["features"] if key in fresh])
        return Judged(values, features, content["facts"], content["sheet"])
    except (OSError, ValueError, KeyError, TypeError):
        return Judged()


def _features(file: Path, keys: Sequence[str]) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    if not keys:
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(file)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    return {key: (arrays[f"{key}#0"], arrays[f"{key}#1"]) for key in keys}


def plain(content: Any) -> Any:
    """The same for JSON, which has no infinity: "inf"."""
    if isinstance(content, Mapping):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    if isinstance(content, float) and not np.isfinite(content):
        return str(content)
    return content


def _number(value: dict[str, Any]) -> dict[str, Any]:
    return value | {"value": float(value["value"])} if "value" in value else value
