# SPDX-License-Identifier: Apache-2.0
"""The package in one function, for programs."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from talkingdit import families
from talkingdit.errors import UserError
from talkingdit.models import default_checkpoint, load_checkpoint
from talkingdit.pipelines.inputs import Job, check_enlarged, check_heard, read_inputs
from talkingdit.pipelines.tuning import Tuning, load_tuned

if TYPE_CHECKING:
    import torch

    from talkingdit.pipelines.job import Result


def generate(
    image: str | PathLike[str],
    audio: str | PathLike[str],
    output: str | PathLike[str],
    *,
    prompt: str = "",
    checkpoint: str | PathLike[str] | Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    precision: Literal["fp8", "int8"] | None = None,
    attention: str = "auto",
    sheet: str | PathLike[str] | None = None,
    upscale: int = 1,
    live: bool = False,
    audio_rate: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
    **options: Any,
) -> Result:
    """Make a video of a portrait speaking a voice recording.

    Args:
        image: the portrait, an image file.
        audio: the voice, any format, rate and number of channels; "-" is standard input, heard while it is spoken.
        output: the .mp4 to write.
        prompt: what to show.
        checkpoint: a folder, or what `talkingdit.models.load_checkpoint` gave; None is the model that ships with the
            package.
        dtype, device: where a folder is loaded.
        precision: let large layers of a folder that is loaded compute in eight bits.
        attention: kernel of its attention, one of `talkingdit.nn.attention_backends`; "auto" is the fastest exact one.
        sheet: a PNG with a preview to write.
        upscale: enlarge the frames so many times.
        live: let the video be watched while it is made; always so with a voice from standard input.
        audio_rate: of raw 16-bit mono sound on standard input, in Hz; None for sound in a container.
        progress: called with the number of denoising steps done and of all of them.
        warn: called with a sentence about what was done differently from what may be expected.
        options: of the checkpoint's family, such as `seed`, `steps` or `guidance`: see its `Options`. Those that
            change the model itself (`memory`, `compile`) need a folder, too.

    Returns:
        Path, number of frames and rate of the video, and the seconds it took.

    Raises:
        UserError: a file or an option is not good, memory runs out, or the video cannot be written. Files are checked
            before a model is loaded. Or a loaded checkpoint is to be changed.
        TypeError: the family has no such option.
    """
    folder = Path(default_checkpoint() if checkpoint is None else getattr(checkpoint, "folder", checkpoint))
    family = families.of_folder(folder)
    try:
        chosen = family.options(**options)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    job = Job(
        image=Path(image),
        audio=Path(audio),
        output=Path(output),
        sheet=None if sheet is None else Path(sheet),
        prompt=prompt,
        upscale=upscale,
        live=live or str(audio) == "-",
        audio_rate=audio_rate,
    )
    inputs = read_inputs(job, chosen.files())
    outline = family.outline.outline(inputs, family.checkpoint.read_settings(folder), chosen)
    check_heard(job, outline)
    check_enlarged(job, outline)
    tuning = Tuning.of(getattr(chosen, "memory", ""), precision, attention)
    compiled = getattr(chosen, "compile", False)
    from talkingdit.pipelines.job import Talk, make_video

    if hasattr(checkpoint, "folder"):
        if tuning != Tuning() or compiled:
            raise UserError(
                "generate: precision, attention, memory and compile change a model while it is loaded: expected the "
                "folder of a checkpoint with them, got one that is loaded."
            )
        loaded = checkpoint
    else:
        loaded = load_tuned(lambda place: load_checkpoint(folder, dtype, place), tuning, device, family.units)
        if compiled:
            loaded.transformer.compile_repeated_blocks(fullgraph=True)
    curves = None if family.preview is None else family.preview.Curves()
    pipeline = family.pipeline.open_pipeline(loaded)
    talk = Talk(progress=progress, warn=warn)
    return make_video(inputs, outline, pipeline, curves=curves, talk=talk, variant=tuning.variant)
