# SPDX-License-Identifier: Apache-2.0
"""Shards may come from anyone: what is no clip is told, no link in a tar is followed, numbers are not believed."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from talkingdit.data import BrokenSample, ClipRequest
from talkingdit.data.shards import PrecomputedShards
from talkingdit.errors import UserError

ABOUT = {"caption": "", "kind": "video", "frames": 2, "height": 4, "width": 6, "history": 0, "fps": 16.0}
LATENTS = {"latents": torch.zeros(16, 2, 4, 6)}


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def clip(key: str = "a", about: Any = ABOUT, tensors: dict[str, torch.Tensor] | None = None) -> list[Any]:
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    payload = safetensors.torch.save(LATENTS if tensors is None else tensors)
    return [member(f"{key}.json", text), member(f"{key}.safetensors", payload)]


def shard(folder: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(folder / "clips-0000-000000.tar", "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return folder


def read(folder: Path) -> Any:
    return PrecomputedShards(folder).sample(0, np.random.default_rng(0), ClipRequest())


def test_a_plain_one_is_read(tmp_path: Path) -> None:
    assert read(shard(tmp_path, clip())).latents.shape == (16, 2, 4, 6)


@pytest.mark.parametrize(
    "about",
    [
        b"[" * 100_000, b"{", b"[1]", b'"x"', {}, {**ABOUT, "frames": "2"}, {**ABOUT, "frames": -1},
        {**ABOUT, "height": 10**9}, {**ABOUT, "frames": 10**12}, {**ABOUT, "fps": 1e9}, {**ABOUT, "fps": None},
        {**ABOUT, "caption": 5}, {**ABOUT, "kind": ["video"]}, {**ABOUT, "history": True}, b" " * (2 << 20) + b"{}",
    ],
)  # fmt: skip
def test_a_description_of_no_clip_is_told(tmp_path: Path, about: Any) -> None:
    with pytest.raises(UserError, match=r"clips-0000-000000.tar: damaged \("):
        PrecomputedShards(shard(tmp_path, clip(about=about)))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_what_is_no_file_in_a_tar_is_told(tmp_path: Path, kind: bytes) -> None:
    for at in (0, 1):
        members = clip()
        members[at] = member(members[at][0].name, kind=kind, link="/etc/passwd")
        with pytest.raises(UserError, match=r"damaged \("):
            PrecomputedShards(shard(tmp_path, members))


@pytest.mark.parametrize(
    ("place", "value"),
    [("offset", -1), ("offset", 10**9), ("size", 10**15), ("size", -5), ("offset", "0"), ("size", 2.0)],
)
def test_an_index_that_leads_out_of_its_shard_is_not_believed(tmp_path: Path, place: str, value: Any) -> None:
    """It is made anew from the shard."""
    folder = shard(tmp_path, clip())
    file = folder / "clips-0000-000000.tar"
    about = PrecomputedShards(folder).clips[0][1] | {place: value}
    index = {"bytes": file.stat().st_size, "clips": [about]}
    file.with_suffix(".json").write_text(json.dumps(index))
    assert read(folder).latents.shape == (16, 2, 4, 6)


@pytest.mark.parametrize("text", ["[" * 100_000, "5", "[]", '{"bytes": 1}', '{"bytes": 10240, "clips": 5}'])
def test_an_index_that_is_none_is_made_anew(tmp_path: Path, text: str) -> None:
    folder = shard(tmp_path, clip())
    (folder / "clips-0000-000000.json").write_text(text)
    assert read(folder).latents.shape == (16, 2, 4, 6)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"key": torch.zeros(1), **LATENTS},
        {"caption": torch.zeros(1), **LATENTS},
        {"__class__": torch.zeros(1), **LATENTS},
        {"latents": torch.zeros(16, 2, 4, 8)},
        {"latents": torch.zeros(16, 1, 4, 6)},
        {"latents": torch.zeros(5)},
        {**LATENTS, "audio": torch.zeros(3, 4, 7)},
        {**LATENTS, "history": torch.zeros(16, 3, 4, 6)},
        {**LATENTS, "reference": torch.zeros(16, 1, 2, 2)},
        {**LATENTS, "pose": torch.zeros(2)},
        {**LATENTS, "regions.face": torch.zeros(2, 4, 5)},
    ],
)
def test_tensors_of_no_clip_are_a_broken_sample(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(BrokenSample):
        read(shard(tmp_path, clip(tensors=tensors)))
