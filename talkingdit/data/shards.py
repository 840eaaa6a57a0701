# SPDX-License-Identifier: Apache-2.0
"""Clips in tar files (WebDataset), written one after the other, read in any order.

A clip is two members of a shard, `KEY.json` (what it is) and `KEY.safetensors` (its tensors), so that WebDataset and
every other program that knows tar reads them in sequence. Beside `NAME.tar` lies `NAME.json` with the place of every
clip in the shard and what is known of it; with it a clip is one read of a range of bytes, from a disk or from an object
store (any address that fsspec knows). It is made anew from the shard where it is missing.

A shard gets its name when it is complete, so a kill leaves no half one. A clip's description has the CRC-32 of its
tensors, which is compared whenever they are read: a disk that changed them makes a broken sample and no strange one.
Shards of before have none and are read as they are.
"""

from __future__ import annotations

import contextlib
import json
import re
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from talkingdit.atomic import PART, WholeFile, write_whole
from talkingdit.data.sample import BrokenSample, ClipRequest, Sample, Shape, flaw
from talkingdit.data.shard_checks import check_description, check_shapes, read_description
from talkingdit.errors import UserError

EMPTY_TEXT = "empty_text.safetensors"
GROUPS = ("regions", "voices", "outside", "inside")
SINGLE = ("latents", "audio", "text", "reference", "history", "audio_history", "pose", "image", "given")
_CUT = re.compile(r"-\d+[hsb]$")  # what `Cut.key` puts behind the key of the row
CHECKSUM = "crc32"  # of the member of tensors, in the description


