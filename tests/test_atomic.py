# SPDX-License-Identifier: Apache-2.0
"""What is written is there as a whole or not at all, also over links, and with the rights that any new file gets."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from talkingdit.atomic import (
    PART,
    WholeFile,
    append_line,
    part_folder,
    put_in_place,
    remove_left,
    remove_whole,
    take,
    whole_file,
    whole_folder,
    write_whole,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with whole_file(target) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".bin"
        assert temporary.name.startswith(PART)
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_whole(target, b"old", sync=True)

    def half() -> None:
        with whole_file(target) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        half()
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_is_that_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "a", b"x")
        (tmp_path / "b").write_bytes(b"x")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "b")]
    assert modes[0] == modes[1] == 0o666 & ~umask


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("far/real.txt")
    write_whole(tmp_path / "link.txt", b"new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "far" / "real.txt").read_text() == "new"
    assert names(tmp_path / "far") == ["real.txt"]


def test_prefix_and_suffix_of_the_temporary_name(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.mp4", prefix=".mine-", suffix=".part") as temporary:
        assert temporary.name.startswith(".mine-")
        assert temporary.name.endswith(".part")
    assert names(tmp_path) == ["a.mp4"]


def test_a_library_may_replace_the_temporary_file(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a") as temporary:
        (tmp_path / "other").write_text("its own")
        os.replace(tmp_path / "other", temporary)
    assert (tmp_path / "a").read_text() == "its own"


def test_a_file_that_is_open_for_long(tmp_path: Path) -> None:
    file = WholeFile(tmp_path / "a")
    file.path.write_text("x")
    file.abort()
    assert names(tmp_path) == []
    file = WholeFile(tmp_path / "a")
    file.path.write_text("y")
    file.finish(sync=True)
    file.abort()  # too late
    assert (tmp_path / "a").read_text() == "y"


def test_a_target_that_cannot_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "a", b"x")
    assert names(tmp_path) == ["a"]
    with pytest.raises(OSError):
        write_whole(tmp_path / "none" / "a", b"x")


def killed(folder: Path, code: str) -> None:
    """Runs code that kills its process while it writes the folder `run`."""
    head = "import os, signal\nfrom pathlib import Path\nfrom talkingdit.atomic import whole_folder\n"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    assert (
        subprocess.run(
            [sys.executable, "-c", head + "target = Path('run')\n" + code], cwd=folder, env=environment
        ).returncode
        == -9
    )


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    target = tmp_path / "run"
    for text in ("one", "two"):
        killed(tmp_path, "with whole_folder(target) as folder:\n    os.kill(os.getpid(), signal.SIGKILL)")
        assert any(name.startswith(PART) for name in names(tmp_path))
        with whole_folder(target) as temporary:
            assert names(temporary) == []
            (temporary / "a").write_text(text)
        assert (target / "a").read_text() == text
        assert names(tmp_path) == ["run"]

    def half() -> None:
        with whole_folder(target) as temporary:
            (temporary / "a").write_text("three")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        half()
    assert (target / "a").read_text() == "two"
    assert names(tmp_path) == ["run"]


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "log.jsonl"
    append_line(file, "first")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # in the middle of the next line
    try:
        with pytest.raises(OSError, match="File too large"):
            append_line(file, "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "first\n"
    file.write_text("first\ncut o")
    append_line(file, "third")
    assert file.read_text() == "first\ncut o\nthird\n"
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(OSError, match="symbolic links"):
        append_line(tmp_path / "link", "fourth")


KILLED = """
import os, signal, sys
from talkingdit.atomic import PART, WholeFile, part_folder, remove_left, take, whole_file, whole_folder, write_whole
WholeFile(sys.argv[1], prefix=sys.argv[2], suffix=".part").path.write_text("half")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("prefix", [PART, ".out."])
def test_what_a_killed_process_left_is_removed_by_the_next_of_the_same_target(tmp_path: Path, prefix: str) -> None:
    for name in ("a.mp4", "b.mp4"):
        subprocess.run([sys.executable, "-c", KILLED, tmp_path / name, prefix], check=False)
    (tmp_path / f"{prefix}mine.part").touch()  # not ours: no digest
    assert len(names(tmp_path)) == 3
    with whole_file(tmp_path / "a.mp4", prefix=prefix, suffix=".part") as temporary:
        temporary.write_text("whole")
        assert len(names(tmp_path)) == 3  # this one, that of b, and the one that is not ours
    left = names(tmp_path)
    assert len(left) == 3
    assert "a.mp4" in left
    assert f"{prefix}mine.part" in left


