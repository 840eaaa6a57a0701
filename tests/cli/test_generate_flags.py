# SPDX-License-Identifier: Apache-2.0
"""The flags of `generate` are those of the checkpoint's family; a family brings its own with its options."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from talkingdit import families
from talkingdit.cli.main import VERBS, main
from talkingdit.families.family import Family
from talkingdit.families.flag import GenerationOptions

FAMILY = Family("toy", "toys", __name__)  # in one file: this
FILES = ["--image", "nowhere.png", "--audio", "nowhere.wav", "-o", "out.mp4"]


@dataclass(frozen=True, kw_only=True)
class Options(GenerationOptions):
    bounce: float | None = None
    """how high it jumps"""
    sequential: bool = False
    """as others have it"""
    guidance: float | None = None
    """as one other has it"""


def owns(folder: Path) -> bool:
    return (folder / "toy.json").is_file()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a family that a package of its own might bring."""
    monkeypatch.setitem(families._MODULES, "toy", __name__)
    (tmp_path / "toy.json").write_text("{}")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The help, without boxes."""
    with pytest.raises(SystemExit) as stop:
        main(["generate", *argv])
    assert not stop.value.code
    printed = capsys.readouterr()
    assert printed.err == ""
    return " ".join(re.sub(r"[╭╮╰╯│─|]|\+?-{3,}\+?", " ", printed.out).split())


def test_help_without_a_checkpoint_shows_the_flags_of_all_families(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, "--help")
    common, _, own = text.partition("drawn characters, ")
    assert "--seed N" in common
    assert "--sequential" in common  # every family has it
    assert "--text-guidance G how strictly to follow the prompt (default: of the checkpoint)" in own
    assert "toys options --bounce X how high it jumps" in own
    assert re.search("Wan-S2V, [^:]*toys options --guidance G how strictly to follow prompt and voice", own)
    for flag in ("--seed ", "--sequential ", " --guidance "):
        assert text.count(flag) == 1


def test_help_with_a_checkpoint_shows_those_of_its_family(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--checkpoint", str(toy), "--help")
    assert "toys options --bounce X how high it jumps --sequential as others have it" in text
    assert "--text-guidance" not in text
    assert "--cover" not in text
    assert said(capsys, f"--checkpoint={toy}", "-h") == text


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--bounce", "3"], "--bounce is for checkpoints of toys only, and the shipped one is none of these"),
        (["--guidance=3"], "--guidance is for checkpoints of Wan-S2V, "),
        (["--start-from-ref"], "--start-from-ref is for checkpoints of Wan-S2V only, and the shipped one"),
        (["--bounce", "3", "--checkpoint", "TOY"], "image 'nowhere.png': expected an existing file, got none"),
        (["--audio-guidance", "3", "--checkpoint=TOY"], "--audio-guidance is for checkpoints of drawn characters"),
        (["--checkpoint", "nowhere"], "nowhere: the checkpoint must be a folder"),
        (["--checkpoint"], "argument --checkpoint: expected one value"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_flags_of_other_families_and_values_are_refused(
    toy: Path, capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    assert main(["generate", *FILES, *(word.replace("TOY", str(toy)) for word in argv)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err.replace(repr(str(toy)), "TOY")
    assert printed.err.count("\n") == 1


def test_every_spelling_of_before_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--help")
    flags = (
        "image audio prompt output checkpoint seed steps upscale sheet threads device parallel dtype text-guidance "
        "audio-guidance negative-prompt guidance shift solver max-area size cover frames clips clip-frames "
        "start-from-ref pose match-colour sequential memory compile opening official-timing"
    )
    for flag in flags.split():
        assert re.search(rf"--{flag}\b", text), flag
    assert " -o MP4" in text


def test_the_command_names_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in out
    for argv in ([], ["generat"]):
        assert main(argv) == 2
        assert f"expected a verb, one of {', '.join(VERBS)}" in capsys.readouterr().err
