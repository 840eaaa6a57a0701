# SPDX-License-Identifier: Apache-2.0
"""The command `talkingdit <verb>`. Verbs import what they need when they run, so that `--help` is instant.

One function per verb adds its arguments and says, as the default of `run`, what carries it out; `parser` calls them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from talkingdit.cli.plan import add_plan
from talkingdit.cli.precompute import add_precompute

if TYPE_CHECKING:
    from talkingdit.distributed.layout import Layout
    from talkingdit.distributed.team import Team
    from talkingdit.families.puppet.checkpoint import PuppetCheckpoint
    from talkingdit.families.wan_s2v.checkpoint import WanS2VCheckpoint
    from talkingdit.pipelines.job import Inputs, Result
    from talkingdit.pipelines.memory import Memory

USER_ERROR = 2
INTERRUPTED = 130


def _rank() -> int:
    """The number of this process among those of torchrun."""
    return int(os.environ.get("RANK", "0"))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one sentence."""

    def error(self, message: str) -> NoReturn:
        if _rank():
            raise SystemExit(USER_ERROR)  # all processes have the same arguments: one tells
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


def _sides(text: str) -> tuple[int, int]:
    """Height and width from WIDTHxHEIGHT (or WIDTH*HEIGHT, as the official program writes it)."""
    width, _, height = text.lower().replace("*", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, got {text!r}")
    return int(height), int(width)


def _area(text: str) -> int:
    """Pixels, as a number or as WIDTHxHEIGHT."""
    if text.isdecimal() and int(text):
        return int(text)
    height, width = _sides(text)
    return height * width


# argparse names the type in its message: "invalid integer value: 'x'".
_positive.__name__ = _not_negative.__name__ = "integer"
_strength.__name__ = "number"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog="talkingdit", description="Talking-character video from audio.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_generate(verbs)
    add_plan(verbs, _positive, _strength, _sides)
    _add_info(verbs)
    add_precompute(verbs, _positive, _area)
    return top


def _add_generate(verbs: Any) -> None:
    make = verbs.add_parser(
        "generate",
        help="make a video of a portrait speaking",
        description="Make a video of a portrait speaking a voice recording. The model that is shipped, of drawn "
        "characters, runs on this machine without a GPU too; with `--checkpoint` also a released Wan2.2-S2V folder.",
    )
    make.set_defaults(run=_generate)
    make.add_argument("--image", type=Path, required=True, metavar="PNG", help="the portrait")
    make.add_argument("--audio", type=Path, required=True, metavar="WAV", help="the voice: WAV, FLAC, MP3, OGG, ...")
    make.add_argument("--prompt", default="", metavar="WORDS", help="what to show")
    make.add_argument("-o", "--output", type=Path, required=True, metavar="MP4", help="the video to write")
    make.add_argument("--checkpoint", type=Path, metavar="DIR", help="model to use (default: the one shipped)")
    make.add_argument("--seed", type=_not_negative, default=0, metavar="N", help="another number, another video (0)")
    make.add_argument("--steps", type=_positive, metavar="N", help="denoising steps per clip")
    make.add_argument("--upscale", type=_positive, default=1, metavar="N", help="enlarge the pictures N times (1)")
    make.add_argument("--sheet", type=Path, metavar="PNG", help="also write a preview: pictures, waveform, mouth curve")
    make.add_argument("--threads", type=_positive, metavar="N", help="processor threads (default: all)")
    make.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda for Wan-S2V if there)")
    make.add_argument("--parallel", metavar="LAYOUT", help="how the processes of torchrun share the work: "
          "guidance=2,ulysses=4,ring=1,vae=split (default: by their number)")  # fmt: skip
    precisions = ("float32", "bfloat16")
    make.add_argument("--dtype", choices=precisions, help="precision of the weights (default: bfloat16 on a GPU)")

    puppets = make.add_argument_group("drawn characters")
    _only(puppets, "puppet", "--text-guidance", type=_strength, metavar="G", help="how strictly to follow the prompt")
    _only(puppets, "puppet", "--audio-guidance", type=_strength, metavar="G", help="how strongly to follow the voice")

    wan = make.add_argument_group("Wan-S2V checkpoints", "a run that was interrupted goes on after its last clip")
    _only(wan, "s2v", "--negative-prompt", metavar="WORDS", help="what not to show")
    _only(wan, "s2v", "--guidance", type=_strength, metavar="G", help="how strictly to follow prompt and voice (4.5)")
    _only(wan, "s2v", "--shift", type=_strength, metavar="S", help="of the noise levels (3)")
    _only(wan, "s2v", "--solver", choices=("unipc", "dpm++"), help="of the denoising (unipc)")
    _only(wan, "s2v", "--max-area", type=_area, metavar="N", help="most pixels, a number or WIDTHxHEIGHT (1024x704)")
    _only(wan, "s2v", "--size", type=_sides, metavar="WxH", help="exact size of the video (default: by the portrait)")
    _only(wan, "s2v", "--cover", help="cut more of the portrait off where a side would be filled up with black")
    _only(wan, "s2v", "--frames", type=_positive, metavar="N", help="pictures at most (default: as the voice lasts)")
    _only(wan, "s2v", "--clips", type=_positive, metavar="N", help="clips at most (default: as the voice lasts)")
    _only(wan, "s2v", "--clip-frames", type=_positive, metavar="N", help="pictures per clip, a multiple of 4 (80)")
    _only(wan, "s2v", "--start-from-ref", help="begin with the portrait itself as the first picture")
    _only(wan, "s2v", "--pose", type=Path, metavar="MP4", help="a video that shows how to move")
    _only(wan, "s2v", "--match-colour", help="bring the colours of later clips back to those of the first")
    _only(wan, "s2v", "--sequential", help="less memory, more time: one prediction after the other")
    _only(wan, "s2v", "--memory", metavar="SWITCHES", help="fit a smaller card, in the words that `plan` suggests: "
          "weights=cast_fp8,offload=block,text_encoder=cpu,vae=tiled,...")  # fmt: skip
    _only(wan, "s2v", "--compile", help="compile the blocks of the model: slow to begin with, faster then")
    _only(wan, "s2v", "--opening", choices=("hold", "cut"), help="where the voice sounds before the first picture: "
          "hold that picture (default), or cut these 3/16 s of the voice")  # fmt: skip
    _only(wan, "s2v", "--official-timing", help="pictures 3/16 s before their sound, as the official program has it")


