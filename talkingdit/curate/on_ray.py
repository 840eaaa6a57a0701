# SPDX-License-Identifier: Apache-2.0
"""Watch videos on Ray: the same stages, in actors on this machine or on a cluster.

What Ray Data does that shapes this file (2.60, as run): a block whose worker dies is done again, without end, and not
by rows; rows come back in any order; readers and actors share processors, and wait for each other without a word;
`init` takes SIGTERM over; and an actor's libraries see one thread. So every block is one video; what a video writes has
names of its own; the driver notes each video once; a video that keeps killing its workers is given up after some tries,
which are counted in files; a processor is left for reading; and the handler is put back.

Stages that want a card run behind the others, in actors of their own, on what the others have decoded.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talkingdit.curate.local import Task, one_thread
from talkingdit.curate.look import Look, unpacked
from talkingdit.curate.measure import TODO, Record, Video, add_figures, broken_record, measured
from talkingdit.curate.stages import ClipFindings, make_stages, stage_of
from talkingdit.errors import UserError

TRIES = 3  # of a video whose workers die; Ray itself would try for ever
MOST_BLOCKS = 4096  # of one pipeline; more videos are done in several
CLAIMS = ".tries"


@dataclass(frozen=True)
class RayCluster:
    """Where the work is done.

    Args:
        address: "local" starts Ray here; "auto" or "ray://HOST:PORT" joins a cluster.
        workers: actors.
        gpus: cards, or a part of one, of each actor of the stages that want one.
    """

    address: str
    workers: int
    gpus: float = 0.0


def watch_on_ray(task: Task, videos: list[Video], cluster: RayCluster, note: Callable[[Record], None]) -> None:
    """Watch videos with actors.

    Args:
        task: settings and folder, which all machines see under the same name.
        videos: to watch.
        cluster: where.
        note: called in this process, once per video.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached, or an actor cannot start.
    """
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("pyarrow") is None:
        raise UserError("curate: ray is not installed; `pip install 'talkingdit[curate,ray]'` brings it.")
    import ray

    with _ray(cluster):
        noted: set[str] = set()
        for first in range(0, len(videos), MOST_BLOCKS):
            part = videos[first : first + MOST_BLOCKS]
            try:
                for row in _pipeline(task, part, cluster).iter_rows():
                    record = json.loads(row["record"])
                    if record.get("failed"):
                        raise UserError(record["failed"])
                    if record["key"] not in noted:  # a block that was done twice
                        noted.add(record["key"])
                        note(record)
                        _claim(task.folder, record["key"]).unlink(missing_ok=True)
            except ray.exceptions.RayError as error:
                raise UserError(f"curate: Ray gave up ({_short(error)}); what is done is kept.") from error


def _pipeline(task: Task, videos: list[Video], cluster: RayCluster) -> Any:
    import ray

    rows = [{"video": json.dumps({**vars(video), "path": str(video.path)})} for video in videos]
    data: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    card = cluster.gpus > 0 and any(getattr(stage_of(name), "gpu", False) for name in task.watch.stages)
    data = data.map_batches(
        Actor,
        fn_constructor_args=(task, False if card else None),
        batch_size=1,
        num_cpus=1,
        concurrency=(1, cluster.workers),
    )
    if card:
        data = data.map_batches(
            CardActor,
            fn_constructor_args=(task,),
            batch_size=1,
            num_gpus=cluster.gpus,
            num_cpus=0,
            concurrency=(1, cluster.workers),
        )
    return data


class Actor:
    """Watches the video of a row.

    Args:
        task: settings and folder.
        gpu: False leaves the stages that want a card to a `CardActor`, and sends it what they need; None has all here.
    """

    def __init__(self, task: Task, gpu: bool | None) -> None:
        one_thread()
        self._task, self._sends = task, gpu is False
        self._failed = ""
        try:
            self._watcher = task.watcher(gpu)
        except UserError as error:  # of an actor that does not start Ray makes new ones for ever
            self._failed = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        records, clips = [], []
        for row in batch["video"]:
            packed: list[bytes] = []
            records.append(json.dumps(self._record(json.loads(row), packed)))
            clips.append(pickle.dumps(packed))
        return {"record": records, "clips": clips} if self._sends else {"record": records}

    def _record(self, row: dict[str, Any], packed: list[bytes]) -> Record:
        if self._failed:
            return {"key": row["key"], "failed": self._failed}
        before, todo = row.get("before"), tuple(row.get("todo", ()))
        video = Video(row["key"], Path(row["path"]), row["start"], row["end"], row["caption"], before=before, todo=todo)

        def keep(look: Look, found: ClipFindings) -> None:
            packed.append(look.packed(self._task.watch.card_pictures, found.spoken))

        try:
            if _tried(self._task.folder, video.key) > TRIES:
                sentence = f"{video.path}: {TRIES} workers died while they watched it."
                return broken_record(video, self._task.versions, sentence)
            return self._watcher.record(video, keep if self._sends else None)
        except OSError as error:
            reason = error.strerror or str(error)
            return {"key": video.key, "failed": f"curate: {self._task.folder}: {reason}; what is done is kept."}


class CardActor:
    """Adds what the stages that want a card measure, of pictures and sound that an `Actor` has decoded."""

    def __init__(self, task: Task) -> None:
        self._failed = ""
        try:
            names = {slot: weights.name for slot, weights in task.given.items()}
            self._stages, self._lacking = make_stages(task.watch, True, names)
        except UserError as error:
            self._failed = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        pairs = zip(batch["record"], batch["clips"], strict=True)
        return {"record": [json.dumps(self._more(json.loads(record), pickle.loads(clips))) for record, clips in pairs]}

    def _more(self, record: Record, packed: list[bytes]) -> Record:
        if record.get("failed") or self._failed:
            return record if record.get("failed") else {"key": record["key"], "failed": self._failed}
        todo = record.pop(TODO, None)
        stages = {name: stage for name, stage in self._stages.items() if todo is None or name in todo}
        clips = {clip["number"]: clip for clip in record["clips"]}
        for data in packed:
            look, spoken = unpacked(Path(record["path"]), data)
            add_figures(clips[look.number], *measured(stages, look, ClipFindings(spoken=spoken)))
        record["lacking"] |= self._lacking
        return record


def _tried(folder: Path, key: str) -> int:
    """How often a worker began with a video; a line per try, so that tries of a killed worker count."""
    claim = _claim(folder, key)
    claim.parent.mkdir(exist_ok=True)
    with claim.open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    return len(claim.read_text(encoding="utf-8").splitlines())


def _claim(folder: Path, key: str) -> Path:
    return folder / CLAIMS / hashlib.sha256(key.encode()).hexdigest()[:24]


@contextlib.contextmanager
def _ray(cluster: RayCluster) -> Iterator[None]:
    """Ray, started or joined, and left as it was found."""
    import logging

    import ray

    own = not ray.is_initialized()
    if own:
        here = cluster.address in ("", "local")
        handler = signal.getsignal(signal.SIGTERM)
        # One processor more than actors: readers need one, and would wait for ever.
        how: dict[str, Any] = {"num_cpus": cluster.workers + 1} if here else {"address": cluster.address}
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **how)
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            raise UserError(f"curate: Ray at {cluster.address!r} cannot be reached ({_short(error)}).") from error
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, handler)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        if own:
            ray.shutdown()


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
