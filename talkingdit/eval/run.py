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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from talkingdit.atomic import write_whole
from talkingdit.errors import UserError
from talkingdit.eval.clip import is_even
from talkingdit.eval.job import Pair, lacking
from talkingdit.eval.judge_video import Judged, JudgePlan, Tools, judge, key_of
from talkingdit.eval.parts import PART_SECONDS, is_long
from talkingdit.media.checks import digest_of, reason_of

KEPT = "videos"  # folder of what is known
UNEQUAL = {  # facts of a video, and what they mean for its values
    "shorter": "end before nine tenths of their true ones, whose rest is not judged",
    "stretched": "have other proportions than their true ones, and whole frames are stretched for comparison",
}


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

    def remarks(self) -> list[str]:
        """What a reader of the tables must know besides: one sentence each."""
        return self.lacking() + self.unequal() + self.failures()

    def lacking(self) -> list[str]:
        """A sentence for each system that has not got all videos."""
        found = lacking([verdict.pair for verdict in self.verdicts])
        return [
            f"{system} has no video called {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} "
            f"({len(names)} missing); its values are of the others."
            for system, names in found.items()
        ]

    def unequal(self) -> list[str]:
        """A sentence for each system with videos whose length or proportions are not those of their truth."""
        told = []
        for system in self.systems:
            facts = [(v.pair.name, v.judged.facts) for v in self.verdicts if v.pair.system == system]
            for fact, what in UNEQUAL.items():
                if names := [name for name, its in facts if its.get(fact)]:
                    told.append(f"{len(names)} of {len(facts)} videos of {system} {what}; the first is {names[0]}.")
        return told

    def lost(self) -> list[str]:
        """Rows that went wrong for every video that could be read."""
        read = [verdict for verdict in self.verdicts if not verdict.error]
        return [key for key in (read[0].judged.failed if read else ()) if all(key in v.judged.failed for v in read)]

    def failures(self) -> list[str]:
        """A sentence for each row in which something went wrong: for how many videos, and what for the first."""
        of: dict[str, list[tuple[Pair, str]]] = {}
        for verdict in self.verdicts:
            for key, told in verdict.judged.failed.items():
                of.setdefault(key, []).append((verdict.pair, told))
        return [
            f"{key} failed for {len(found)} of {len(self.verdicts)} videos, the first being "
            f"{found[0][0].gen} ({found[0][1].rstrip('.')})."
            for key, found in of.items()
        ]


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
        kept = load(file)
        known = kept.of(versions)
        have = set(known.values) | set(known.features)
        if known.facts and have >= set(versions):
            return Verdict(pair, known, known=True)
        found = judge(pair, tools, tuple(have))
    except UserError as error:
        return Verdict(pair, Judged(), str(error))
    except OSError as error:  # it went away, or its disk did
        return Verdict(pair, Judged(), f"video {str(pair.gen)!r} cannot be read ({reason_of(error)}).")
    judged = Judged(known.values | found.values, known.features | found.features, found.facts, found.sheet)
    if "people" in kept.judged.facts and "people" not in found.facts:  # this run did not have to look for any
        judged = replace(judged, facts=kept.judged.facts, sheet=kept.judged.sheet)
    kept.add(judged, versions).save(file)
    failed = {key: {"missing": f"failed: {told}"} for key, told in found.failed.items()}
    return Verdict(pair, replace(judged, values=judged.values | failed, failed=found.failed))


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
    if not all(is_even(path) for path in (pair.gen, pair.truth) if path is not None):
        parts.append("at even times")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class KeptVideo:
    """What a file holds of a video: also values of metrics and regions that nobody asks for at present.

    Attributes:
        judged: all of it.
        versions: of metrics by key, when they were measured.
    """

    judged: Judged = field(default_factory=Judged)
    versions: Mapping[str, str] = field(default_factory=dict)

    def of(self, versions: Mapping[str, str]) -> Judged:
        """What still holds of these metrics: values whose metric has the version it had."""
        fresh = {key for key, version in versions.items() if self.versions.get(key) == version}
        values = {key: value for key, value in self.judged.values.items() if key in fresh}
        features = {key: both for key, both in self.judged.features.items() if key in fresh}
        return replace(self.judged, values=values, features=features)

    def add(self, judged: Judged, versions: Mapping[str, str]) -> KeptVideo:
        """The same with what was found anew in the place of what is known of the same metrics."""
        old = [key for key in self.versions if key not in versions]
        values = {key: value for key, value in self.judged.values.items() if key in old}
        features = {key: both for key, both in self.judged.features.items() if key in old}
        both = replace(judged, values=values | judged.values, features=features | judged.features)
        known = dict(self.versions) | dict(versions)
        return KeptVideo(both, {key: known[key] for key in [*both.values, *both.features]})

    def save(self, file: Path) -> None:
        """Write it; features lie beside it and come first, and their digest says that they belong to these values."""
        from safetensors.numpy import save as packed

        judged, digest = self.judged, ""
        if judged.features:
            both = judged.features.items()
            data = packed({f"{key}#{i}": np.ascontiguousarray(of[i]) for key, of in both for i in (0, 1)})
            digest = hashlib.sha256(data).hexdigest()
            write_whole(file.with_suffix(".safetensors"), data)  # save_file has a temporary file of its own
        content = {
            "values": judged.values,
            "features": sorted(judged.features),
            "features_digest": digest,
            "facts": judged.facts,
            "sheet": judged.sheet,
            "versions": self.versions,
        }
        write_whole(file, json.dumps(plain(content), allow_nan=False).encode())


def load(file: Path) -> KeptVideo:
    """What a file holds; nothing where it is damaged, or where the features beside it are of another run."""
    try:
        content = json.loads(file.read_text("utf-8"))
        values = {key: _number(value) for key, value in content["values"].items()}
        features = _features(file.with_suffix(".safetensors"), content["features"], content["features_digest"])
        return KeptVideo(Judged(values, features, content["facts"], content["sheet"]), content["versions"])
    except (OSError, ValueError, KeyError, TypeError):
        return KeptVideo()


def _features(
    file: Path, keys: Sequence[str], digest: str
) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    if not keys:
        return {}
    from safetensors.numpy import load as unpacked

    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{file}: of another run")
    arrays = unpacked(data)
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
