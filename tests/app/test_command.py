# SPDX-License-Identifier: Apache-2.0
"""The verb: what it refuses before anything is served, and what planning says."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import soundfile

from talkingdit.app.asked import Asked, Machine
from talkingdit.app.planning import plan
from talkingdit.app.runs import Run
from talkingdit.app.server import ServerSettings, default_folder
from talkingdit.cli.main import USER_ERROR, main
from talkingdit.errors import UserError
from talkingdit.puppets import MODEL


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--host", "0.0.0.0"], "app: --host 0.0.0.0 can be reached by others: expected a --password, got none."),
        (["--password", "short"], "--password must have at least 8 letters, got 5"),
        (["--port", "70000"], "--port must be 0 to 65535, got 70000"),
        (["--max-upload", "0"], "--max-upload must be at least 1, got 0"),
    ],
)
def test_a_wrong_flag_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["app", *words]) == USER_ERROR
    assert sentence in capsys.readouterr().err


def test_a_port_that_is_taken_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["app", "--port", str(port), "--folder", str(tmp_path / "data")]) == USER_ERROR
    assert f"127.0.0.1:{port} cannot be listened at (Address already in use)." in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("host", False)]
)
def test_only_addresses_of_this_machine_go_without_a_password(host: str, local: bool, tmp_path: Path) -> None:
    assert ServerSettings(folder=tmp_path, host=host).local is local


def test_runs_are_kept_where_the_platform_keeps_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "talkingdit"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # which the specification says to leave out
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".local/share/talkingdit"


def test_a_plan_tells_memory_and_the_time_of_the_last_run(tmp_path: Path) -> None:
    sound, rate = soundfile.read(MODEL.parent / "voice.flac")
    soundfile.write(tmp_path / "audio.wav", sound[: 3 * rate], rate)
    asked = Asked(audio="audio.wav", options={"steps": "10"})
    before = Run("x", "x", tmp_path, Asked(), state="done", total=20, took=40.0)
    words = plan(asked, tmp_path, Machine(device="cpu"), [before])
    assert "10 steps" in words
    assert "voice       3.0 s" in words
    clips = int(words.partition("heard whole: ")[2].split()[0])
    assert f"about {2.0 * 10 * clips:.0f} s, as the last run took 2.00 s a step" in words
    with pytest.raises(UserError, match="memory: expected an option of"):
        plan(Asked(options={"memory": "x"}), tmp_path, Machine())
