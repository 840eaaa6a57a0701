# SPDX-License-Identifier: Apache-2.0
"""The command `talkingdit <verb>`. A verb is a module of its own, imported when it is asked for."""

from __future__ import annotations

import importlib
import io
import sys
import warnings
from collections.abc import Callable, Sequence

from talkingdit.cli.messages import USER_ERROR, UsageError, interrupted_by_sigterm, media_warnings, tell
from talkingdit.openmp import wait_briefly

__all__ = ["USER_ERROR", "main"]

VERBS = {
    "generate": "make a video of a portrait speaking",
    "app": "serve a page on which videos are made",
    "plan": "predict memory and time of a model on a card, or of its training on a cluster",
    "calibrate": "fit the step cache to a checkpoint",
    "eval": "judge videos region by region, against the truth and each other",
    "info": "say what was built and what was found",
    "curate": "find clips worth training on in a pile of videos",
    "precompute": "encode training videos once, into shards",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a mistake in the input, 130 when interrupted."""
    wait_briefly()
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        if words and words[0] in ("-h", "--help"):
            sys.stdout.write(_help())
        else:
            # What Pillow finds odd in an image that it reads all the same is no news for a person.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
            with interrupted_by_sigterm(), media_warnings():
                _verb(words)(words[1:])
    except (Exception, KeyboardInterrupt) as error:
        return tell(error)
    return 0


def _verb(words: Sequence[str]) -> Callable[[Sequence[str]], None]:
    """What carries out the verb."""
    if not words or words[0] not in VERBS:
        got = f", got {words[0]!r}" if words else ""
        raise UsageError(f"talkingdit: expected a verb, one of {', '.join(VERBS)}{got} (see `talkingdit --help`).")
    carry_out: Callable[[Sequence[str]], None] = getattr(
        importlib.import_module(f"talkingdit.cli.{words[0]}"), words[0]
    )
    return carry_out


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {about}" for verb, about in VERBS.items())
    return (
        "usage: talkingdit VERB ...\n\nTalking-character video from audio.\n\n"
        f"verbs:\n{verbs}\n\n`talkingdit VERB --help` shows the flags of a verb.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
