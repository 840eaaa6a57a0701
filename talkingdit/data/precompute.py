# SPDX-License-Identifier: Apache-2.0
"""Encode the videos of a manifest once, into shards that training reads (`PrecomputedShards`).

Worker r of n takes every n-th row. A clip is done when it is in a finished shard, whoever wrote it: the same command
goes on after a kill, also with another number of workers and with a manifest that has grown. What cannot be read is
written to `broken.jsonl`, and tried again the next time; so is an entry at which two processes ended, as a decoder that
crashes makes them.

    precompute.json          the settings that all clips have in common
    clips-WWWW-NNNNNN.tar    shard N of worker W, and .json, its index
    empty_text.safetensors   features of the empty caption
    broken.jsonl             key, row and reason of what could not be encoded
    .lock                    which process is at work here; see `talkingdit.lock`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from talkingdit.atomic import PART, append_line, write_whole
from talkingdit.data.claims import TRIES, Claims
from talkingdit.data.cutting import Cutting, open_item
from talkingdit.data.encoders import CheckpointEncoders
from talkingdit.data.encoding import EncodeClip, broken_by
from talkingdit.data.manifest import Entry, Manifest
from talkingdit.data.probe import Probes
from talkingdit.data.sample import BrokenSample
from talkingdit.data.shards import EMPTY_TEXT, PrecomputedShards, ShardWriter, part_of
from talkingdit.errors import UserError
from talkingdit.lock import RunLock, name_of_torchrun

FORMAT = 1
STAMP, BROKEN, LOCK = "precompute.json", "broken.jsonl", ".lock"
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class PrecomputeJob:
    """What to encode, how, and where to.

    Args:
        manifest: from `read_manifest`.
        encoders: of a checkpoint folder; its family's `clips.encoders`.
        encode: the same family's `clips.encode_clip`.
        out: a folder, made if need be.
        cutting: which clips.
        dtype: of the tensors that are kept, of `DTYPES`.
        shard_bytes: after which a shard is full.
    """

    manifest: Manifest
    encoders: CheckpointEncoders
    encode: EncodeClip
    out: Path
    cutting: Cutting
    dtype: str = "bfloat16"
    shard_bytes: int = 256 << 20

    def settings(self) -> dict[str, Any]:
        """What clips depend on, by the names of the options."""
        settings = self.encoders.settings
        values = {"format": FORMAT, "what": sorted(self.encoders.what), "fps": settings.fps, "dtype": self.dtype}
        values |= dataclasses.asdict(self.cutting)
        return values | {"history": settings.motion_frames, "checkpoint": self.encoders.fingerprint}


@dataclass(frozen=True)
class FinishedVideo:
    """A video that a worker is finished with."""

    clips: int = 0  # that were encoded
    kept: int = 0  # that an earlier run has encoded
    broken: int = 0


def prepare(job: PrecomputeJob, rank: int = 0) -> RunLock:
    """Make the folder, or make sure that it holds clips of the same settings.

    Returns:
        The lock on the folder, which processes of one torchrun share; to be released when the work is done.

    Raises:
        UserError: it holds clips of other settings, or something else, or cannot be written, or another run is at work
            there.
    """
    try:
        job.out.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(job.out)
        lock = RunLock(job.out / LOCK, job.out, "talkingdit precompute", name_of_torchrun())
    except OSError as error:
        raise UserError(f"{job.out}: cannot be used ({error}).") from error
    try:
        _stamp(job, rank)
    except BaseException as error:
        lock.release()
        if isinstance(error, UserError) or not isinstance(error, OSError | ValueError | RecursionError):
            raise
        raise UserError(f"{job.out}: cannot be used ({error}).") from error
    return lock


def _refuse_foreign(folder: Path) -> None:
    """Hidden files are nobody's concern: ours, a library's or a file system's."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if names and not (folder / STAMP).is_file():
        raise UserError(f"{folder}: expected an empty folder or earlier clips, got {names[0]!r} in it.")
    for name in (STAMP, BROKEN, EMPTY_TEXT):
        if (folder / name).is_symlink():
            raise UserError(f"{folder / name}: expected a file of this folder, got a link out of it; remove it.")


