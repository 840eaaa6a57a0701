# SPDX-License-Identifier: Apache-2.0
"""The verb `talkingdit generate`: flags -> files -> outline -> models -> video, alone or as one of several processes.

Rank 0 alone reads the command line and the files. Everything that can be wrong with them is told before a model is
loaded, and what needs no torch before that is.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from talkingdit import families
from talkingdit.checkpoints.bounds import check_options
from talkingdit.cli.flags import Group, Values, fields_of, read, spellings_of
from talkingdit.cli.messages import processes, rank, tell_of_one, warn
from talkingdit.errors import UserError
from talkingdit.families import Family, GenerationOptions
from talkingdit.families.flag import Flag
from talkingdit.families.lora_options import LoraOptions

if TYPE_CHECKING:
    from talkingdit.distributed.layout import Layout
    from talkingdit.distributed.team import Team
    from talkingdit.pipelines.inputs import Inputs, Outline
    from talkingdit.pipelines.job import Result
    from talkingdit.pipelines.tuning import Tuning

COMMAND = "talkingdit generate"
ABOUT = "Make a video of a portrait speaking a voice recording."


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of every family."""

    image: Annotated[Path, Flag("PNG")]
    """the portrait"""
    audio: Annotated[Path | None, Flag("WAV")] = None
    """the voice: WAV, FLAC, MP3, OGG, ... (required where no other flag brings voices); - is standard input, spoken
    while the video is made"""
    audio_rate: Annotated[int | None, Flag("HZ")] = None
    """of raw 16-bit mono sound on --audio - (default: any container)"""
    prompt: Annotated[str, Flag("WORDS")] = ""
    """what to show"""
    output: Annotated[Path, Flag("MP4", also=("-o",))]
    """the video to write; a run that was interrupted goes on after its last clip; - is standard output"""
    live: bool = False
    """let the video be watched while it is made: it grows under its name (always so with - for voice or video)"""
    resume: bool = False
    """refuse to start over where an interrupted run has left clips of other settings, instead of throwing them away"""
    checkpoint: Annotated[Path | None, Flag("DIR")] = None
    """folder of the model, or drawn_people, which ships (default: the other one shipped, of one drawn character)"""
    upscale: Annotated[int, Flag("N")] = 1
    """enlarge the frames N times"""
    sheet: Annotated[Path | None, Flag("PNG")] = None
    """also write a preview: frames, waveform, mouth curve"""
    threads: Annotated[int | None, Flag("N")] = None
    """processor threads (default: all)"""
    device: Annotated[str | None, Flag("NAME")] = None
    """cpu, cuda, cuda:1, ... (default: cuda if there, but cpu for drawn characters)"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """precision of the weights (default: bfloat16 on a GPU)"""
    precision: Literal["fp8", "int8"] | None = None
    """let large layers compute in eight bits: faster on recent GPUs, nearly the same video"""
    attention: Literal["auto", "flash", "efficient", "cudnn", "math", "flash3", "flash3_fp8", "sage"] = "auto"
    """kernel of attention; auto is the fastest exact one, as `talkingdit info` tells"""
    parallel: Annotated[str, Flag("LAYOUT")] = ""
    """how the processes of torchrun share the work: guidance=2,ulysses=4,ring=1,vae=split (default: by their number)"""

    def __post_init__(self) -> None:
        check_options(self, "generate")
        for name in ("upscale", "threads", "audio_rate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"generate: {name} must be at least 1, got {value}")


@dataclass(frozen=True)
class GenerationRequest:
    """A video that is asked for, found to be possible. It bears pickling: rank 0 hands it to the others."""

    flags: Flags
    loras: LoraOptions
    family: str
    options: GenerationOptions
    layout: Layout
    inputs: Inputs
    outline: Outline
    tuning: Tuning

    @property
    def folder(self) -> Path:
        """Of the checkpoint."""
        return _folder(self.flags)


def generate(argv: Sequence[str]) -> None:
    """Carry out the verb.

    Raises:
        UserError: something is wrong with the command line, a file, or the checkpoint.
        KeyboardInterrupt: with a sentence about what is kept.
        SystemExit: after the help, and as one of several processes after any error.
    """
    if {"-h", "--help"} & set(argv):
        read(COMMAND, ABOUT, _help_groups(argv), argv)
    if processes() == 1:
        request = prepare(argv)
        from talkingdit.distributed.team import ALONE

        _generate(request, ALONE)
        return
    from talkingdit.distributed.team import Team

    team = Team.start()
    try:
        _generate(team.on_rank_0(lambda: prepare(argv)), team)
        team.end()
    except BaseException as error:
        team.exit(tell_of_one(error))


# ---- Flags -----------------------------------------------------------------------------------------------------------


def prepare(argv: Sequence[str]) -> GenerationRequest:
    """Read the flags and the files and outline the video, without any model.

    Raises:
        UserError: something is wrong with them.
    """
    family, values = _read(argv)
    flags, loras, options = values.make(Flags), values.make(LoraOptions), values.make(family.options)
    loras.check_files()

    from talkingdit.api.road import outlined
    from talkingdit.media.targets import check_apart
    from talkingdit.pipelines.inputs import Job

    output, pipe = _target(flags)
    read_too = {"checkpoint": _folder(flags)} | {f"lora {n}": choice.path for n, choice in enumerate(loras.lora, 1)}
    for name, target in (("output", output), ("sheet", flags.sheet)):
        check_apart({name: target}, read_too)
    job = Job(
        image=flags.image,
        audio=sound_of(values, flags.audio, options),
        output=output,
        live=flags.live or pipe is not None or str(flags.audio) == "-",
        pipe=pipe,
        resume=flags.resume,
        audio_rate=flags.audio_rate,
        sheet=flags.sheet,
        prompt=flags.prompt,
        upscale=flags.upscale,
    )
    inputs, outline = outlined(family, _folder(flags), job, options)

    from talkingdit.distributed.layout import Layout
    from talkingdit.pipelines.tuning import Tuning

    layout = Layout.parse(flags.parallel)
    tuning = Tuning.of(getattr(options, "memory", ""), flags.precision, flags.attention)
    outline = loras.checked(family, _folder(flags), outline)
    layout.resolved(processes(), outline.predictions, _heads(_folder(flags)))
    idle = []
    if processes() == 1 and layout.vae is not None:
        idle.append("`--parallel vae=` has no effect on one process.")
    if flags.audio_rate is not None and not inputs.job.spoken:
        idle.append("`--audio-rate` has no effect on a recording, which says its rate itself.")
    if flags.resume and (inputs.job.spoken or inputs.job.pipe is not None):
        idle.append("`--resume` has no effect on a voice or a video in a pipe, of which no clips are kept.")
    outline = replace(outline, warnings=(*outline.warnings, *idle))
    return GenerationRequest(flags, loras, family.name, options, layout, inputs, outline, tuning)


def _target(flags: Flags) -> tuple[Path, int | None]:
    """Where the video is written, and the descriptor of the pipe that it goes into instead, if it does.

    Whatever else writes to standard output writes to standard error from then on.

    Raises:
        UserError: standard output is a terminal.
    """
    if str(flags.output) != "-":
        return flags.output, None
    if os.isatty(1):
        raise UserError("output -: expected a pipe or a file, got a terminal.")
    sys.stdout.flush()
    pipe = os.dup(1)
    os.dup2(2, 1)
    return _scratch() / "output.mp4", pipe


def _scratch() -> Path:
    """A folder that goes with this process."""
    from talkingdit.scratch import ScratchFolder

    folder = ScratchFolder()
    atexit.register(folder.cleanup)
    return Path(folder.name)


def sound_of(values: Values, audio: Path | None, options: GenerationOptions) -> Path:
    """The sound of the video: the one recording, or all voices together, in a file that goes with this process."""
    voices = options.voices()
    if audio is None and not voices:
        values.refuse("the following arguments are required: --audio")
    if audio is not None and voices:
        values.refuse("--audio must be left out where speakers bring their recordings")
    if audio is not None or len(voices) == 1:
        return audio or voices[0]

    from talkingdit.media.mixing import mix_voices

    return mix_voices(voices, _scratch() / "voices.flac")


def _read(argv: Sequence[str]) -> tuple[Family, Values]:
    """The family of the checkpoint, which decides what flags there are, and their values."""
    folder = checkpoint_in(argv)
    family = families.get(families.DEFAULT) if folder is None else families.of_folder(folder)
    values = read(COMMAND, ABOUT, _groups(family), _with_portrait(argv))
    for word in values.unknown:
        owners = [other.title for other in _families() if _flag_in(word, other.options)]
        if owners:
            given = "the shipped one" if folder is None else repr(str(folder))
            values.refuse(
                f"{word.partition('=')[0]} is for checkpoints of {', '.join(owners)} only, and {given} is none of these"
            )
    values.refuse_unknown()
    return family, values


def checkpoint_in(argv: Sequence[str]) -> Path | None:
    """The folder that `--checkpoint` names, before flags are known."""
    from talkingdit.models import find_checkpoint

    found = _value_in(argv, "--checkpoint")
    return find_checkpoint(found) if found else None


def _value_in(argv: Sequence[str], flag: str) -> str | None:
    found = None
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        name, given, value = word.partition("=")
        if name == flag and (given or not following.startswith("-")):
            found = value if given else following
    return found


def _with_portrait(argv: Sequence[str]) -> Sequence[str]:
    """A video that is changed shows the person: it stands for the portrait where none is given."""
    video = _value_in(argv, "--video")
    return [*argv, f"--image={video}"] if video and _value_in(argv, "--image") is None else argv


def _families() -> list[Family]:
    return [families.get(name) for name in families.names()]


def _flag_in(word: str, kind: type[Any]) -> bool:
    """Is a word a flag of a dataclass?"""
    return word.partition("=")[0] in spellings_of(kind)


def _groups(family: Family) -> list[Group]:
    return [Group(Flags), Group(LoraOptions), Group(GenerationOptions), Group(family.options, family.title)]


def _help_groups(argv: Sequence[str]) -> list[Group]:
    """With a checkpoint the flags of its family; without one those of all, by the families that have them."""
    folder = checkpoint_in(argv)
    if folder is not None:
        return _groups(families.of_folder(folder))
    owners: dict[str, list[Family]] = {}
    for family in _families():
        for name in fields_of(family.options):
            owners.setdefault(name, []).append(family)
    groups = [Group(Flags), Group(LoraOptions), Group(GenerationOptions)]
    for sharing in dict.fromkeys(tuple(group) for group in owners.values()):
        others = frozenset(name for name, group in owners.items() if tuple(group) != sharing)
        title = "" if len(sharing) == len(_families()) else ", ".join(family.title for family in sharing)
        groups.append(Group(sharing[0].options, title, without=others))
    return groups


# ---- The road --------------------------------------------------------------------------------------------------------


def _generate(request: GenerationRequest, team: Team) -> None:
    """What every process does."""
    import torch

    from talkingdit.api.road import made
    from talkingdit.pipelines.job import Talk
    from talkingdit.pipelines.parallel import share_work

    flags, options = request.flags, request.options
    family = families.get(request.family)
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    checkpoint = team.on_all_ranks(lambda: _load(request, family, team))
    parallel = share_work(team, request.layout, request.outline.predictions, checkpoint, warn)
    if getattr(options, "compile", False):
        # Messages between processes stay out of the compiled parts.
        checkpoint.transformer.compile_repeated_blocks(fullgraph=parallel.context is None)
    with _progress() as progress:
        result = made(
            family,
            checkpoint,
            request.inputs,
            request.outline,
            talk=Talk(progress=progress, warn=warn),
            variant=request.tuning.variant,
            parallel=parallel,
        )
    if not team.rank:
        _report(result, flags)


def _load(request: GenerationRequest, family: Family, team: Team) -> Any:
    """The checkpoint on the device of this process."""
    from talkingdit.nn.bfloat16 import multiplies_bfloat16
    from talkingdit.pipelines.tuning import load_tuned, open_device, usual_device, weights_dtype

    flags = request.flags
    device = open_device(team.device(flags.device or usual_device(request.options.small)))
    dtype = weights_dtype(flags.dtype, device)
    if device.type == "cpu" and flags.dtype == "bfloat16" and not multiplies_bfloat16(device) and not rank():
        warn("--dtype bfloat16: this processor has no instructions for it, float32 is several times faster.")
    load = family.checkpoint.load_checkpoint
    if not _changed(request) and processes() == 1:
        load = getattr(family.checkpoint, "load_bare", load)
    return load_tuned(
        lambda place: load(request.folder, dtype, place),
        request.tuning,
        device,
        family.units,
        request.loras.apply,
    )


def _changed(request: GenerationRequest) -> bool:
    """Is the model changed after it is loaded? That is what models of diffusers are for."""
    from talkingdit.pipelines.tuning import Tuning

    compiles = getattr(request.options, "compile", False)
    return bool(request.loras.lora or compiles) or request.tuning != Tuning()


def _folder(flags: Flags) -> Path:
    """Of the checkpoint."""
    from talkingdit.models import find_checkpoint

    return find_checkpoint(flags.checkpoint)


def _heads(folder: Path) -> int | None:
    """Heads of the attention of a checkpoint's transformer, where its config.json tells."""
    for file in (folder / "config.json", folder / "transformer" / "config.json"):
        try:
            values = json.loads(file.read_text())
            return int(values.get("num_heads", values.get("num_attention_heads")))
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # what is wrong with it is told when it is loaded
    return None


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar that counts denoising steps, on a terminal of rank 0."""
    from tqdm import tqdm

    with tqdm(unit="step", desc="generating", disable=True if rank() else None) as bar:

        def advance(done: int, total: int) -> None:
            if bar.total is None:
                bar.reset(total)
            bar.update(done - bar.n)  # at first also what an earlier run has done

        yield advance


def _report(result: Result, flags: Flags) -> None:
    piped = str(flags.output) == "-"
    out = sys.stderr if piped else sys.stdout
    first = "" if result.first_after is None else f", the first frame after {result.first_after:.1f} s"
    out.write(
        f"{'standard output' if piped else result.path}: {result.frames} frames, {result.seconds:.2f} s of video at "
        f"{result.fps} fps, made in {result.took:.1f} s{first}\n"
    )
    if flags.sheet is not None:
        out.write(f"{flags.sheet}: preview\n")
