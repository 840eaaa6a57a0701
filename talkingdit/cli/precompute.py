# SPDX-License-Identifier: Apache-2.0
"""The verb `talkingdit precompute`: training videos into shards, alone or as one of several processes of torchrun."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from talkingdit.checkpoints.bounds import check_options
from talkingdit.cli.flags import Group, read
from talkingdit.cli.messages import processes, rank, warn
from talkingdit.errors import UserError
from talkingdit.families.flag import AREA, Flag

if TYPE_CHECKING:
    from talkingdit.data.manifest import Manifest
    from talkingdit.data.precompute import PrecomputeJob

COMMAND = "talkingdit precompute"
ABOUT = "Encode training videos into shards; run again, it goes on where it was stopped."


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What is encoded, and how."""

    manifest: Annotated[Path, Flag("FILE")]
    """videos: .jsonl, .csv or .json"""
    checkpoint: Annotated[Path, Flag("DIR")]
    """folder of the encoders"""
    out: Annotated[Path, Flag("DIR", also=("-o",))]
    """folder of the shards"""
    fps: Annotated[int | None, Flag("N")] = None
    """frames per second (default: of the checkpoint, 16)"""
    clip_frames: Annotated[int, Flag("N")] = 80
    """frames per clip"""
    min_frames: Annotated[int | None, Flag("N")] = None
    """of the last or only clip (default: half of --clip-frames)"""
    stride: Annotated[int | None, Flag("N")] = None
    """frames between clips (default: --clip-frames)"""
    openings: Literal["first", "all", "none"] = "first"
    """clips without history: first (where a video begins), all (one at every stride), none"""
    stills: bool = False
    """with every such clip one that starts from the reference"""
    max_area: Annotated[int | None, AREA] = None
    """most pixels of a frame, a number or WIDTHxHEIGHT (default: 832x448)"""
    tokens: Annotated[int | None, Flag("N")] = None
    """instead: most tokens of a clip after patchifying"""
    multiple: Annotated[int | None, Flag("N")] = None
    """of which sides are multiples (default: the checkpoint's, 64)"""
    what: Annotated[str | None, Flag("LIST")] = None
    """what is kept (default: all that the checkpoint has encoders for: latents,text,audio)"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """of what is kept"""
    shard_size: Annotated[int, Flag("MB")] = 256
    """of a shard"""
    device: Annotated[str | None, Flag("NAME")] = None
    """cpu, cuda (default: cuda if there; workers take turns)"""
    workers: Annotated[int, Flag("N")] = 1
    """processes"""

    def __post_init__(self) -> None:
        check_options(self, "precompute")
        counts = ("fps", "clip_frames", "min_frames", "stride", "tokens", "multiple", "shard_size", "workers")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"precompute: {name} must be at least 1, got {value}")


def precompute(argv: Sequence[str]) -> None:
    """Carry out the verb.

    Raises:
        UserError: something is wrong with the command line, the manifest or the checkpoint.
        KeyboardInterrupt: with a sentence about what is kept.
        SystemExit: after the help.
    """
    values = read(COMMAND, ABOUT, [Group(Flags)], argv)
    values.refuse_unknown()
    flags = values.make(Flags)
    if flags.max_area is not None and flags.tokens is not None:
        values.refuse("argument --tokens: not allowed with argument --max-area")
    if importlib.util.find_spec("webdataset") is None:
        raise UserError("precompute: webdataset is not installed; `pip install 'talkingdit[train]'` brings it.")

    from talkingdit.data.manifest import read_manifest

    manifest = read_manifest(flags.manifest)
    if manifest.ignored and not rank():
        warn(f"{flags.manifest}: columns without a meaning here: {', '.join(manifest.ignored)}.")
    _run(flags, manifest, _job(flags, manifest))


def _run(flags: Flags, manifest: Manifest, job: PrecomputeJob) -> None:
    """Encode the part of this process, and say what came of it."""
    from tqdm import tqdm

    from talkingdit.data.precompute import BROKEN, FinishedVideo, prepare
    from talkingdit.data.shards import PrecomputedShards
    from talkingdit.data.workers import run_workers

    first, world = rank() * flags.workers, processes()
    lock = prepare(job, first)
    clips = broken = 0
    rows = sum(len(manifest.entries[worker :: world * flags.workers]) for worker in range(first, first + flags.workers))
    try:
        with tqdm(total=rows, unit="video", desc="encoding", disable=True if rank() else None) as bar:

            def report(step: FinishedVideo) -> None:
                nonlocal clips, broken
                clips, broken = clips + step.clips, broken + step.broken
                bar.set_postfix(clips=clips, broken=broken, refresh=False)
                bar.update()

            run_workers(job, rank(), world, flags.workers, report)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; finished shards are kept in {flags.out}; the same command goes on there."
        ) from None
    finally:
        lock.release()
    listed = f"; {broken} that cannot be read are listed in {flags.out / BROKEN}" if broken else ""
    if world == 1 and not any(flags.out.glob("clips-*.tar")):
        raise UserError(f"precompute: no clip could be made{listed}.")
    have = f", {len(PrecomputedShards(flags.out))} in all" if world == 1 else ""
    sys.stdout.write(f"{flags.out}: {clips} clips encoded{have}{listed}\n")


def _job(flags: Flags, manifest: Manifest) -> PrecomputeJob:
    import torch

    from talkingdit import families
    from talkingdit.data.cutting import Cutting
    from talkingdit.data.precompute import PrecomputeJob
    from talkingdit.models import find_checkpoint
    from talkingdit.pipelines.tuning import usual_device

    device = flags.device or usual_device()
    # The text encoder is large; on the host half precision is slow.
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    folder = find_checkpoint(flags.checkpoint)
    clips = families.of_folder(folder).clips
    what = tuple(flags.what.split(",")) if flags.what else ()
    encoders = clips.encoders(folder, what, dtype, device, flags.fps)
    multiple = flags.multiple or encoders.settings.size_multiple
    if flags.tokens is not None:
        # A token is a patch of 2 x 2 latents of 8 x 8 pixels, and a latent is four frames.
        area = flags.tokens * 256 * 4 // flags.clip_frames
    else:
        area = flags.max_area or 832 * 448
    try:
        cutting = Cutting(
            clip_frames=flags.clip_frames,
            min_frames=flags.min_frames or max(4, flags.clip_frames // 8 * 4),
            stride=flags.stride or 0,
            openings=flags.openings,
            stills=flags.stills,
            max_area=area,
            multiple=multiple,
        )
    except ValueError as error:
        raise UserError(f"precompute: --{str(error).replace('_', '-')}.") from error
    return PrecomputeJob(manifest, encoders, clips.encode_clip, flags.out, cutting, flags.dtype, flags.shard_size << 20)
