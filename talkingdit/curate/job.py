# SPDX-License-Identifier: Apache-2.0
"""The whole of it: find the videos, watch those that are missing, decide, and write what comes out."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from talkingdit.atomic import write_whole
from talkingdit.curate.decide import Decisions, decide
from talkingdit.curate.local import Task, watch_here, watch_in_processes
from talkingdit.curate.log import FIGURES, Log
from talkingdit.curate.measure import Record, Video
from talkingdit.curate.report import REPORT, write_report
from talkingdit.curate.settings import LIMITS, CurateSettings
from talkingdit.curate.slots import MODELS, SLOTS, check_models, empty_slots, identify_models, note_models
from talkingdit.curate.stages import stage_of
from talkingdit.curate.write import MANIFEST, TABLE, write_manifest, write_table
from talkingdit.data.manifest import read_manifest
from talkingdit.errors import UserError
from talkingdit.lock import RunLock
from talkingdit.media.kinds import IMAGES, VIDEOS
from talkingdit.media.targets import check_folder

LOCK, BROKEN = ".curate.lock", "broken.jsonl"


@dataclass(frozen=True)
class CurateJob:
    """What is to be done.

    Args:
        source: a folder of videos, looked through with all folders below it, or a manifest.
        folder: of the results.
        settings: what counts.
        workers: processes.
        ray: run on Ray: "" starts one here, an address joins a cluster, None does without.
        gpus: cards for stages that want one, on Ray.
        again: watch broken videos again.
    """

    source: Path
    folder: Path
    settings: CurateSettings
    workers: int = 1
    ray: str | None = None
    gpus: float = 0.0
    again: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Args:
        decisions: about all clips.
        videos, broken: how many there are, and how many of them could not be watched.
        lacking: stages that did not measure, and what they need.
    """

    decisions: Decisions
    videos: int
    broken: int
    lacking: dict[str, str]


def find_videos(source: Path) -> list[Video]:
    """The videos of a folder or a manifest, with names that do not depend on where the folder is.

    Raises:
        UserError: there is none.
    """
    if source.is_dir():
        files = sorted(
            p for p in source.rglob("*") if p.suffix.lower() in VIDEOS and p.is_file() and not p.name.startswith(".")
        )
        if not files:
            raise UserError(f"curate: {source}: expected videos ({', '.join(VIDEOS[:4])}, ...), found none.")
        return [Video(_key(path.relative_to(source)), path.resolve()) for path in files]
    if not source.exists():
        raise UserError(f"curate: {source}: expected a folder of videos or a manifest, found nothing there.")
    entries = [entry for entry in read_manifest(source).entries if entry.video.suffix.lower() not in IMAGES]
    if not entries:
        raise UserError(f"curate: {source}: expected videos, found images only.")
    return [Video(e.key, Path(os.path.abspath(e.video)), e.start, e.end, e.caption) for e in entries]


def _key(path: Path) -> str:
    """A name that is good for files and manifests, and differs where paths do."""
    import hashlib
    import re

    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    stem = re.sub(r"\W+", "_", str(path.with_suffix("")), flags=re.ASCII).strip("_")
    return f"{stem[-60:]}-{digest}" if stem else digest


def curate(job: CurateJob, started: Callable[[int, int], None], watched: Callable[[Record], None]) -> Outcome:
    """Carry out the job.

    Args:
        job: what to do.
        started: told how many videos there are, and how many of them are still to be watched.
        watched: told of every video that was.

    Raises:
        UserError: something is wrong with the source, the settings or the folder.
    """
    check_folder(job.folder, (FIGURES, MANIFEST, TABLE, BROKEN, REPORT, MODELS), FIGURES, {"videos": job.source})
    videos = find_videos(job.source)
    for name in job.settings.watch.stages:
        stage_of(name)
    check_models(job.settings.watch)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(job.folder / LOCK, job.folder, "talkingdit curate")
    except OSError as error:
        raise UserError(f"curate: {job.folder}: cannot be written to ({error.strerror or error}).") from None
    with lock:
        given = identify_models(job.settings.watch, job.folder / MODELS)
        task = Task(job.settings.watch, job.folder.resolve(), job.settings.write, given)
        log = Log(job.folder)
        missing = log.missing(videos, task.versions, job.again)
        started(len(videos), len(missing))

        def note(record: Record) -> None:
            log.add(record)
            if given and not (job.folder / MODELS).exists():
                note_models(job.settings.watch, given, job.folder / MODELS)
            watched(record)

        try:
            if missing:
                _watch(job, task, missing, note)
            return _finish(job, task, videos, log)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise UserError(
                    f"curate: {job.folder}: {error.strerror}; what is done is kept, the same command goes on there."
                ) from error
            raise


def _watch(job: CurateJob, task: Task, missing: list[Video], note: Callable[[Record], None]) -> None:
    if job.ray is not None:
        from talkingdit.curate.on_ray import RayCluster, watch_on_ray

        watch_on_ray(task, missing, RayCluster(job.ray, job.workers, job.gpus), note)
    elif job.workers == 1:
        watch_here(task, missing, note)
    else:
        watch_in_processes(task, missing, job.workers, note)


def _finish(job: CurateJob, task: Task, videos: list[Video], log: Log) -> Outcome:
    """Decide, and write what comes out, from what is noted."""
    records = list(log.records(videos, task.versions))
    decisions = decide(records, job.settings)
    broken = [record for record in records if record["error"]]
    lacking: dict[str, str] = {}
    for record in records:
        lacking.update({name: line for name, line in record["lacking"].items() if name not in SLOTS})
    lacking.update(empty_slots(job.settings.watch, job.settings.write.anchors))
    lacking.update(_unknown_limits(decisions, job.settings))
    lines = [json.dumps({"id": r["key"], "video": r["path"], "reason": r["error"]}) + "\n" for r in broken]
    write_whole(job.folder / BROKEN, "".join(lines).encode())
    write_manifest(job.folder, decisions, videos, job.settings.write)
    write_table(job.folder, decisions)
    note_models(job.settings.watch, task.given, job.folder / MODELS)
    outcome = Outcome(decisions, len(videos), len(broken), lacking)
    write_report(job.folder, decisions, len(videos), broken, lacking)
    return outcome


def _unknown_limits(decisions: Decisions, settings: CurateSettings) -> dict[str, str]:
    """Limits beside the usual ones on figures that no clip has, as a wrong name has them."""
    names = {step.name for step in decisions.funnel if not step.limit.off and step.unknown == len(decisions.clips)}
    sentence = "no stage gives a figure of this name, which a limit is on."
    return {name: sentence for name in sorted(names - set(LIMITS)) if decisions.clips}


__all__ = ["REPORT", "CurateJob", "Outcome", "curate", "find_videos"]
