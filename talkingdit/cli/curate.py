# SPDX-License-Identifier: Apache-2.0
"""The verb `talkingdit curate`: from a pile of videos to clean clips of people who speak."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from talkingdit.checkpoints.bounds import check_options
from talkingdit.cli.flags import Group, read
from talkingdit.cli.messages import warn
from talkingdit.families.flag import Flag

COMMAND = "talkingdit curate"
ABOUT = "Find clips worth training on; run again, it goes on where it was stopped, or decides anew."


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Which videos, and how."""

    videos: Annotated[Path, Flag("PATH")]
    """a folder of videos, or a manifest (.jsonl, .csv, .json)"""
    out: Annotated[Path, Flag("DIR", also=("-o",))]
    """folder of the results"""
    settings: Annotated[Path | None, Flag("FILE")] = None
    """TOML with limits (default: the usual ones; docs/curate.md)"""
    workers: Annotated[int, Flag("N")] = 1
    """processes, or Ray's actors"""
    ray: Annotated[str | None, Flag("ADDRESS")] = None
    """run on Ray: local, auto, or the address of a cluster"""
    gpus: Annotated[float, Flag("N")] = 0.0
    """on Ray: cards for each worker of the stages that want one"""
    again: bool = False
    """watch videos again that could not be read, or whose stages lacked a package"""

    def __post_init__(self) -> None:
        check_options(self, "curate")
        if self.workers < 1:
            raise ValueError(f"curate: workers must be at least 1, got {self.workers}")
        if not 0 <= self.gpus <= 16:
            raise ValueError(f"curate: gpus must be from 0 to 16, got {self.gpus}")


def curate(argv: Sequence[str]) -> None:
    """Carry out the verb.

    Raises:
        UserError: something is wrong with the command line, the settings, the videos or the folder.
        KeyboardInterrupt: with a sentence about what is kept.
        SystemExit: after the help.
    """
    values = read(COMMAND, ABOUT, [Group(Flags)], argv)
    values.refuse_unknown()
    flags = values.make(Flags)

    from tqdm import tqdm

    from talkingdit.curate.job import REPORT, CurateJob
    from talkingdit.curate.job import curate as carry_out
    from talkingdit.curate.settings import read_settings

    job = CurateJob(
        source=flags.videos,
        folder=flags.out,
        settings=read_settings(flags.settings),
        workers=flags.workers,
        ray=flags.ray,
        gpus=flags.gpus,
        again=flags.again,
    )
    with tqdm(unit="video", desc="watching", disable=None) as bar:
        clips = broken = 0

        def started(videos: int, missing: int) -> None:
            bar.total = videos
            bar.update(videos - missing)

        def watched(record: dict[str, object]) -> None:
            nonlocal clips, broken
            found = record["clips"]
            assert isinstance(found, list)
            clips, broken = clips + len(found), broken + bool(record["error"])
            bar.set_postfix(clips=clips, broken=broken, refresh=False)
            bar.update()

        try:
            outcome = carry_out(job, started, watched)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; what was watched is kept in {flags.out}; the same command goes on there."
            ) from None
    for stage, sentence in outcome.lacking.items():
        warn(f"{stage} was not measured: {sentence}")
    kept, all_clips = len(outcome.decisions.kept), len(outcome.decisions.clips)
    unread = f", {outcome.broken} that cannot be read are in {flags.out / 'broken.jsonl'}" if outcome.broken else ""
    sys.stdout.write(
        f"{flags.out}: {kept} of {all_clips} clips of {outcome.videos} videos kept{unread}; see {flags.out / REPORT}\n"
    )
