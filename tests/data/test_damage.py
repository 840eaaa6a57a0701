# SPDX-License-Identifier: Apache-2.0
"""One file, or one byte, that is wrong costs one clip: it is named, counted and gone past, and never trained on."""

from __future__ import annotations

import dataclasses
import faulthandler
import io
import json
import os
import signal
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, PngImagePlugin

from talkingdit.data import workers
from talkingdit.data.claims import TRIES, Claims
from talkingdit.data.cutting import Cutting
from talkingdit.data.encoders import CheckpointEncoders, Encoders, PlainSettings
from talkingdit.data.encoding import broken_by, encode_clip
from talkingdit.data.manifest import read_manifest
from talkingdit.data.on_the_fly import OnTheFly
from talkingdit.data.precompute import FinishedVideo, PrecomputeJob, precompute, prepare
from talkingdit.data.sample import BrokenSample, ClipRequest, Sample
from talkingdit.data.shard_checks import check_description
from talkingdit.data.shards import PrecomputedShards, ShardWriter, part_of
from talkingdit.errors import UserError


class PlainEncoders(CheckpointEncoders):
    """Of no checkpoint: what becomes of files is tested here, not what encoders make of them."""

    OFFERS = ("latents",)

    def read_settings(self) -> PlainSettings:
        return PlainSettings(fps=16)

    def files(self) -> list[Path]:
        return []

    def load(self) -> Encoders:
        return _Pixels(None, self.settings)  # type: ignore[arg-type]


class _Pixels(Encoders):
    """Every eighth pixel."""

    def latents(self, frames: Any) -> torch.Tensor:
        video = frames if isinstance(frames, torch.Tensor) else torch.from_numpy(frames).permute(3, 0, 1, 2)[None]
        return video[0, :, ::4, ::8, ::8].float()