_KINDS: dict[str, str] = {}  # the kind of checkpoint that an argument is for


def _only(group: Any, kind: str, flag: str, **more: Any) -> None:
    """An argument for one kind of checkpoint; it is None where it is not given."""
    if not {"type", "choices", "metavar"} & set(more):
        more["action"] = "store_true"
    group.add_argument(flag, default=None, **more)
    _KINDS[flag] = kind


def _value(args: argparse.Namespace, flag: str) -> Any:
    return getattr(args, flag.strip("-").replace("-", "_"))


def _check_kind(args: argparse.Namespace, kind: str) -> None:
    """Every argument must mean something to the checkpoint."""
    from talkingdit.errors import UserError

    for flag, wanted in _KINDS.items():
        if _value(args, flag) is not None and wanted != kind:
            names = {"puppet": "models of drawn characters", "s2v": "Wan-S2V checkpoints"}
            given = "the shipped one" if args.checkpoint is None else f"{str(args.checkpoint)!r}"
            raise UserError(f"generate: {flag} is for {names[wanted]} only, and {given} is none of these.")


def _generate(args: argparse.Namespace) -> None:
    from talkingdit.distributed.team import Team

    team = Team.start()
    try:
        _generate_in(team, args)
        team.end()
    except BaseException as error:
        if team.size == 1:
            raise
        team.exit(_tell(error))