def _stamp(job: PrecomputeJob, rank: int) -> None:
    wanted = json.loads(json.dumps(job.settings()))
    stamp = job.out / STAMP
    if not stamp.is_file():
        write_whole(stamp, json.dumps(wanted, indent=1).encode(), part_of(rank))
    found = json.loads(stamp.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{STAMP} must hold an object, got {type(found).__name__}")
    for name, value in wanted.items():
        if found.get(name) != value:
            what = f"{name} {found.get(name)!r}, asked for {value!r}"
            what = "another checkpoint" if name == "checkpoint" else what
            raise UserError(f"{job.out}: holds clips made with {what}; take another folder or the same settings.")


def clear_parts(folder: Path, rank: int, world: int) -> None:
    """Throw away what killed workers left half-written, those that this worker stands for now."""
    for path in folder.glob(f"{PART}*"):
        owner = path.name.removeprefix(PART)[:4]
        if owner.isdecimal() and int(owner) % world == rank:
            path.unlink(missing_ok=True)


def precompute(
    job: PrecomputeJob, rank: int = 0, world: int = 1, report: Callable[[FinishedVideo], None] | None = None
) -> None:
    """Encode the part of worker `rank` of `world`; call `prepare` before.

    Args:
        job: the same for all workers.
        rank, world: which part of the manifest.
        report: called after every video.

    Raises:
        UserError: the checkpoint does not load, the disk is full, or the device has too little memory.
    """
    claims = Claims(job.out, part_of(rank))
    clear_parts(job.out, rank, world)
    done = _done(job.out)
    probes = Probes(job.manifest.path)
    log = _BrokenLog(job.out / BROKEN)
    writer = ShardWriter(job.out, rank, job.shard_bytes)
    try:
        for entry in job.manifest.entries[rank::world]:
            if claims.tries(entry.key) >= TRIES:
                log.add(entry.key, entry, f"{entry.video} ended {TRIES} processes that read it.")
                step = FinishedVideo(broken=1)
            else:
                claims.begin(entry.key)
                step = _encode_entry(job, entry, probes, done, log, writer)
            if report is not None:
                report(step)
        writer.finish()
    except torch.OutOfMemoryError as error:
        writer.finish()  # what is encoded already is good
        raise UserError(
            f"precompute: the device has not enough memory for clips of {job.cutting.clip_frames} frames; "
            "try a smaller --max-area or fewer --clip-frames."
        ) from error
    except KeyboardInterrupt:
        writer.finish()
        raise
    finally:
        writer.abort()
        claims.end()


def _done(folder: Path) -> set[str]:
    """Keys of all clips in finished shards."""
    try:
        return {about["key"] for _, about in PrecomputedShards(folder).clips}
    except UserError:
        if any(folder.glob("clips-*.tar")):
            raise
        return set()


def _encode_entry(
    job: PrecomputeJob, entry: Entry, probes: Probes, done: set[str], log: _BrokenLog, writer: ShardWriter
) -> FinishedVideo:
    settings, broken, clips, kept = job.encoders.settings, 0, 0, 0
    try:
        with broken_by(entry.key, entry.video):
            item = open_item(entry, probes, settings.fps)
            cuts = job.cutting.cuts(item, settings.motion_frames)
            size = job.cutting.size(item)
    except BrokenSample as error:
        log.add(entry.key, entry, error.reason)
        return FinishedVideo(broken=1)
    if not cuts:
        log.add(entry.key, entry, f"{entry.video} has {item.frames} frames, too few for a clip.")
        return FinishedVideo(broken=1)
    for cut in cuts:
        key = cut.key(entry)
        if key in done:
            kept += 1
            continue
        _keep_empty_text(job, writer.worker)
        encoders = job.encoders.loaded  # a checkpoint that does not load is no fault of the clip
        try:
            with broken_by(key, entry.video):
                sample = job.encode(item, cut, size, encoders, _generator(key))
            about = {"fps": float(settings.fps), "start": entry.start + cut.start / settings.fps, "row": entry.where}
            writer.add(sample, about, getattr(torch, job.dtype))
        except BrokenSample as error:
            log.add(key, entry, error.reason)
            broken += 1
            continue
        clips += 1
    return FinishedVideo(clips, kept, broken)


def _generator(key: str) -> np.random.Generator:
    """Draws the same for a clip in every run and in every worker."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))


def _keep_empty_text(job: PrecomputeJob, worker: int) -> None:
    target = job.out / EMPTY_TEXT
    if "text" not in job.encoders.what or target.is_file():
        return
    text = job.encoders.loaded.text("")
    assert text is not None
    try:
        write_whole(target, safetensors.torch.save({"text": text.to(getattr(torch, job.dtype))}), part_of(worker))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}).") from error


class _BrokenLog:
    """What could not be encoded, a line each; workers append to the same file."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        self.known = set(lines)

    def add(self, key: str, entry: Entry, reason: str) -> None:
        line = json.dumps({"key": key, "row": entry.where, "reason": reason}, ensure_ascii=False)
        line = line.encode(errors="backslashreplace").decode()  # names of files may be no text
        if line not in self.known:
            self.known.add(line)
            try:
                append_line(self.path, line)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written ({error.strerror or error}).") from error
