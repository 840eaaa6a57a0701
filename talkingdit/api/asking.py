# SPDX-License-Identifier: Apache-2.0
"""What a program asks for, read and checked before any model computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

from talkingdit.api.materials import Materials
from talkingdit.api.options import chosen
from talkingdit.api.road import outlined
from talkingdit.checkpoints.lora_choice import SETTING
from talkingdit.errors import UserError
from talkingdit.families import Family, GenerationOptions
from talkingdit.pipelines.inputs import Inputs, Job, Outline
from talkingdit.pipelines.tuning import Tuning

LOADING = ("memory", "compile")  # options that change a model while it is loaded


@dataclass(frozen=True)
class CheckedCall:
    """A video that was asked for and found to be possible."""

    inputs: Inputs
    outline: Outline
    options: GenerationOptions
    materials: Materials

    @property
    def folder(self) -> Path:
        """On whose disk large things may lie."""
        return self.inputs.job.output.parent


@dataclass(frozen=True, kw_only=True)
class PipelineCall:
    """What a call of a pipeline says of a video, as it says it; see `TalkingPipeline.__call__`."""

    image: Any = None
    audio: Any = None
    prompt: str = ""
    output: str | PathLike[str] | None = None
    sheet: str | PathLike[str] | None = None
    upscale: int = 1
    live: bool = False
    resume: bool = False
    audio_rate: int | None = None


def ask(
    family: Family, folder: Path, wish: PipelineCall, options: Mapping[str, Any], adapters: Sequence[str] = ()
) -> CheckedCall:
    """Read what a wish names, and find out what video it gives.

    Args:
        family, folder: of the checkpoint.
        wish: what is wanted.
        options: of the family, by name.
        adapters: what LoRAs are on the model, in words that finished clips depend on.

    Raises:
        UserError: a file or an option is not good.
    """
    materials = Materials()
    try:
        given = chosen(family, options, materials)
        image, audio = _portrait(wish.image, given, materials), _voice(wish.audio, given, materials)
        job = Job(
            image=image,
            audio=audio,
            output=_target(wish, materials),
            sheet=None if wish.sheet is None else path_of(wish.sheet, "sheet"),
            prompt=_prompt(wish.prompt),
            upscale=_whole(wish.upscale, "upscale"),
            live=wish.live or (str(audio) == "-" and wish.output is not None),
            resume=wish.resume,
            audio_rate=None if wish.audio_rate is None else _whole(wish.audio_rate, "audio_rate"),
        )
        inputs, outline = outlined(family, folder, job, given)
    except BaseException:
        materials.close()
        raise
    if adapters:
        outline = replace(outline, settings={**outline.settings, SETTING: list(adapters)})
    return CheckedCall(inputs, outline, given, materials)


def refuse_loading(options: GenerationOptions, tuning: Tuning | None = None) -> None:
    """For a checkpoint that is loaded.

    Raises:
        UserError: the tuning or an option changes a model while it is loaded.
    """
    if tuning not in (None, Tuning()) or any(getattr(options, name, None) for name in LOADING):
        raise UserError(
            "generate: precision, attention, memory and compile change a model while it is loaded: expected the folder "
            "of a checkpoint with them, got one that is loaded."
        )


def _portrait(image: Any, options: GenerationOptions, materials: Materials) -> Path:
    """A video that is changed shows the person: it stands for the portrait where none is given."""
    video: Path | None = getattr(options, "video", None)
    if image is None and video is None:
        raise UserError("image: expected a path, a PIL image or a uint8 array [H, W, 3], got none.")
    return video if image is None and video is not None else materials.image(image)


def _voice(audio: Any, options: GenerationOptions, materials: Materials) -> Path:
    """The one voice, or those of all speakers together."""
    voices = options.voices()
    if audio is not None and voices:
        raise UserError("audio: expected none where speakers bring their recordings, got one.")
    if audio is not None:
        return materials.sound(audio)
    if not voices:
        raise UserError("audio: expected a path or (samples, rate), got none.")
    if len(voices) == 1:
        return voices[0]
    from talkingdit.media.mixing import mix_voices

    return mix_voices(voices, materials.folder / "voices.flac")


def _target(wish: PipelineCall, materials: Materials) -> Path:
    return materials.folder / "talkingdit.mp4" if wish.output is None else path_of(wish.output, "output")


def path_of(value: Any, name: str) -> Path:
    """Raises: UserError: something other than a path."""
    if not isinstance(value, str | PathLike):
        raise UserError(f"{name}: expected a path, got {type(value).__name__}.")
    return Path(value).expanduser()


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name}: expected a whole number, got {value!r}.")
    return int(value)


def _prompt(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise UserError(f"prompt: expected words, got {type(prompt).__name__}.")
    return prompt
