# SPDX-License-Identifier: Apache-2.0
"""The verb `talkingdit precompute`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from talkingdit.data.manifest import Manifest
    from talkingdit.data.precompute import Job


def add_precompute(verbs: Any, count: Callable[[str], int], area: Callable[[str], int]) -> None:
    """Add the verb and its arguments.

    Args:
        verbs: of the command line.
        count, area: read a number of at least 1, and pixels.
    """
    make = verbs.add_parser(
        "precompute",
        help="encode training videos once, into shards",
        description="Encode the videos of a manifest with the autoencoder, the speech and the text encoder of a "
        "Wan-S2V checkpoint, into WebDataset shards for training. Run again, it goes on where it was stopped; under "
        "torchrun every process takes its part.",
    )
    make.set_defaults(run=_precompute)
    make.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="videos: .jsonl, .csv or .json")
    make.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="folder of the encoders")
    make.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    make.add_argument("--fps", type=count, metavar="N", help="pictures per second (default: of the checkpoint, 16)")
    make.add_argument("--clip-frames", type=count, default=80, metavar="N", help="pictures per clip (80)")
    make.add_argument("--min-frames", type=count, metavar="N", help="of the last or only clip (half of --clip-frames)")
    make.add_argument("--stride", type=count, metavar="N", help="pictures between clips (default: --clip-frames)")
    openings = "clips without history: first (where a video begins), all (one at every stride), none (first)"
    make.add_argument("--openings", choices=("first", "all", "none"), default="first", help=openings)
    make.add_argument("--stills", action="store_true", help="with every such clip one that starts from the reference")
    size = make.add_mutually_exclusive_group()
    size.add_argument("--max-area", type=area, metavar="N", help="most pixels, a number or WIDTHxHEIGHT (832x448)")
    size.add_argument("--tokens", type=count, metavar="N", help="instead: most tokens of a clip after patchifying")
    make.add_argument("--multiple", type=count, metavar="N", help="of which sides are multiples (the checkpoint's, 64)")
    make.add_argument("--what", default="latents,text,audio", metavar="LIST", help="what is kept (latents,text,audio)")
    make.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="kept (bfloat16)")
    make.add_argument("--shard-size", type=count, default=256, metavar="MB", help="of a shard (256)")
    make.add_argument("--device", metavar="NAME", help="cpu, cuda (default: cuda if there; workers take turns)")
    make.add_argument("--workers", type=count, default=1, metavar="N", help="processes (1)")


def _precompute(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from talkingdit.data.manifest import read_manifest
    from talkingdit.data.precompute import BROKEN, Step, prepare
    from talkingdit.data.shards import PrecomputedShards
    from talkingdit.data.workers import run_workers
    from talkingdit.errors import UserError

    if importlib.util.find_spec("webdataset") is None:
        raise UserError("precompute: webdataset is not installed; `pip install 'talkingdit[train]'` brings it.")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    manifest = read_manifest(args.manifest)
    if manifest.ignored and rank == 0:
        columns = ", ".join(manifest.ignored)
        sys.stderr.write(f"talkingdit: {args.manifest}: columns without a meaning here: {columns}.\n")
    job = _job(args, manifest)
    prepare(job, rank * args.workers)
    clips = broken = 0
    mine = range(rank * args.workers, (rank + 1) * args.workers)
    rows = sum(len(manifest.entries[worker :: world * args.workers]) for worker in mine)
    # A scheduler that wants its machine back is obeyed as a person is: the open shard is finished.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tqdm(total=rows, unit="video", desc="encoding", disable=True if rank else None) as bar:

            def report(step: Step) -> None:
                nonlocal clips, broken
                clips, broken = clips + step.clips, broken + step.broken
                bar.set_postfix(clips=clips, broken=broken, refresh=False)
                bar.update()

            run_workers(job, rank, world, args.workers, report)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; finished shards are kept in {args.out}; the same command goes on there."
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    listed = f"; {broken} that cannot be read are listed in {args.out / BROKEN}" if broken else ""
    if world == 1 and not any(args.out.glob("clips-*.tar")):
        raise UserError(f"precompute: no clip could be made{listed}.")
    have = f", {len(PrecomputedShards(args.out))} in all" if world == 1 else ""
    print(f"{args.out}: {clips} clips encoded{have}{listed}")


def _job(args: argparse.Namespace, manifest: Manifest) -> Job:
    import torch

    from talkingdit import families
    from talkingdit.data.cutting import Cutting
    from talkingdit.data.precompute import Job
    from talkingdit.errors import UserError

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # The text encoder is large; on the host half precision is slow.
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    clips = families.of_folder(args.checkpoint).clips
    encoders = clips.encoders(args.checkpoint, tuple(args.what.split(",")), dtype, device, args.fps)
    multiple = args.multiple or encoders.settings.size_multiple
    if args.tokens is not None:
        # A token is a patch of 2 x 2 latents of 8 x 8 pixels, and a latent is four pictures.
        area = args.tokens * 256 * 4 // args.clip_frames
    else:
        area = args.max_area or 832 * 448
    try:
        cutting = Cutting(
            clip_frames=args.clip_frames,
            min_frames=args.min_frames or max(4, args.clip_frames // 8 * 4),
            stride=args.stride or 0,
            openings=args.openings,
            stills=args.stills,
            max_area=area,
            multiple=multiple,
        )
    except ValueError as error:
        raise UserError(f"precompute: --{str(error).replace('_', '-')}.") from error
    return Job(manifest, encoders, clips.encode_clip, args.out, cutting, args.dtype, args.shard_size << 20)
