# SPDX-License-Identifier: Apache-2.0
"""The package in one function, for programs."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from talkingdit import families
from talkingdit.api.asking import PipelineCall, ask, refuse_loading
from talkingdit.api.road import made
from talkingdit.models import find_checkpoint, load_checkpoint
from talkingdit.pipelines.tuning import Tuning, check_dtype, load_tuned, open_device

if TYPE_CHECKING:
    import torch

    from talkingdit.pipelines.job import Result


def generate(
    image: Any,
    audio: Any,
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
    resume: bool = False,
    audio_rate: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
    **options: Any,
) -> Result:
    """Make a video of a portrait speaking a voice recording.

    Args:
        image: the portrait: a path, a PIL image, or uint8 [H, W, 3] RGB.
        audio: the voice, any format, rate and number of channels; or (samples, rate); "-" is standard input, heard
            while it is spoken.
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
        resume: refuse to start over where an interrupted call has left clips of other settings, instead of throwing
            them away.
        audio_rate: of raw 16-bit mono sound on standard input, in Hz; None for sound in a container.
        progress: called with the number of denoising steps done and of all of them.
        warn: called with a sentence about what was done differently from what may be expected.
        options: of the checkpoint's family, such as `seed`, `steps` or `guidance`: see its `Options`. Those that
            change the model itself (`memory`, `compile`) need a folder, too.

    Returns:
        Path, number of frames and rate of the video, and the seconds it took.

    Raises:
        UserError: a file or an option is not good, the family has no such option, memory runs out, or the video cannot
            be written. Files are checked before a model is loaded. Or a loaded checkpoint is to be changed.
    """
    source: Any = checkpoint
    folder = find_checkpoint(getattr(source, "folder", source))
    family = families.of_folder(folder)
    wish = PipelineCall(
        image=image,
        audio=audio,
        prompt=prompt,
        output=output,
        sheet=sheet,
        upscale=upscale,
        live=live,
        resume=resume,
        audio_rate=audio_rate,
    )
    asked = ask(family, folder, wish, options)
    try:
        tuning = Tuning.of(getattr(asked.options, "memory", ""), precision, attention)
        if hasattr(checkpoint, "folder"):
            refuse_loading(asked.options, tuning)
            loaded = checkpoint
        else:
            home = open_device(device)
            if dtype is not None:
                check_dtype(dtype, "generate")
            loaded = load_tuned(lambda place: load_checkpoint(folder, dtype, place), tuning, home, family.units)
            if getattr(asked.options, "compile", False):
                loaded.transformer.compile_repeated_blocks(fullgraph=True)
        from talkingdit.pipelines.job import Talk

        talk = Talk(progress=progress, warn=warn)
        return made(family, loaded, asked.inputs, asked.outline, talk=talk, variant=tuning.variant)
    finally:
        asked.materials.close()