def clip(key: str, **more: Any) -> Sample:
    latents = torch.randn(4, 2, 4, 6, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    return Sample(key, "s", latents, text=torch.ones(3, 5), caption=key, **more)


def write(folder: Path, keys: str = "abc", dtype: torch.dtype = torch.bfloat16) -> PrecomputedShards:
    writer = ShardWriter(folder, 0, 1 << 20)
    for key in keys:
        writer.add(clip(key), {"fps": 16.0}, dtype)
    writer.finish()
    return PrecomputedShards(folder)


def read(source: PrecomputedShards, index: int) -> Sample:
    return source.sample(index, np.random.default_rng(0), ClipRequest())


# ---- Shards ----------------------------------------------------------------------------------------------------------


def test_a_bit_that_turned_anywhere_in_a_payload_is_named(tmp_path: Path) -> None:
    source = write(tmp_path)
    shard, about = source.clips[1]
    whole = Path(shard).read_bytes()
    places = {about["offset"], about["offset"] + about["size"] - 1}
    places |= set(np.random.default_rng(0).integers(about["offset"], about["offset"] + about["size"], 60).tolist())
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        Path(shard).write_bytes(damaged)
        end = about["offset"] + about["size"]
        with pytest.raises(BrokenSample, match=rf"b: .*clips-0000-000000.tar is damaged between .* and {end}: "):
            read(source, 1)
        assert [read(source, i).key for i in (0, 2)] == ["a", "c"]


def test_the_checksum_survives_the_loss_of_the_index(tmp_path: Path) -> None:
    source = write(tmp_path)
    (tmp_path / "clips-0000-000000.json").unlink()
    again = PrecomputedShards(tmp_path)
    assert [about for _, about in again.clips] == [about for _, about in source.clips]
    assert all("crc32" in about for _, about in again.clips)


def test_shards_from_before_checksums_are_read_as_they_are(tmp_path: Path) -> None:
    source = write(tmp_path)
    old = tmp_path / "old"
    old.mkdir()
    with tarfile.open(source.clips[0][0]) as tar, tarfile.open(old / "clips-0000-000000.tar", "w") as copy:
        for member in tar:
            content = tar.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".json"):
                content = json.dumps({k: v for k, v in json.loads(content).items() if k != "crc32"}).encode()
            member.size = len(content)
            copy.addfile(member, io.BytesIO(content))
    before = PrecomputedShards(old)
    assert not any("crc32" in about for _, about in before.clips)
    for index in range(3):
        assert torch.equal(read(before, index).latents, read(source, index).latents)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": -5}, "size of clip b must be a whole number of at least 1, got -5"),
        ({"frames": "2"}, "frames of clip b must be a whole number of at least 1, got '2'"),
        ({"history": None}, "history of clip b must be a whole number of at least 0, got None"),
        ({"fps": 0}, "fps of clip b must be a number over 0, got 0"),
        ({"key": 5}, "a clip is not described"),
    ],
)
def test_a_description_that_cannot_be_is_not_believed(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """An index is made from the shard; where the shard says it too, that is one sentence."""
    source = write(tmp_path)
    file = tmp_path / "clips-0000-000000.json"
    index = json.loads(file.read_text())
    index["clips"][1].update(change)
    file.write_text(json.dumps(index))
    assert [about for _, about in PrecomputedShards(tmp_path).clips] == [about for _, about in source.clips]
    with pytest.raises(ValueError, match=said):
        check_description(index["clips"][1], index["bytes"])


def test_a_shard_with_something_else_in_it_is_a_broken_sample(tmp_path: Path) -> None:
    source = write(tmp_path)
    payload = safetensors.torch.save({"weights": torch.ones(2)})
    _, about = source.clips[0]
    Path(source.clips[0][0]).write_bytes(b"\0" * about["offset"] + payload)
    about.update(size=len(payload), crc32=zlib.crc32(payload))
    with pytest.raises(BrokenSample, match="holds what is no clip: expected tensors of a sample, got 'weights'"):
        read(source, 0)
    about["size"] += 1
    with pytest.raises(BrokenSample, match=r"ends at byte \d+, expected"):
        read(source, 0)


@pytest.mark.parametrize("name", ["latents", "text"])
def test_what_is_not_finite_or_does_not_fit_the_dtype_is_not_written(tmp_path: Path, name: str) -> None:
    writer = ShardWriter(tmp_path, 0, 1 << 20)
    writer.add(clip("good"), {"fps": 16.0}, torch.float16)
    for value, said in ((float("nan"), "values that are not finite"), (1e6, "values that float16 cannot hold")):
        sample = clip("bad")
        getattr(sample, name).view(-1)[2] = value
        with pytest.raises(BrokenSample, match=rf"bad: {name} has {said}"):
            writer.add(sample, {"fps": 16.0}, torch.float16)
    writer.finish()
    assert [about["key"] for _, about in PrecomputedShards(tmp_path).clips] == ["good"]


def test_a_damaged_empty_prompt_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "empty_text.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match=r"empty_text.safetensors: damaged .*; delete it and precompute again"):
        PrecomputedShards(tmp_path)


# ---- Files -----------------------------------------------------------------------------------------------------------


def picture(path: Path, text: str = "") -> Path:
    about = PngImagePlugin.PngInfo()
    if text:
        about.add_text("Comment", text, zip=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(path, pnginfo=about)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three good ones, and one whose text chunk inflates to more than Pillow takes."""
    for name in ("a", "b", "c"):
        picture(tmp_path / f"{name}.png")
    picture(tmp_path / "bomb.png", "x" * (2 * PngImagePlugin.MAX_TEXT_CHUNK))
    rows = [{"video": f"{name}.png", "caption": name} for name in ("a", "bomb", "b", "c")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


CUTTING = Cutting(clip_frames=8, min_frames=4, max_area=32 * 48, multiple=16)


def run(folder: Path, encode: Any = encode_clip) -> tuple[list[FinishedVideo], list[dict[str, str]], list[str]]:
    job = PrecomputeJob(read_manifest(folder / "m.jsonl"), PlainEncoders(folder), encode, folder / "out", CUTTING)
    steps: list[FinishedVideo] = []
    prepare(job)
    precompute(job, report=steps.append)
    broken = folder / "out" / "broken.jsonl"
    rows = [json.loads(line) for line in broken.read_text().splitlines()] if broken.exists() else []
    return steps, rows, [about["caption"] for _, about in PrecomputedShards(folder / "out").clips]


def test_a_picture_with_an_inflating_text_is_counted_named_and_gone_past(pictures: Path) -> None:
    steps, rows, made = run(pictures)
    assert made == ["a", "b", "c"]
    assert sum(step.broken for step in steps) == len(rows) == 1
    assert "bomb.png" in rows[0]["reason"]
    source = OnTheFly(pictures / "m.jsonl", PlainEncoders(pictures), encode_clip, CUTTING)
    assert [error.key for error in source.broken] == [rows[0]["key"]]
    captions = [source.sample(i, np.random.default_rng(0), ClipRequest()).caption for i in range(len(source))]
    assert captions == ["a", "b", "c"]


ERRORS = (RuntimeError, ValueError, IndexError, KeyError, AssertionError, OverflowError, MemoryError, ZeroDivisionError)


@pytest.mark.parametrize("kind", [*ERRORS, SyntaxError, EOFError, UnicodeDecodeError, StopIteration])
def test_whatever_a_decoder_raises_costs_one_clip(pictures: Path, kind: type[Exception]) -> None:
    def encode(item: Any, *rest: Any, **more: Any) -> Sample:
        if item.entry.caption == "b":
            raise kind("utf-8", b"", 0, 1, "bad") if kind is UnicodeDecodeError else kind("the second\nhas two lines")
        return encode_clip(item, *rest, **more)

    (pictures / "bomb.png").write_bytes((pictures / "a.png").read_bytes())
    steps, rows, made = run(pictures, encode)
    assert sorted(made) == ["a", "bomb", "c"]
    assert sum(step.broken for step in steps) == len(rows) == 1
    assert rows[0]["reason"].startswith(f"{pictures / 'b.png'} cannot be decoded ({kind.__name__}")
    assert "\n" not in rows[0]["reason"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt(), UserError("no checkpoint")])
def test_what_is_no_fault_of_a_file_is_not_held_against_it(error: BaseException) -> None:
    kind = BrokenSample if isinstance(error, UserError) else type(error)
    with pytest.raises(kind), broken_by("key", Path("a.mp4")):
        raise error


def test_encoders_that_do_not_load_end_the_work(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: PlainEncoders) -> Encoders:
        raise UserError("vae: missing.")

    monkeypatch.setattr(PlainEncoders, "load", fail)
    with pytest.raises(UserError, match="vae: missing"):
        run(pictures)


def crash(item: Any, *rest: Any, **more: Any) -> Sample:
    """A decoder that takes its process with it."""
    if item.entry.caption == "b":
        faulthandler.disable()  # nobody wants to read where
        os.kill(os.getpid(), signal.SIGSEGV)
    return encode_clip(item, *rest, **more)


def test_a_decoder_that_crashes_costs_its_file_and_not_the_run(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START", "fork")  # saves imports
    job = PrecomputeJob(read_manifest(pictures / "m.jsonl"), PlainEncoders(pictures), crash, pictures / "out", CUTTING)
    prepare(job)
    steps: list[FinishedVideo] = []
    workers.run_workers(job, 0, 1, 2, steps.append)
    assert len(steps) == 4
    made = [about["caption"] for _, about in PrecomputedShards(job.out).clips]
    assert sorted(made) == ["a", "c"]
    rows = [json.loads(line) for line in (job.out / "broken.jsonl").read_text().splitlines()]
    assert any(row["reason"].endswith("b.png ended 2 processes that read it.") for row in rows)
    assert not list(job.out.glob(".part-*"))
    # The next time it is tried again, and by then it may be good.
    workers.run_workers(dataclasses.replace(job, encode=encode_clip), 0, 1, 2, steps.append)
    assert sorted(about["caption"] for _, about in PrecomputedShards(job.out).clips) == ["a", "b", "c"]


def test_a_kill_is_no_crash(tmp_path: Path) -> None:
    """A process that somebody ends once leaves a claim; the entry is read by the next."""
    claims = Claims(tmp_path, part_of(0))
    claims.begin("a")
    again = Claims(tmp_path, part_of(3))
    assert (again.tries("a"), again.tries("b")) == (1, 0)
    again.begin("a")
    assert Claims(tmp_path, part_of(1)).tries("a") == TRIES
    again.end()
    claims.end()
    assert Claims(tmp_path, part_of(1)).tries("a") == 0
    (tmp_path / f"{part_of(2)}now").write_text("[1")
    assert Claims(tmp_path, part_of(1)).tries("a") == 0
