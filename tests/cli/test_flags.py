# SPDX-License-Identifier: Apache-2.0
"""Flags from dataclasses: what is typed becomes an object, a mistake one plain sentence, a docstring help."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from talkingdit.cli.flags import Group, Values, read
from talkingdit.cli.messages import UsageError, tell
from talkingdit.families.flag import AREA, SIDES, Flag

BOXES = re.compile(r"[╭╮╰╯│─|]|\+?-{3,}\+?")  # as tyro draws them, in either encoding


@dataclass(frozen=True, kw_only=True)
class Base:
    seed: int = 0
    """another number, another video"""
    prompt: str = ""
    """what to show"""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"video: seed must be at least 0, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Options(Base):
    output: Annotated[Path, Flag("MP4", also=("-o",))]
    """the video to write"""
    clip_frames: int | None = None
    """frames per clip
    (default: of the checkpoint)"""
    guidance: float | None = None
    """how strictly"""
    solver: Literal["unipc", "dpm++"] = "unipc"
    """of the denoising"""
    size: Annotated[tuple[int, int], SIDES] = (448, 832)
    """of the frames"""
    max_area: Annotated[int | None, AREA] = None
    cover: bool = False
    """cut more off"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_frames is not None and self.clip_frames % 4:
            raise ValueError(f"video: clip_frames must be a multiple of 4, got {self.clip_frames}")


def values(*argv: str) -> Values:
    return read("talkingdit video", "Make one.", [Group(Base), Group(Options, "more", "about them")], argv)


def made(*argv: str) -> Options:
    found = values(*argv)
    found.refuse_unknown()
    return found.make(Options)


def test_a_flag_that_may_be_given_again_makes_a_tuple(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Several:
        sizes: Annotated[tuple[tuple[int, int], ...], Flag("WxH", SIDES.read, many=True)] = ()
        """of the frames"""

    def sizes(*argv: str) -> tuple[tuple[int, int], ...]:
        return read("talkingdit video", "", [Group(Several)], argv).make(Several).sizes

    assert sizes("--sizes", "1x2", "--sizes=3x4") == ((2, 1), (4, 3))
    assert sizes() == sizes() == ()
    with pytest.raises(UsageError, match="argument --sizes: must be WIDTHxHEIGHT"):
        sizes("--sizes", "1x2", "--sizes", "3")
    with pytest.raises(UsageError, match="argument --sizes: expected one value"):
        sizes("--sizes")
    with pytest.raises(SystemExit):
        sizes("--help")
    assert "--sizes WxH of the frames" in " ".join(BOXES.sub(" ", capsys.readouterr().out).split())


def test_what_is_typed_becomes_an_object() -> None:
    assert made("-o", "a.mp4") == Options(output=Path("a.mp4"))
    typed = made(
        *("--output=~/a.mp4", "--seed", "3", "--clip-frames=8", "--guidance", "1e-1", "--solver", "dpm++"),
        *("--size", "640x480", "--max-area", "10X20", "--cover", "--prompt", "a person, talking"),
    )
    assert typed == Options(
        seed=3,
        output=Path.home() / "a.mp4",
        clip_frames=8,
        guidance=0.1,
        solver="dpm++",
        size=(480, 640),
        max_area=200,
        cover=True,
        prompt="a person, talking",
    )
    assert made("-o", "a.mp4", "--max-area", "99", "--prompt=-x").max_area == 99


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ((), "the following arguments are required: -o/--output"),
        (("-o",), "argument -o/--output: expected one value"),
        (("-o", "a", "--seed", "--cover"), "argument --seed: expected one value"),
        (("-o", "a", "--seed", "many"), "argument --seed: invalid integer value: 'many'"),
        (("-o", "a", "--seed", "1.5"), "argument --seed: invalid integer value: '1.5'"),
        (("-o", "a", "--seed", "-1"), "--seed must be at least 0, got -1"),
        (("-o", "a", "--clip-frames", "6"), "--clip-frames must be a multiple of 4, got 6"),
        (("-o", "a", "--guidance", "strong"), "argument --guidance: invalid number value: 'strong'"),
        (("-o", "a", "--solver", "euler"), "argument --solver: invalid choice: 'euler' (choose from unipc, dpm++)"),
        (("-o", "a", "--size", "wide"), "argument --size: must be WIDTHxHEIGHT in pixels, got 'wide'"),
        (("-o", "a", "--size", "0x4"), "argument --size: must be WIDTHxHEIGHT in pixels, got '0x4'"),
        (("-o", "a", "--max-area", "no"), "argument --max-area: must be WIDTHxHEIGHT in pixels, got 'no'"),
        (("-o", "a", "--speed", "3"), "unrecognized arguments: --speed 3"),
        (("-o", "a", "stray"), "unrecognized arguments: stray"),
        (("-o", "a", "--no-cover"), "unrecognized arguments: --no-cover"),
        (("-o", "a", "--seed", "None"), "argument --seed: invalid integer value: 'None'"),
    ],
)
def test_a_mistake_is_one_plain_sentence(
    argv: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        made(*argv)
    assert capsys.readouterr() == ("", "")
    assert tell(caught.value) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"talkingdit video: {sentence} (see `talkingdit video --help`).\n"


def test_only_rank_0_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError) as caught:
        made("--seed")
    assert tell(caught.value) == 2
    with pytest.raises(SystemExit) as stop:
        values("--help")
    assert not stop.value.code
    assert capsys.readouterr().err == ""


def test_help_is_made_of_docstrings_and_defaults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        values("--help")
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert max(map(len, said.splitlines())) <= 100
    plain = " ".join(BOXES.sub(" ", said).split())
    for words in (
        "Make one.",
        "--seed N another number, another video (default: 0)",
        "-o MP4, --output MP4 the video to write (required)",
        "--clip-frames N frames per clip (default: of the checkpoint) --guidance X how strictly --solver",
        "of the denoising (default: unipc)",
        "{unipc,dpm++}",
        "--size WxH of the frames (default: 832x448)",
        "--cover cut more off",
        "more options about them",
    ):
        assert words in plain
    assert plain.count("--seed") == 1  # in the first group alone
    assert "None" not in plain
    assert "--no-cover" not in plain


def test_a_type_that_nothing_reads_is_a_mistake_of_the_family() -> None:
    @dataclass(frozen=True)
    class Odd:
        shape: tuple[int, ...] = ()

    with pytest.raises(TypeError, match="needs a Flag with `read`"):
        read("talkingdit video", "", [Group(Odd)], ["--shape", "3"])
