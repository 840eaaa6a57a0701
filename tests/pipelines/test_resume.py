# SPDX-License-Identifier: Apache-2.0
"""Finished clips on disk: complete or not there, bit for bit, and never somebody else's."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from forked import run
from safetensors.torch import save as save_tensors

from talkingdit.errors import UserError
from talkingdit.pipelines.long_video import Carry
from talkingdit.pipelines.resume import ClipStore, Frames

SETTINGS = {"seed": 1, "size": (64, 48), "prompt": "große Augen"}


def frames(seed: int, count: int = 5) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 48, 3), dtype=np.uint8)


def carry(seed: int, window: bool = False) -> Carry:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"history": torch.randn(1, 16, 2, 4, 4, generator=generator)}
    if window:
        tensors["window"] = torch.randn(1, 3, 5, 8, 8, generator=generator)
    return {**tensors, "colours": torch.randn(2, 3, generator=generator)}


def same(a: Carry | None, b: Carry) -> bool:
    return a is not None and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def test_what_is_kept_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store = ClipStore(tmp_path / "a.mp4", SETTINGS)
    assert (store.finished, store.carry()) == (0, None)
    again = store
    for index in range(3):
        again.add(frames(index, 4 + index), carry(index, window=index == 1))
        again.close()
        again = ClipStore(tmp_path / "a.mp4", SETTINGS)
        assert again.finished == index + 1
        assert same(again.carry(), carry(index, window=index == 1))
    for index, found in enumerate(again.frames()):
        np.testing.assert_array_equal(found, frames(index, 4 + index))
    again.add(frames(3), None)
    again.close()
    assert ClipStore(tmp_path / "a.mp4", SETTINGS).finished == 4
    again = ClipStore(tmp_path / "a.mp4", SETTINGS)
    assert again.carry() is None
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_only_the_last_carry_takes_room(tmp_path: Path) -> None:
    store = ClipStore(tmp_path / "a.mp4", SETTINGS)
    for index in range(3):
        store.add(frames(index), carry(index))
    assert [path.name for path in store.folder.glob("carry-*")] == ["carry-0002.safetensors"]


def test_a_clip_without_its_carry_is_not_finished(tmp_path: Path) -> None:
    """As a run leaves it that dies between the two files, and one that dies while it writes."""
    store = ClipStore(tmp_path / "a.mp4", SETTINGS)
    for index in range(2):
        store.add(frames(index), carry(index))
    (store.folder / "clip-0002.mkv").write_bytes(b"whole, but its carry was never written")
    (store.folder / ".part-x.mkv").write_bytes(b"half")
    store.close()
    again = ClipStore(tmp_path / "a.mp4", SETTINGS)
    assert again.finished == 2
    assert same(again.carry(), carry(1))
    again.add(frames(2), carry(2))
    found = list(again.frames())
    assert len(found) == 3
    np.testing.assert_array_equal(found[2], frames(2))
    assert not list(store.folder.glob(".part-*"))


@pytest.mark.parametrize(("name", "value"), [("seed", 2), ("size", (48, 64)), ("prompt", "")])
def test_other_settings_start_over_and_say_which(tmp_path: Path, name: str, value: object) -> None:
    store = ClipStore(tmp_path / "a.mp4", SETTINGS)
    store.add(frames(0), carry(0))
    store.close()
    said: list[str] = []
    other = ClipStore(tmp_path / "a.mp4", SETTINGS | {name: value}, said.append)
    assert other.finished == 0
    assert said == [f"{store.folder} was made with another {name}; starting over."]
    other.close()
    assert {path.name for path in store.folder.iterdir()} == {"settings.json"}


@pytest.mark.parametrize("settings", ["of another seed", "lost"])
def test_clips_of_other_settings_are_kept_where_that_is_asked_for(tmp_path: Path, settings: str) -> None:
    store = ClipStore(tmp_path / "a.mp4", SETTINGS, keep=True)  # where there is nothing it begins
    for index in range(2):
        store.add(frames(index), carry(index))
    store.close()
    if settings == "lost":
        (store.folder / "settings.json").unlink()
    before = {path.name: path.read_bytes() for path in store.folder.glob("c*")}
    message = "program" if settings == "lost" else "seed"
    with pytest.raises(
        UserError, match=rf"a.mp4.parts was made with another {message}, and its clips .2. are to be kept"
    ):
        ClipStore(tmp_path / "a.mp4", SETTINGS | {"seed": 2}, keep=True)
    assert {path.name: path.read_bytes() for path in store.folder.glob("c*")} == before
    if settings != "lost":
        again = ClipStore(tmp_path / "a.mp4", SETTINGS, keep=True)
        assert again.finished == 2


def test_a_write_that_fails_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ClipStore(tmp_path / "a.mp4", SETTINGS)
    store.add(frames(0), carry(0))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match=r"clip 1 cannot be written .*No space left"):
        store.add(frames(1), carry(1))
    store.close()
    assert ClipStore(tmp_path / "a.mp4", SETTINGS).finished == 1


def test_damaged_and_foreign_files_are_told(tmp_path: Path) -> None:
    store = ClipStore(tmp_path / "a.mp4", SETTINGS)
    store.add(frames(0), carry(0))
    store.close()
    file = store.folder / "carry-0000.safetensors"
    whole = file.read_bytes()
    other = {name: torch.cat([value, value]) for name, value in carry(0).items()}
    for broken in (b"broken", whole[:-1] + bytes([whole[-1] ^ 1]), save_tensors(other)):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=r"carry-0000.safetensors: damaged; delete .*a.mp4.parts to start over"):
            ClipStore(tmp_path / "a.mp4", SETTINGS).carry()
    (store.folder / "clip-0000.mkv").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"clip-0000.mkv: damaged"):
        list(store.frames())
    (store.folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"got 'notes.txt'; move it away"):
        ClipStore(tmp_path / "a.mp4", SETTINGS)


def test_an_interrupt_while_the_folder_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the command says that nothing was written, and a folder is there."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("talkingdit.pipelines.resume.whole_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ClipStore(tmp_path / "a.mp4", SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_a_folder_of_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold a settings.json too."""
    folder = tmp_path / "a.mp4.parts"
    folder.mkdir()
    (folder / "settings.json").write_text("theirs")
    (folder / "notes.txt").write_text("theirs")

    def interrupted(_: Path) -> None:
        monkeypatch.undo()  # once
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "iterdir", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ClipStore(tmp_path / "a.mp4", SETTINGS)
    assert (folder / "settings.json").read_text() == (folder / "notes.txt").read_text() == "theirs"