def _generate_in(team: Team, args: argparse.Namespace) -> None:
    """What every process does."""
    from talkingdit.distributed.layout import Layout
    from talkingdit.families.wan_s2v.checkpoint import owns as is_s2v
    from talkingdit.pipelines.job import prepare

    def checked() -> tuple[Inputs, str, Layout]:
        layout = Layout.parse(args.parallel or "")
        job = prepare(args.image, args.audio, args.output, sheet=args.sheet)
        whole = args.checkpoint is not None and args.checkpoint.is_dir() and is_s2v(args.checkpoint)
        _check_kind(args, "s2v" if whole else "puppet")
        return job, "s2v" if whole else "puppet", layout

    job, kind, layout = team.first(checked)
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    result = (_generate_s2v if kind == "s2v" else _generate_puppet)(args, job, team, layout)
    if team.rank:
        return
    print(
        f"{result.path}: {result.frames} frames, {result.seconds:.2f} s of video at {result.fps} fps, "
        f"made in {result.took:.1f} s"
    )
    if args.sheet is not None:
        print(f"{args.sheet}: preview")


def _load(
    args: argparse.Namespace, device: str, team: Team, memory: Memory | None = None
) -> PuppetCheckpoint | WanS2VCheckpoint:
    """The checkpoint on the device of this process; with `memory` by way of the host."""
    import torch

    from talkingdit import families
    from talkingdit.errors import UserError
    from talkingdit.models import load_checkpoint
    from talkingdit.pipelines.memory import fit

    device = team.device(device)
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"generate: the device {device!r} cannot be used ({reason}).") from error
    name = args.dtype or ("bfloat16" if chosen.type == "cuda" else "float32")
    if memory is None:
        return load_checkpoint(args.checkpoint, getattr(torch, name), chosen)
    checkpoint = load_checkpoint(args.checkpoint, getattr(torch, name), "cpu")
    fit(checkpoint, memory, chosen, families.of_folder(checkpoint.folder).units)
    return checkpoint


def _memory(args: argparse.Namespace) -> Memory | None:
    from talkingdit.errors import UserError
    from talkingdit.pipelines.memory import Memory

    try:
        return None if args.memory is None else Memory.parse(args.memory)
    except ValueError as error:
        raise UserError(f"generate: --memory: {str(error).removeprefix('Memory: ')}.") from error


def _generate_puppet(args: argparse.Namespace, job: Inputs, team: Team, layout: Layout) -> Result:
    from tqdm import tqdm

    from talkingdit.distributed.layout import plan
    from talkingdit.families.puppet.checkpoint import PuppetCheckpoint
    from talkingdit.families.puppet.pipeline import PuppetPipeline, Sampling
    from talkingdit.pipelines.job import make_video

    checkpoint = team.together(lambda: _load(args, args.device or "cpu", team))
    assert isinstance(checkpoint, PuppetCheckpoint)
    sampling = Sampling(args.text_guidance, args.audio_guidance, args.steps, args.seed)
    branches = PuppetPipeline(checkpoint).branches(sampling)
    parallel = plan(team, layout, len(branches), checkpoint, _warn)
    with tqdm(unit="step", desc="generating", disable=True if team.rank else None) as bar:

        def advance(total: int) -> None:
            bar.total = total
            bar.update()

        return make_video(
            *(job, checkpoint, args.prompt, sampling),
            upscale=args.upscale,
            progress=advance,
            warn=_warn,
            parallel=parallel,
        )