def test_what_is_being_written_is_left_alone(tmp_path: Path) -> None:
    first = WholeFile(tmp_path / "a")
    first.path.write_text("first")
    second = WholeFile(tmp_path / "a")
    second.path.write_text("second")
    with part_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("third")
        remove_left(tmp_path)
        assert (folder / "x").exists()
        take(folder / "x", tmp_path / "a")
    assert (tmp_path / "a").read_text() == "third"
    first.finish()
    assert (tmp_path / "a").read_text() == "first"
    second.finish()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "second"


def test_files_of_a_folder_are_no_more_private_than_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with whole_folder(tmp_path / "run") as temporary:
            (temporary / "deep").mkdir()
            for name, mode in (("deep/a", 0o600), ("b", 0o700)):
                (temporary / name).touch()
                (temporary / name).chmod(mode)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / "run" / name).stat().st_mode) for name in ("deep/a", "b")]
    assert modes == [0o644, 0o744]


def test_a_folder_is_put_back_where_a_process_was_killed_between_two_renames(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("old")
    between = """
def rename(self, target, rename=Path.rename):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = rename
with whole_folder(target) as folder:
    (folder / "a").write_text("new")
"""
    killed(tmp_path, between)
    assert "run" not in names(tmp_path)

    def half() -> None:
        with whole_folder(tmp_path / "run"):
            raise RuntimeError("again")

    with pytest.raises(RuntimeError, match="again"):
        half()
    assert (tmp_path / "run" / "a").read_text() == "old"
    assert names(tmp_path) == ["run"]


def test_folders_and_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    for name in ("run", "run.tmp", "run.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")

    def write(name: str) -> None:
        with whole_folder(tmp_path / "run") as folder:
            (folder / name).write_text("new")

    with pytest.raises(FileExistsError, match=r"holds 'notes\.txt', which would be lost"):
        write("model.safetensors")
    assert {(tmp_path / name / "notes.txt").read_text() for name in names(tmp_path)} == {"mine"}
    assert names(tmp_path) == ["run", "run.old", "run.tmp"]
    write("notes.txt")
    (tmp_path / "run" / "model-00001-of-00002.safetensors").touch()
    write("notes.txt")  # a part of what was there before is no loss
    assert names(tmp_path / "run") == ["notes.txt"]


def test_a_finished_folder_takes_its_name_and_replaces_none(tmp_path: Path) -> None:
    for name in ("new.tmp", "other.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    put_in_place(tmp_path / "new.tmp", tmp_path / "new")
    with pytest.raises(OSError, match="new"):
        put_in_place(tmp_path / "other.tmp", tmp_path / "new")
    assert names(tmp_path) == ["new", "other.tmp"]
    assert (tmp_path / "new" / "a").read_text() == "new.tmp"


def test_a_folder_has_another_name_before_anything_in_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "a").write_text("a")
    seen = []
    monkeypatch.setattr("shutil.rmtree", lambda path: seen.append((path.name, names(path), names(path.parent))))
    remove_whole(tmp_path / "step", ".tmp")
    assert seen == [("step.tmp", ["a"], ["step.tmp"])]
    monkeypatch.undo()
    remove_whole(tmp_path / "step.tmp", ".tmp")
    assert names(tmp_path) == []