def killed_in_a_carry(output: Path) -> None:
    """As the library leaves it that is killed while it writes."""

    def killed(tensors: object, path: Path, *_: object) -> None:
        Path(path).with_name(".tmpAbCdEf").write_bytes(b"x" * 5000)
        os.kill(os.getpid(), signal.SIGKILL)

    store = ClipStore(output, SETTINGS)
    store.add(frames(0), carry(0))
    safetensors.torch.save_file = killed
    store.add(frames(1), carry(1))


def test_a_carry_is_of_the_usual_mode_and_what_a_kill_leaves_of_it_is_removed(tmp_path: Path) -> None:
    assert run(killed_in_a_carry, tmp_path / "a.mp4") == -signal.SIGKILL
    left = ClipStore(tmp_path / "a.mp4", SETTINGS)
    assert left.finished == 1
    found = {path.name for path in left.folder.iterdir()}
    assert found == {"lock", "settings.json", "clip-0000.mkv", "clip-0001.mkv", "carry-0000.safetensors"}
    before = os.umask(0o027)
    try:
        left.add(frames(1), carry(1))
    finally:
        os.umask(before)
    assert stat.S_IMODE((left.folder / "carry-0001.safetensors").stat().st_mode) == 0o640
    left.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [".tmpAb3dEf", ".part-x1.safetensors", ".nfs0000000001", ".DS_Store", ".fuse_hidden1"])
def test_what_a_library_or_a_file_system_leaves_does_not_stop_a_resume(tmp_path: Path, left: str) -> None:
    store = ClipStore(tmp_path / "a.mp4", SETTINGS)
    store.add(frames(0), carry(0))
    store.close()
    (store.folder / left).write_bytes(b"whatever")
    again = ClipStore(tmp_path / "a.mp4", SETTINGS)
    assert again.finished == 1
    ours = left.startswith((".tmp", ".part"))
    assert (store.folder / left).exists() != ours
    again.remove()
    assert {path.name for path in tmp_path.glob("*/*")} == (set() if ours else {left})


def test_two_runs_of_one_video_do_not_meet(tmp_path: Path) -> None:
    """Also where one writes through a link."""
    (tmp_path / "b.mp4").symlink_to(tmp_path / "a.mp4")
    store = ClipStore(tmp_path / "a.mp4", SETTINGS)
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(UserError, match=r"a.mp4.parts: another run \(talkingdit generate, process \d+ on .*wait"):
            ClipStore(tmp_path / name, SETTINGS)
    store.add(frames(0), carry(0))
    assert len(list(store.frames())) == 1
    store.close()
    assert ClipStore(tmp_path / "b.mp4", SETTINGS).finished == 1


@pytest.mark.parametrize("name", ["clip-0001.mkv", "carry-0000.safetensors", "settings.json", "lock"])
def test_links_in_a_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    """The next clip would be written over the file that they point to."""
    ClipStore(tmp_path / "a.mp4", SETTINGS).close()
    theirs = tmp_path / "precious"
    theirs.write_text("theirs")
    (tmp_path / "a.mp4.parts" / name).unlink(missing_ok=True)
    (tmp_path / "a.mp4.parts" / name).symlink_to(theirs)
    with pytest.raises(UserError):
        ClipStore(tmp_path / "a.mp4", SETTINGS)
    assert theirs.read_text() == "theirs"


def test_clips_of_another_size_and_carries_without_numbers_are_damage(tmp_path: Path) -> None:
    store = ClipStore(tmp_path / "a.mp4", SETTINGS)
    store.add(frames(0)[:, :32], {"history": torch.full((2,), float("nan"))})
    with pytest.raises(UserError, match=r"clip-0000.mkv: damaged; delete"):
        list(store.frames())
    with pytest.raises(UserError, match=r"carry-0000.safetensors: damaged; delete"):
        store.carry()


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "\x00", '{"seed": 1}'])
def test_settings_that_cannot_be_read_start_over(tmp_path: Path, text: str) -> None:
    ClipStore(tmp_path / "a.mp4", SETTINGS).close()
    (tmp_path / "a.mp4.parts" / "settings.json").write_text(text)
    assert ClipStore(tmp_path / "a.mp4", SETTINGS).finished == 0


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_kept_clip_that_lost_frames_or_changed_is_told(tmp_path: Path, damage: str) -> None:
    store = ClipStore(tmp_path / "out.mp4", {"size": [32, 32]})
    frames = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    store.add(frames, None)
    file = tmp_path / "out.mp4.parts" / "clip-0000.mkv"
    assert np.array_equal(next(store.frames()), frames)
    data = bytearray(file.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 0x55
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"clip-0000\.mkv: damaged; delete"):
        list(store.frames())
    store.close()
