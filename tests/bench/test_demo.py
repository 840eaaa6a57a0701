# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole processes counts what a process takes, and nothing of its neighbours'."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import demo

# A build whose video is a file of its command line, and that takes a known time and memory.
FAKE = """
import sys, time
began = time.process_time()
held = bytearray(64_000_000)
held[::4096] = b"x" * len(held[::4096])
while time.process_time() - began < 0.3: pass
time.sleep(0.2)
open(sys.argv[sys.argv.index("--output") + 1], "w").write(sys.argv[sys.argv.index("--prompt") + 1])
sys.exit("--broken" in sys.argv and "it broke")
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "talkingdit").mkdir()
    (tmp_path / "talkingdit" / "__init__.py").touch()  # else an installed package goes before it
    (tmp_path / "talkingdit" / "__main__.py").write_text(FAKE)
    (tmp_path / "Makefile").write_text('generate --prompt "two words" --output demo.mp4\n')
    return tmp_path


def test_what_a_process_takes(tree: Path, tmp_path: Path) -> None:
    run = demo.measure(tree, tmp_path / "out")
    assert run.cpu >= 0.3
    assert run.wall >= 0.5
    assert 64e6 < run.peak < 64e6 + 120e6
    again = demo.measure(tree, tmp_path / "out", nice=1)
    assert again.video == run.video
    with pytest.raises(RuntimeError, match="it broke"):
        demo.measure(tree, tmp_path / "out", ["--broken"])


def test_builds_take_turns_and_are_compared(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = demo.compare({"old": tree, "new": tree}, 1, busy=True, nice=0)
    assert [(row["build"], row["neighbour"]) for row in rows] == [
        ("old", "none"), ("new", "none"), ("old", "busy"), ("new", "busy"),
    ]  # fmt: skip
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "1/1 old", "1/1 new", "1/1 old, busy", "1/1 new, busy",
    ]  # fmt: skip
    assert len({run["video"] for row in rows for run in row["runs"]}) == 1
    found = demo.ratios([row | {"cpu_s": 3.0 if row["build"] == "new" else 6.0} for row in rows])
    assert found["cpu_s_new_to_old"] == 0.5
    assert set(found) == {"cpu_s_new_to_old", "wall_s_new_to_old", "peak_bytes_new_to_old", "wall_s_busy_to_none"}


def test_a_neighbour_is_busy_and_goes() -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if not children.exists():
        pytest.skip("the kernel does not list children")
    before = set(children.read_text().split())
    with demo.neighbour(busy=True):
        (child,) = set(children.read_text().split()) - before
    assert not Path(f"/proc/{child}").exists()


def test_the_command_is_that_of_the_makefile() -> None:
    root = Path(demo.__file__).parent.parent
    words = demo.command(root)
    assert words[0] == sys.executable
    said = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo"], cwd=root, text=True, capture_output=True
    ).stdout
    for word in words[3:]:
        assert word.removeprefix(f"{root}/") in said


def test_a_build_in_a_folder_is_compared_as_it_is(tmp_path: Path) -> None:
    """One whose kernels were others cannot take those of this tree."""
    with demo.checked_out(str(tmp_path)) as trees:
        assert trees["old"] == tmp_path
    assert demo.name_of(str(tmp_path)) == tmp_path.name
    assert demo.name_of("abc123") == "abc123"
    assert len(demo.name_of(str(trees["new"])) or "") == 12
