# SPDX-License-Identifier: Apache-2.0
"""The command `talkingdit <verb>`. Verbs import what they need when they run, so that `--help` is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

USER_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one sentence."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: {message} (see `{self.prog} --help`).\n")
        raise SystemExit(USER_ERROR)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def _strength(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


# argparse names the type in its message: "invalid integer value: 'x'".
_positive.__name__ = _not_negative.__name__ = "integer"
_strength.__name__ = "number"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog="talkingdit", description="Talking-character video from audio.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    make = verbs.add_parser(
        "generate",
        help="make a video of a portrait speaking",
        description="Make a video of a portrait speaking a voice recording. Runs on this machine, without a GPU too.",
    )
    make.add_argument("--image", type=Path, required=True, metavar="PNG", help="the portrait")
    make.add_argument("--audio", type=Path, required=True, metavar="WAV", help="the voice: WAV, FLAC, MP3, OGG, ...")
    make.add_argument("--prompt", default="", metavar="WORDS", help="what to show")
    make.add_argument("-o", "--output", type=Path, required=True, metavar="MP4", help="the video to write")
    make.add_argument("--checkpoint", type=Path, metavar="DIR", help="model to use (default: the one shipped)")
    make.add_argument(
        "--text-guidance", type=_strength, metavar="G", help="how strictly to follow the prompt; 1 is plain"
    )
    make.add_argument(
        "--audio-guidance", type=_strength, metavar="G", help="how strongly to follow the voice; 1 is plain"
    )
    make.add_argument("--seed", type=_not_negative, default=0, metavar="N", help="another number, another video (0)")
    make.add_argument("--steps", type=_positive, metavar="N", help="denoising steps per clip")
    make.add_argument("--upscale", type=_positive, default=1, metavar="N", help="enlarge the pictures N times (1)")
    make.add_argument("--sheet", type=Path, metavar="PNG", help="also write a preview: pictures, waveform, mouth curve")
    make.add_argument("--threads", type=_positive, metavar="N", help="processor threads (default: all)")

    verbs.add_parser(
        "info", help="say what was built and what was found", description="What was built and what was found."
    )
    return top


def _generate(args: argparse.Namespace) -> None:
    from talkingdit.pipelines.video import make_video, prepare

    job = prepare(args.image, args.audio, args.output, sheet=args.sheet)
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)

    from tqdm import tqdm

    from talkingdit.models.checkpoints import load_checkpoint
    from talkingdit.pipelines.generate import Sampling

    checkpoint = load_checkpoint(args.checkpoint)
    sampling = Sampling(args.text_guidance, args.audio_guidance, args.steps, args.seed)
    with tqdm(unit="step", desc="generating", disable=None) as bar:

        def advance(total: int) -> None:
            bar.total = total
            bar.update()

        result = make_video(job, checkpoint, args.prompt, sampling, upscale=args.upscale, progress=advance, warn=_warn)
    print(
        f"{result.path}: {result.frames} frames, {result.seconds:.2f} s of video at {result.fps} fps, "
        f"made in {result.took:.1f} s"
    )
    if args.sheet is not None:
        print(f"{args.sheet}: preview")


def _warn(sentence: str) -> None:
    sys.stderr.write(f"talkingdit: {sentence}\n")


def _info(args: argparse.Namespace) -> None:
    import talkingdit

    info = talkingdit.build_info()
    width = max(len(name) for name in info)
    for name, value in info.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, list | tuple):
            value = ", ".join(str(item) for item in value)
        print(f"{name.replace('_', ' '):<{width}}  {'none' if value in (None, '') else value}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a mistake in the input, 130 when interrupted."""
    args = parser().parse_args(argv)
    from talkingdit.errors import UserError

    try:
        {"generate": _generate, "info": _info}[args.verb](args)
    except UserError as error:
        _warn(str(error))
        return USER_ERROR
    except ImportError as error:
        _warn(str(error))
        return 1
    except KeyboardInterrupt:
        _warn("interrupted; nothing was written.")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
