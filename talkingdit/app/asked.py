# SPDX-License-Identifier: Apache-2.0
"""What somebody asks for in the app, in words and names of files, and what is made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit import families
from talkingdit.errors import UserError
from talkingdit.families import Family, GenerationOptions
from talkingdit.families.fields import Field, fields
from talkingdit.families.lora_options import LoraOptions

if TYPE_CHECKING:
    from talkingdit.pipelines.inputs import Inputs, Outline
    from talkingdit.pipelines.tuning import Tuning

VIDEO, SHEET = "video.mp4", "sheet.png"
MIXED = "voices.flac"  # the voices of several speakers together
Text = str | bool | list[str]  # a value as it is typed; a list where the field may be given again


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A video that is asked for. It bears JSON.

    Args:
        image, audio: names of files in the folder of the run; "" where a video or speakers bring them.
        prompt: what to show.
        checkpoint: folder of the model, or the name of one that ships; "" is the default.
        options: of the family, and LoRAs, as typed; names of files stand for files in the folder of the run.
    """

    image: str = ""
    audio: str = ""
    prompt: str = ""
    checkpoint: str = ""
    options: Mapping[str, Text] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Of the checkpoint."""
        from talkingdit.models import find_checkpoint

        return find_checkpoint(self.checkpoint or None)

    def family(self) -> Family:
        """Raises: UserError: the folder is no checkpoint."""
        return families.of_folder(self.folder)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How models are loaded, which is for who starts the server to say.

    Args:
        device: "cpu", "cuda", ...; None chooses.
        dtype: of the weights, "float32" or "bfloat16"; None chooses.
        precision: "fp8" or "int8" for large layers, None for neither.
        attention: kernel of attention.
    """

    device: str | None = None
    dtype: str | None = None
    precision: str | None = None
    attention: str = "auto"


@dataclass(frozen=True)
class Prepared:
    """A video that is possible."""

    family: Family
    options: GenerationOptions
    inputs: Inputs
    outline: Outline
    tuning: Tuning
    loras: LoraOptions


def prepare(asked: Asked, folder: Path, machine: Machine) -> Prepared:
    """Read the files of a run and outline its video, without any model.

    Args:
        folder: of the run.

    Raises:
        UserError: something is wrong with what was asked for.
    """
    from talkingdit.api.road import outlined
    from talkingdit.pipelines.inputs import Job

    family, options, tuning = chosen(asked, folder, machine)
    files = options.files()
    image = folder / asked.image if asked.image else files.get("video")
    if image is None:
        raise UserError("picture: expected one, got none.")
    job = Job(
        image=image,
        audio=_sound(asked, options, folder),
        output=folder / VIDEO,
        sheet=folder / SHEET,
        prompt=asked.prompt,
        live=True,
    )
    inputs, outline = outlined(family, asked.folder, job, options)
    loras = loras_of(asked.options, folder)
    return Prepared(family, options, inputs, loras.checked(family, asked.folder, outline), tuning, loras)


def chosen(asked: Asked, folder: Path, machine: Machine) -> tuple[Family, GenerationOptions, Tuning]:
    """The family, what is said to it, and how its model is loaded.

    Raises:
        UserError: see `prepare`.
    """
    from talkingdit.pipelines.tuning import Tuning

    family = asked.family()
    options = options_of(family, asked.options, folder)
    return family, options, Tuning.of(getattr(options, "memory", ""), machine.precision, machine.attention)


def _sound(asked: Asked, options: GenerationOptions, folder: Path) -> Path:
    """The sound of the video: the one recording, or all voices together, in a file beside them."""
    voices = options.voices()
    if asked.audio and voices:
        raise UserError("voice: must be left out where speakers bring their recordings, got both.")
    if not asked.audio and not voices:
        raise UserError("voice: expected a recording, got none.")
    if asked.audio or len(voices) == 1:
        return folder / asked.audio if asked.audio else voices[0]
    from talkingdit.media.mixing import mix_voices

    return mix_voices(voices, folder / MIXED)


def options_of(family: Family, texts: Mapping[str, Text], folder: Path) -> GenerationOptions:
    """Options from what was typed. Names of files in the folder stand for them, and no others can be named.

    Raises:
        UserError: a value that the field does not take, an option that the family has not, or a foreign file.
    """
    known, loras = fields(family.options), {one.name for one in fields(LoraOptions)}
    names = [one.name for one in known]
    unknown = [name for name in texts if name not in (*names, *loras)]
    if unknown:
        raise UserError(f"{unknown[0]}: expected an option of {family.title}, one of {', '.join(names)}.")
    values = _values(known, texts, folder)
    try:
        options = family.options(**values)
    except ValueError as error:
        raise UserError(f"{str(error).removeprefix('generate: ').rstrip('.')}.") from error
    for name, path in options.files().items():
        if path.parent != folder:
            raise UserError(f"{name}: expected one of the files that were uploaded, got {path.name!r}.")
    return options


def loras_of(texts: Mapping[str, Text], folder: Path) -> LoraOptions:
    """Likewise the LoRAs.

    Raises:
        UserError: words that are none, or a file that was not uploaded.
    """
    loras = LoraOptions(**_values(fields(LoraOptions), texts, folder))
    for choice in loras.lora:
        if choice.path.parent != folder or not choice.path.is_file():
            raise UserError(f"lora: expected one of the files that were uploaded, got {choice.path.name!r}.")
    return loras


def _values(known: Sequence[Field], texts: Mapping[str, Text], folder: Path) -> dict[str, Any]:
    """What was typed for fields, without what says nothing."""
    given = {one: texts[one.name] for one in known if texts.get(one.name) not in ("", [], None)}
    return {one.name: read_value(one, text, folder) for one, text in given.items()}


def read_value(one: Field, text: Text, folder: Path) -> Any:
    """The value of a field from what was typed.

    Raises:
        UserError: the field does not take it.
    """
    if one.switch:
        if not isinstance(text, bool):
            raise UserError(f"{one.name}: expected true or false, got {text!r}.")
        return text
    if one.flag.many:
        items = [text] if isinstance(text, str) else text
        if not isinstance(items, list):
            raise UserError(f"{one.name}: expected a list of words, got {text!r}.")
        return tuple(_in_folder(_read(one, item), folder) for item in items)
    if isinstance(text, (list, dict)):
        raise UserError(f"{one.name}: expected one value, got {text!r}.")
    return _in_folder(_read(one, text), folder)


def _read(one: Field, text: object) -> Any:
    words = f"{text:g}" if isinstance(text, float) and text.is_integer() and abs(text) < 1e15 else str(text)
    try:
        return one.reader(words)
    except ValueError as error:
        raise UserError(f"{one.name}: {str(error).rstrip('.')}.") from error


def _in_folder(value: Any, folder: Path) -> Any:
    """A value whose paths lie in the folder; so does a word that is the name of a file there."""
    if isinstance(value, Path):
        return folder / value
    if isinstance(value, str) and value and Path(value).name == value and (folder / value).is_file():
        return str(folder / value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        paths = {
            one.name: folder / path
            for one in dataclasses.fields(value)
            if isinstance(path := getattr(value, one.name), Path)
        }
        return dataclasses.replace(value, **paths)
    return value
