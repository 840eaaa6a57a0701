# SPDX-License-Identifier: Apache-2.0
"""A family's options as a form: what a field is, its help and its default are said once, in the options themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talkingdit.app.asked import Text
from talkingdit.app.runs import take, take_many
from talkingdit.errors import UserError
from talkingdit.families import Family, GenerationOptions
from talkingdit.families.fields import Field, fields
from talkingdit.families.lora_options import LoraOptions
from talkingdit.media.boxes import read_box, write_box

SPEAKER = "speaker"  # the option for people with a voice each, in families that have it
MOST_SPEAKERS = 3


@dataclass(frozen=True)
class Form:
    """The fields of a family.

    Args:
        shown: that everybody meets: those of every family, and files.
        folded: the rest.
        speaker: for people with a voice and a box each, where the family has it.
    """

    shown: tuple[Field, ...]
    folded: tuple[Field, ...]
    speaker: Field | None

    @property
    def fields(self) -> tuple[Field, ...]:
        """Those that components stand for, in their order."""
        return (*self.shown, *self.folded)


def form_of(family: Family) -> Form:
    """The form of a family."""
    common = {one.name for one in fields(GenerationOptions)}
    found = fields(family.options)
    speaker = next((one for one in found if one.name == SPEAKER), None)
    others = [one for one in found if one is not speaker]
    shown = [one for one in others if one.name in common] + [one for one in others if one.kind is Path]
    folded = [one for one in others if one not in shown] + fields(LoraOptions)
    return Form(tuple(shown), tuple(folded), speaker)


def label(one: Field) -> str:
    """What stands above a field."""
    return one.name.replace("_", " ").capitalize()


def components(one: Field, value: Text | None) -> list[Any]:
    """What asks for a field on the page: one component, or words and files where the field may be given again.

    Args:
        value: as typed, None for the default. Files cannot be shown again in a form.
    """
    import gradio as gr

    name: dict[str, Any] = {"label": label(one), "info": one.help, "interactive": True, "elem_id": f"option-{one.name}"}
    if one.switch:
        return [gr.Checkbox(value=one.default if value is None else bool(value), **name)]
    if one.choices:
        choices = [("as the checkpoint says", "")] * (one.default is None) + [(word, word) for word in one.choices]
        return [gr.Radio(choices, value=str(value or one.default or ""), **name)]
    if one.kind is Path:
        return [gr.File(label=f"{label(one)}: {one.help}", height=120, interactive=True, elem_id=name["elem_id"])]
    if one.flag.many:
        words = "\n".join(value) if isinstance(value, list) else ""
        name["info"] = f"{one.flag.metavar}, one a line. {one.help}"
        files = gr.File(
            label=f"Files that {label(one).lower()} names", file_count="multiple", height=120, interactive=True
        )
        lines = gr.Textbox(words, lines=2, **name)
        if one.metavar.startswith("FILE"):  # a file is an item already, to be said more about
            files.upload(named_too, [lines, files], lines, queue=False, api_visibility="private")
        return [lines, files]
    default = "" if one.default is None else one.flag.write(one.default)
    return [gr.Textbox(str(value or default), placeholder=one.metavar, **name)]


def named_too(lines: str | None, files: Sequence[str] | None) -> str:
    """Lines, and one for each file that none of them names."""
    said = (lines or "").splitlines()
    names = [Path(file).name for file in files or ()]
    return "\n".join([*said, *(name for name in names if not any(line.startswith(name) for line in said))])


def width(one: Field) -> int:
    """How many components a field has."""
    return 2 if one.flag.many else 1


def collect(form: Form, values: Sequence[Any], folder: Path) -> dict[str, Text]:
    """What was typed into the components of a form, defaults left out; files are taken into the folder of the run.

    Args:
        values: of the components, in the order of `form.fields`.
    """
    found: dict[str, Text] = {}
    rest = list(values)
    for one in form.fields:
        mine, rest = rest[: width(one)], rest[width(one) :]
        text = _text(one, mine, folder)
        if text not in (None, "", []) and not _is_default(one, text):
            found[one.name] = text
    return found


def _is_default(one: Field, text: Text) -> bool:
    if one.switch:
        return text == one.default
    try:
        return not one.flag.many and one.reader(str(text)) == one.default
    except ValueError:
        return False  # which is told when the options are made


def _text(one: Field, values: Sequence[Any], folder: Path) -> Any:
    value = values[0]
    if one.switch:
        return bool(value)
    if one.kind is Path:
        # Never under a name that a file of the run itself has: the film to dub is no video.mp4.
        return take(Path(value), folder, f"option-{one.name}") if value else ""
    if one.flag.many:
        files = take_many([Path(path) for path in values[1] or ()], folder, one.name)
        return named([line.strip() for line in (value or "").splitlines() if line.strip()], files)
    return (value or "").strip()


def named(lines: Sequence[str], files: Mapping[str, str]) -> list[str]:
    """Words with the names that files have here in the place of those that they had, the longest first."""
    if not files:
        return list(lines)
    known = sorted(files, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, known)))
    return [pattern.sub(lambda found: files[found[0]], line) for line in lines]


# ---- Speakers --------------------------------------------------------------------------------------------------------


def speakers(rows: Sequence[Sequence[Any]], folder: Path) -> list[str]:
    """Who speaks, in the words of the command line, from rows of name, voice and box.

    Raises:
        UserError: a voice without a name, or a box that is none.
    """
    found = []
    for number, (name, voice, box) in enumerate(rows, 1):
        name = (name or "").strip()
        if not name and not voice:
            continue
        if not re.fullmatch(r"[\w .-]+(:[\d.]+)?", name):  # with a strength, maybe
            raise UserError(f"speaker {number}: expected a name of letters, digits and blanks, got {name!r}.")
        sides = read_box(box or "")
        if box and sides is None:
            raise UserError(f"speaker {number}: expected a box of four numbers, left, top, right, bottom, got {box!r}.")
        file = take(Path(voice), folder, f"voice-{number}") if voice else ""
        found.append(name + (f"={file}" if file else "") + (f"@{write_box(sides)}" if sides else ""))
    return found


def speaker_rows(words: Text | None) -> list[tuple[str, str]]:
    """Names and boxes of speakers again, from the words of the command line; files cannot be shown again."""
    found = []
    for word in words if isinstance(words, list) else ():
        head, _, place = word.rpartition("@")
        sides = read_box(place)
        found.append(((head if sides else word).partition("=")[0], write_box(sides) if sides else ""))
    return [*found, *[("", "")] * MOST_SPEAKERS][:MOST_SPEAKERS]