class ShardWriter:
    """Writes the shards of one worker.

    Args:
        folder: where to, it exists.
        worker: number in the names of its shards.
        limit: bytes after which a shard is full.

    Raises:
        UserError: the disk is full or cannot be written.
    """

    def __init__(self, folder: Path, worker: int, limit: int):
        self.folder, self.worker, self.limit = folder, worker, limit
        taken = [int(path.stem.split("-")[2]) for path in folder.glob(f"clips-{worker:04d}-*.tar")]
        self.number = max(taken, default=-1) + 1
        self.bytes = 0  # in the shard that is open
        self._part: WholeFile | None = None
        self._torn = False  # an interrupt came while a clip was written

    def add(self, sample: Sample, about: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Append a clip; it is safe on the disk when its shard is full, or `finish` was called.

        Raises:
            BrokenSample: it has values that are not finite, or are not in this dtype; nothing is written.
        """
        tensors, meta = _pack(sample, dtype)
        payload = safetensors.torch.save(tensors)
        meta |= {CHECKSUM: zlib.crc32(payload), **about}
        members = {
            "__key__": sample.key,
            "json": json.dumps(meta, ensure_ascii=False, allow_nan=False).encode(),
            "safetensors": payload,
        }
        try:
            if self._part is None:
                self._open()
            self._torn = True
            self.bytes += self._tar.write(members)
            self._torn = False
            if self.bytes >= self.limit:
                self.finish()
        except OSError as error:
            self.abort()
            raise UserError(f"{self.folder}: a shard cannot be written ({error.strerror or error}).") from error

    def _open(self) -> None:
        import webdataset

        target = self.folder / f"clips-{self.worker:04d}-{self.number:06d}.tar"
        self._part = WholeFile(target, part_of(self.worker))
        self._stream = self._part.path.open("wb")
        self._tar = webdataset.TarWriter(self._stream, encoder=False, mtime=0)

    def finish(self) -> None:
        """Give the open shard its name."""
        if self._part is None or self._torn:
            self.abort()
            return
        try:
            self._tar.close()
            self._stream.close()
            with self._part.path.open("rb") as stream:
                index = {"bytes": self._part.path.stat().st_size, "clips": read_index(stream)}
            about = json.dumps(index, ensure_ascii=False).encode()
            write_whole(self._part.target.with_suffix(".json"), about, part_of(self.worker))
            self._part.finish(sync=True)
        except OSError as error:
            self.abort()
            raise UserError(f"{self.folder}: a shard cannot be written ({error.strerror or error}).") from error
        self._part = None
        self.number += 1
        self.bytes = 0

    def abort(self) -> None:
        """Leave nothing half-written behind."""
        if self._part is not None:
            for file in (self._tar, self._stream):
                with contextlib.suppress(OSError):
                    file.close()
            self._part.abort()
            self._part = None
            self._torn = False
            self.bytes = 0


def part_of(worker: int) -> str:
    """How names of what a worker has not finished begin."""
    return f"{PART}{worker:04d}-"


def read_index(stream: Any) -> list[dict[str, Any]]:
    """Place and description of every clip of a shard, from the shard itself."""
    clips: dict[str, dict[str, Any]] = {}
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            clip = clips.setdefault(key, {"key": key})
            if kind == "json":
                clip.update(read_description(tar, member) | {"key": key})
            elif kind == "safetensors":
                if not member.isreg():
                    raise ValueError(f"{member.name} is no file")
                clip.update(offset=member.offset_data, size=member.size)
    return list(clips.values())


def _pack(sample: Sample, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and everything else."""
    wrong = flaw(sample)
    tensors = {name: value.to(dtype).contiguous() for name, value in sample.tensors()}
    for name, value in tensors.items():
        if wrong is None and not bool(value.isfinite().all()):
            wrong = f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold"
    if wrong is not None:
        raise BrokenSample(sample.key, f"{wrong}.")
    _, frames, height, width = sample.latents.shape
    meta = {
        "caption": sample.caption,
        "kind": sample.kind,
        "frames": frames,
        "height": height,
        "width": width,
        "history": 0 if sample.history is None else sample.history.shape[1],
    }
    return tensors, meta


class PrecomputedShards:
    """A source of the clips in a folder that `talkingdit precompute` has written. Items are clips.

    Args:
        folder: a path, or an address that fsspec knows (s3://bucket/clips, ...).
        name: of the source; default: the last part of the folder's.

    Raises:
        UserError: no clips are there.
    """

    def __init__(self, folder: str | Path, name: str | None = None):
        self.fs, root = fsspec.core.url_to_fs(str(folder))
        self.root = root.rstrip("/")
        self.name = name or self.root.rsplit("/", 1)[-1]
        self.clips: list[tuple[str, dict[str, Any]]] = []  # shard and description
        for shard in sorted(self.fs.glob(f"{self.root}/clips-*.tar")):
            self.clips += [(shard, clip) for clip in self._index(shard)]
        if not self.clips:
            raise UserError(f"{folder}: expected shards that `talkingdit precompute` has written, got none.")
        self.empty_text = self._empty_text()

    def _index(self, shard: str) -> list[dict[str, Any]]:
        try:
            index = json.loads(self.fs.cat_file(shard.removesuffix(".tar") + ".json"))
            if index["bytes"] == self.fs.size(shard):
                return [check_description(clip, index["bytes"]) for clip in index["clips"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        try:
            with self.fs.open(shard, "rb") as stream:
                return [check_description(clip, self.fs.size(shard)) for clip in read_index(stream)]
        except (OSError, tarfile.TarError, ValueError) as error:
            raise UserError(f"{shard}: damaged ({error}); delete it and precompute again.") from error

    def _empty_text(self) -> Tensor | None:
        """Features [L, text_dim] of the empty caption, for training without text; None where there are none."""
        file = f"{self.root}/{EMPTY_TEXT}"
        try:
            return safetensors.torch.load(self.fs.cat_file(file))["text"].float()
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{file}: damaged ({error}); delete it and precompute again.") from error

    def __len__(self) -> int:
        return len(self.clips)

    def group(self, index: int) -> str:
        """Name of the row of the manifest that clip `index` was cut from."""
        return _CUT.sub("", self.clips[index][1]["key"])

    def shape(self, index: int) -> Shape:
        """What clip `index` is."""
        about = self.clips[index][1]
        return Shape(
            frames=about["frames"],
            height=about["height"],
            width=about["width"],
            fps=about["fps"],
            history=about["history"],
            kind=about["kind"],
        )

    def sample(self, index: int, rng: np.random.Generator, clip: ClipRequest) -> Sample:
        """Clip `index`, or its beginning where fewer latent frames are asked for.

        Raises:
            BrokenSample: the shard is damaged or cannot be reached, or holds what is no clip.
            ValueError: the request does not fit its shape.
        """
        shard, about = self.clips[index]
        frames = about["frames"] if clip.frames is None else clip.frames
        size = (clip.height or about["height"], clip.width or about["width"])
        if frames > about["frames"] or size != (about["height"], about["width"]):
            raise ValueError(
                f"{self.name}: clip {about['key']} has {about['frames']} latent frames of {about['height']} x "
                f"{about['width']}, asked for {frames} of {size[0]} x {size[1]}"
            )
        tensors = self._tensors(shard, about)
        sample = Sample(
            key=about["key"],
            source=self.name,
            caption=about["caption"],
            kind=about["kind"],
            regions=_group(tensors, "regions"),
            voices=_group(tensors, "voices"),
            outside=_group(tensors, "outside"),
            inside=_group(tensors, "inside"),
            **tensors,  # what is left has the names of fields
        )
        check_shapes(sample, about, shard)
        return _shorter(sample, frames, keep_history=clip.history is not False)

    def _tensors(self, shard: str, about: Mapping[str, Any]) -> dict[str, Tensor]:
        """What a clip is made of, float32, by the names that `Sample.tensors` gives."""
        key, end = about["key"], about["offset"] + about["size"]
        try:
            data = self.fs.cat_file(shard, start=about["offset"], end=end)
        except (OSError, ValueError) as error:
            raise BrokenSample(key, f"{shard} cannot be read ({error}).") from error
        if len(data) != about["size"]:
            raise BrokenSample(key, f"{shard} ends at byte {about['offset'] + len(data)}, expected {end} or more.")
        if CHECKSUM in about and zlib.crc32(data) != about[CHECKSUM]:
            raise BrokenSample(
                key, f"{shard} is damaged between bytes {about['offset']} and {end}: their checksum is another one."
            )
        try:
            tensors = {name: value.float() for name, value in safetensors.torch.load(data).items()}
        except (SafetensorError, ValueError, KeyError) as error:
            raise BrokenSample(key, f"{shard} cannot be read ({error}).") from error
        strange = [name for name in tensors if name not in SINGLE and name.partition(".")[0] not in GROUPS]
        if strange or "latents" not in tensors:
            got = repr(strange[0]) if strange else "no latents"
            raise BrokenSample(key, f"{shard} holds what is no clip: expected tensors of a sample, got {got}.")
        return tensors


def _group(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """Takes the members of a group out of the tensors."""
    names = [name for name in tensors if name.startswith(f"{group}.")]
    return {name.removeprefix(f"{group}."): tensors.pop(name) for name in names}


def _shorter(sample: Sample, frames: int, keep_history: bool) -> Sample:
    """The first latent frames of a clip; the causal autoencoder gives a shorter clip the same ones."""
    sample.latents = sample.latents[:, :frames]
    sample.audio = None if sample.audio is None else sample.audio[..., : 4 * frames]
    sample.pose = None if sample.pose is None else sample.pose[:, :frames]
    sample.regions = {name: region[:frames] for name, region in sample.regions.items()}
    sample.voices = {name: voice[..., : 4 * frames] for name, voice in sample.voices.items()}
    if not keep_history:
        sample.history = sample.audio_history = None
    return sample
