# SPDX-License-Identifier: Apache-2.0
"""The verb `talkingdit calibrate`: the coefficients of a checkpoint's step cache (`generate --step-cache`).

The first clips of a video are made with every step computed; how much the input of the blocks changes from step to
step, and how much what they add, are the pairs that a polynomial is fitted to.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from talkingdit import families
from talkingdit.cli.flags import Group, read
from talkingdit.cli.generate import checkpoint_in, sound_of
from talkingdit.cli.messages import warn
from talkingdit.errors import UserError
from talkingdit.families import GenerationOptions
from talkingdit.families.flag import Flag

COMMAND = "talkingdit calibrate"
ABOUT = "Fit the step cache to a checkpoint, from the first clips of a video."


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of every family."""

    image: Annotated[Path, Flag("PNG")]
    """a portrait"""
    audio: Annotated[Path | None, Flag("WAV")] = None
    """a voice, where no speakers bring theirs"""
    prompt: Annotated[str, Flag("WORDS")] = ""
    """what it shows"""
    checkpoint: Annotated[Path | None, Flag("DIR")] = None
    """folder of the model, or drawn_people, which ships (default: the other one shipped, of one drawn character)"""
    output: Annotated[Path | None, Flag("JSON", also=("-o",))] = None
    """where to write the coefficients (default: step_cache.json in the folder of the model)"""
    measured_clips: Annotated[int, Flag("N")] = 2
    """clips to measure, where a video is made clip by clip"""
    device: Annotated[str | None, Flag("NAME")] = None
    """cpu, cuda, ... (default: cuda if there)"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """precision of the weights (default: bfloat16 on a GPU)"""

    def __post_init__(self) -> None:
        if self.measured_clips < 1:
            raise ValueError(f"calibrate: measured_clips must be at least 1, got {self.measured_clips}")


def calibrate(argv: Sequence[str]) -> None:
    """Carry out the verb.

    Raises:
        UserError: something is wrong with the command line, a file, or the checkpoint.
    """
    folder = checkpoint_in(argv)
    family = families.get(families.DEFAULT) if folder is None else families.of_folder(folder)
    values = read(COMMAND, ABOUT, [Group(Flags), Group(GenerationOptions), Group(family.options, family.title)], argv)
    values.refuse_unknown()
    flags, options = values.make(Flags), values.make(family.options)
    audio = sound_of(values, flags.audio, options)

    from talkingdit.media.files import SPEECH_RATE, read_audio, read_image
    from talkingdit.media.targets import check_apart, check_writable
    from talkingdit.models import find_checkpoint
    from talkingdit.pipelines.inputs import Inputs, Job

    folder = find_checkpoint(flags.checkpoint)
    target = folder / "step_cache.json" if flags.output is None else flags.output
    if target.suffix.lower() != ".json":
        raise UserError(f"output {str(target)!r}: expected a name that ends in .json, got {target.suffix!r}")
    read_too = {f"checkpoint ({file.name})": file for file in folder.rglob("*.json") if file.name != "step_cache.json"}
    check_apart({"output": target}, {"image": flags.image, "audio": audio, **options.files(), **read_too})
    check_writable(target)
    job = Job(image=flags.image, audio=audio, output=target, prompt=flags.prompt)
    inputs = Inputs(job, read_image(flags.image), read_audio(audio, SPEECH_RATE))
    outline = family.outline.outline(inputs, family.checkpoint.read_settings(folder), options)
    if getattr(options, "guidance_interval", "0-1") != "0-1":
        raise UserError("calibrate: all steps are measured alike; leave `--guidance-interval` out.")
    if outline.steps < 3:
        raise UserError(f"calibrate: a fit takes at least 3 steps, got {outline.steps}.")

    from talkingdit.lock import alone
    from talkingdit.pipelines.long_video import generate_clips
    from talkingdit.pipelines.step_cache import Fitted, Recorder, fit, write_fitted
    from talkingdit.pipelines.tuning import open_device, usual_device, weights_dtype

    with alone([target], COMMAND):
        device = open_device(flags.device or usual_device(options.small), "calibrate")
        checkpoint = family.checkpoint.load_checkpoint(folder, weights_dtype(flags.dtype, device), device)
        pipeline = family.pipeline.open_pipeline(checkpoint)
        if not hasattr(pipeline, "recorder"):
            raise UserError(f"calibrate: {family.title} has no step cache.")
        pipeline.recorder = recorder = Recorder()
        # Where a video is denoised as a whole, in stages, all of them are measured.
        clips = sum(steps > 0 for steps in outline.work) or min(flags.measured_clips, outline.clips)
        for clip in generate_clips(pipeline, pipeline.encode(inputs, outline), outline.clips):
            warn(f"clip {clip.index + 1} of {clips} is measured.")
            if clip.index + 1 == clips:
                break
        coefficients = fit(recorder.changes_in, recorder.changes_out)
        origin = {"steps": outline.steps, "clips": clips, "pairs": len(recorder.changes_in)}
        write_fitted(target, Fitted(tuple(coefficients)), **origin)
        sys.stdout.write(f"{target}: {len(coefficients)} coefficients of {len(recorder.changes_in)} pairs of changes\n")
