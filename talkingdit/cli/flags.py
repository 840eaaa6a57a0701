# SPDX-License-Identifier: Apache-2.0
"""Flags from dataclasses: tyro makes the help and reads the command line, and every mistake is one plain sentence.

tyro draws boxes around its complaints and ends the process. So its dataclasses are made here, one per group of the
help, from the fields of ours: with a converter for each flag that raises `_Refused`, and with defaults also for what is
required, whose absence is told here. `families/flag.py` says what a field may say.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn, TypeVar

from talkingdit.cli.messages import UsageError, rank
from talkingdit.families import fields as of_options

T = TypeVar("T")


class _Refused(Exception):
    """A value that a flag does not take. No ValueError, which tyro would catch."""


@dataclass(frozen=True)
class Group:
    """Flags that stand together in the help.

    Args:
        kind: dataclass whose fields are the flags; one that an earlier group has is left to that.
        title: above them, "" for those of the command itself.
        about: a line below the title.
        without: names of fields that are no flags here.
    """

    kind: type[Any]
    title: str = ""
    about: str = ""
    without: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Values:
    """What was read.

    Args:
        command: as messages call it, "talkingdit generate".
        given: values by the names of fields, defaults too.
        unknown: words that are none of the flags.
    """

    command: str
    given: dict[str, Any]
    unknown: list[str] = field(default_factory=list)

    def make(self, kind: type[T]) -> T:
        """An object of the fields that were read.

        Raises:
            UsageError: its ValueError, with fields spelt as flags.
        """
        names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
        try:
            return kind(**{name: value for name, value in self.given.items() if name in names})
        except ValueError as error:
            spelt = re.sub(rf"\b({'|'.join(names)}) must\b", lambda found: f"{flag_of(found[1])} must", str(error))
            self.refuse(re.sub(r"^\w+: ", "", spelt))

    def refuse_unknown(self) -> None:
        """Raises: UsageError: there are words that are none of the flags."""
        if self.unknown:
            self.refuse(f"unrecognized arguments: {' '.join(self.unknown)}")

    def refuse(self, sentence: str) -> NoReturn:
        """Raises: UsageError: always."""
        _refuse(self.command, sentence)


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def fields_of(kind: type[Any]) -> tuple[str, ...]:
    """Names of the fields of a dataclass."""
    return tuple(f.name for f in dataclasses.fields(kind))


def spellings_of(kind: type[Any]) -> set[str]:
    """The flags of a dataclass, in all their spellings."""
    return {spelling for one in _collect([Group(kind)]).values() for spelling in one.spellings}


def read(command: str, about: str, groups: Iterable[Group], argv: Sequence[str]) -> Values:
    """Read a command line; with `--help` in it, print the help instead.

    Args:
        command: as the help calls it, "talkingdit plan".
        about: what it does, in the help; a short line, for tyro does not break it.
        groups: of flags.
        argv: words behind the command.

    Raises:
        UsageError: a flag has no value or one that it does not take, or a required one is missing.
        SystemExit: after the help.
    """
    import tyro

    flags = _collect(groups)
    boxes: dict[Group, list[_Field]] = {}
    for one in flags.values():
        boxes.setdefault(one.group, []).append(one)
    parts = [(f"group_{index}", _box(group, flags)) for index, (group, flags) in enumerate(boxes.items())]
    try:
        found, unknown = tyro.cli(  # type: ignore[var-annotated]
            dataclasses.make_dataclass("Flags", parts),
            prog=command,
            description=about,
            args=list(argv),
            return_unknown_args=True,
            console_outputs=not rank() and bool({"-h", "--help"} & set(argv)),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except _Refused as error:
        _refuse(command, str(error))
    except SystemExit as stop:
        if not stop.code:
            sys.stdout.write("\n")  # behind the last box
            raise
        _refuse(command, _without_value(argv, flags.values()))
    given = {name: value for box in vars(found).values() for name, value in vars(box).items()}
    given |= {name: tuple(given[name]) for name, one in flags.items() if one.flag.many}
    lacking = [one.spelt for name, one in flags.items() if one.required and given[name] is None]
    if lacking:
        _refuse(command, f"the following arguments are required: {', '.join(lacking)}")
    return Values(command, given, unknown)


def _refuse(command: str, sentence: str) -> NoReturn:
    raise UsageError(f"{command}: {sentence} (see `{command} --help`).")


def _without_value(argv: Sequence[str], flags: Iterable[_Field]) -> str:
    """The complaint about a flag whose value is missing."""
    takers = {spelling: one for one in flags if not one.switch for spelling in one.spellings}
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        if word in takers and following.startswith("-"):
            return f"argument {takers[word].spelt}: expected one value"
    return "the arguments cannot be read"


# ---- One field -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Field(of_options.Field):
    """A field of a dataclass as a flag."""

    group: Group

    @property
    def spellings(self) -> tuple[str, ...]:
        return (*self.flag.also, flag_of(self.name))

    @property
    def spelt(self) -> str:
        return "/".join(self.spellings)

    def read(self, reader: Callable[[str], Any], text: str) -> Any:
        try:
            return reader(text)
        except ValueError as error:
            raise _Refused(f"argument {self.spelt}: {error}") from None

    def for_tyro(self) -> tuple[str, Any, Any]:
        """Name, type and default of the field in tyro's dataclass."""
        from tyro.conf import UseAppendAction, arg
        from tyro.constructors import PrimitiveConstructorSpec

        hint = "(required)" if self.required else ""
        if self.default not in (None, "", ()) and not self.switch:
            hint = f"(default: {self.flag.write(self.default)})"
        about: Any = arg(help=self.help, help_behavior_hint=hint, aliases=self.flag.also or None)
        if self.switch:
            return self.name, Annotated[bool, about], self.default
        reader = self.reader
        spec: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
            nargs=1,
            metavar=self.metavar,
            instance_from_str=lambda words: self.read(reader, words[0]),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [str(value)],
        )
        if self.flag.many:
            kind = UseAppendAction[Annotated[list[Annotated[Any, spec]], about]]
            return self.name, kind, dataclasses.field(default_factory=lambda: list(self.default))
        return self.name, Annotated[Any, spec, about], self.default


def _collect(groups: Iterable[Group]) -> dict[str, _Field]:
    """The flags of groups, by the names of their fields."""
    flags: dict[str, _Field] = {}
    for group in groups:
        for one in of_options.fields(group.kind):
            if one.name not in flags and one.name not in group.without:
                flags[one.name] = _Field(**vars(one), group=group)
    return flags


def _box(group: Group, flags: list[_Field]) -> Any:
    """tyro's dataclass of a group."""
    import tyro

    made = dataclasses.make_dataclass("Box", [one.for_tyro() for one in flags])
    made.__doc__ = group.about
    return Annotated[made, tyro.conf.arg(name=group.title)]