def _generate_s2v(args: argparse.Namespace, job: Inputs, team: Team, layout: Layout) -> Result:
    import torch
    from tqdm import tqdm

    from talkingdit.distributed.layout import plan
    from talkingdit.families.wan_s2v.checkpoint import WanS2VCheckpoint, WanS2VSettings
    from talkingdit.families.wan_s2v.pipeline import S2VSampling
    from talkingdit.families.wan_s2v.video import S2VOptions, check_request, make_s2v_video

    options = S2VOptions(
        size=args.size,
        max_area=args.max_area,
        cover=bool(args.cover),
        pose=args.pose,
        frames=args.frames,
        clips=args.clips,
        opening=args.opening or "hold",
        official_timing=bool(args.official_timing),
    )
    sampling = S2VSampling(
        steps=args.steps,
        guidance=args.guidance,
        shift=args.shift,
        solver=args.solver,
        negative_prompt=args.negative_prompt,
        clip_frames=args.clip_frames,
        seed=args.seed,
        start_from_reference=bool(args.start_from_ref),
        match_colour=bool(args.match_colour),
        batched=not args.sequential,
    )

    def checked() -> tuple[Memory | None, int]:
        # Loading takes minutes: what can be wrong is found before.
        file = args.checkpoint / "pipeline.json"
        settings = WanS2VSettings.load(file) if file.is_file() else WanS2VSettings()
        filled, _, _ = check_request(job, settings, sampling, options)
        layout.filled(team.size, filled.predictions, _heads(args.checkpoint))
        return _memory(args), filled.predictions

    memory, predictions = team.first(checked)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = team.together(lambda: _load(args, device, team, memory))
    assert isinstance(checkpoint, WanS2VCheckpoint)
    parallel = plan(team, layout, predictions, checkpoint, _warn)
    if args.compile:
        # Messages between processes stay out of the compiled parts.
        checkpoint.transformer.compile_repeated_blocks(fullgraph=parallel.context is None)
    # What changes pictures, not only time and room.
    variant = "" if memory is None else f"{memory.weights} {memory.residual} {memory.absorb_audio} {memory.vae}"
    with tqdm(unit="step", desc="generating", disable=True if team.rank else None) as bar:

        def advance(done: int, total: int) -> None:
            if bar.total is None:
                bar.reset(total)
                bar.update(done - 1)  # what an earlier run has done
            bar.update()

        return make_s2v_video(
            *(job, checkpoint, args.prompt, sampling, options, variant),
            upscale=args.upscale,
            progress=advance,
            warn=_warn,
            parallel=parallel,
        )


def _heads(folder: Path) -> int | None:
    """Heads of the attention of a Wan-S2V checkpoint, where its config.json tells."""
    for file in (folder / "config.json", folder / "transformer" / "config.json"):
        try:
            values = json.loads(file.read_text())
            return int(values.get("num_heads", values.get("num_attention_heads")))
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # what is wrong with it is told when it is loaded
    return None


def _warn(sentence: str) -> None:
    sys.stderr.write(f"talkingdit: {sentence}\n")


def _tell(error: BaseException) -> int:
    """Say what ended one of several processes; returns its exit status."""
    from talkingdit.distributed.team import OtherRankError, lost, status_of
    from talkingdit.errors import UserError

    where = f"process {_rank()}: " if _rank() else ""
    if isinstance(error, KeyboardInterrupt):
        _warn(str(error) or "interrupted; nothing was written.")
    elif isinstance(error, UserError | ImportError):
        _warn(f"{where}{error}")
    elif lost(error):
        _warn(f"{where}stopped, because another process has ended.")
    elif not isinstance(error, OtherRankError):
        traceback.print_exception(error)
    return status_of(error)


def _add_info(verbs: Any) -> None:
    info = verbs.add_parser(
        "info", help="say what was built and what was found", description="What was built and what was found."
    )
    info.set_defaults(run=_info)


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

    run: Callable[[argparse.Namespace], None] = args.run
    try:
        run(args)
    except UserError as error:
        _warn(str(error))
        return USER_ERROR
    except ImportError as error:
        _warn(str(error))
        return 1
    except KeyboardInterrupt as stop:
        _warn(str(stop) or "interrupted; nothing was written.")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
