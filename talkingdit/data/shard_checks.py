# SPDX-License-Identifier: Apache-2.0
"""Whether what a shard holds is what it says: shards may come from anyone, and numbers are not taken at their word."""

from __future__ import annotations

import json
import tarfile
from typing import Any

from talkingdit.data.sample import BrokenSample, Sample

MOST_TEXT = 1 << 20  # bytes of a clip's description
MOST_FPS = 1000
MOST = {"frames": 1 << 20, "height": 1 << 13, "width": 1 << 13, "history": 1 << 20}  # latent
LEAST = {"offset": 0, "size": 1, "frames": 1, "height": 1, "width": 1, "history": 0}


def read_description(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    """The object in a .json member of a shard.

    Raises:
        ValueError: it is none.
    """
    stream = tar.extractfile(member) if member.isreg() and member.size <= MOST_TEXT else None
    if stream is None:
        raise ValueError(f"{member.name} is no description of a clip")
    try:
        found = json.loads(stream.read())
    except RecursionError as error:
        raise ValueError(f"{member.name} is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"{member.name} must hold an object, got {type(found).__name__}")
    return found


def check_description(clip: Any, size: int) -> dict[str, Any]:
    """A clip's description and place, if it has all that is asked of it and lies in its shard.

    Args:
        clip: from an index, or made of a shard.
        size: bytes of the shard.

    Raises:
        ValueError: says what is wrong.
    """
    if not isinstance(clip, dict) or not all(isinstance(clip.get(name), str) for name in ("key", "caption", "kind")):
        raise ValueError("a clip is not described")
    where = f"of clip {clip['key'][:80]}"
    for name, least in LEAST.items():
        value, most = clip.get(name), MOST.get(name, size)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} {where} must be a whole number of at least {least}, got {value!r:.40}")
        if value > most:
            raise ValueError(f"{name} {where} must be at most {most}, got {value}")
    if clip["offset"] + clip["size"] > size:
        raise ValueError(f"the end {where} must be in the shard, got {clip['offset'] + clip['size']} of {size} bytes")
    fps = clip.get("fps")
    number = isinstance(fps, int | float) and not isinstance(fps, bool)
    if not number or not 0 < (fps or 0) <= MOST_FPS:
        bound = f"at most {MOST_FPS}" if number and (fps or 0) > 0 else "a number over 0"
        raise ValueError(f"fps {where} must be {bound}, got {fps!r:.40}")
    return clip


def check_shapes(sample: Sample, about: dict[str, Any], shard: str) -> None:
    """Have the tensors of a clip the shapes that its description says?

    Raises:
        BrokenSample: one has another, or they are of different clips.
    """
    frames, side = about["frames"], (about["height"], about["width"])
    history = about["history"]
    wanted: dict[str, tuple[int | None, ...]] = {
        "latents": (None, frames, *side),
        "reference": (None, 1, *side),
        "history": (None, history, *side),
        "pose": (None, frames, *side),
        "audio": (None, None, 4 * frames),
        "audio_history": (None, None, None),
        "text": (None, None),
        "image": (None, None),
        "given": (None, frames, *side),
    }
    found = {name: getattr(sample, name) for name in wanted}
    for name, value in sample.regions.items():
        found[f"regions.{name}"], wanted[f"regions.{name}"] = value, (frames, *side)
    for name, value in sample.voices.items():
        found[f"voices.{name}"], wanted[f"voices.{name}"] = value, wanted["audio"]
    for name, value in sample.outside.items():
        found[f"outside.{name}"], wanted[f"outside.{name}"] = value, (None, None, None, None)  # of a size of their own
    for name, value in sample.inside.items():
        count = sample.outside[name].shape[1:2] if name in sample.outside else (0,)
        found[f"inside.{name}"], wanted[f"inside.{name}"] = value, tuple(count)
    for name, value in found.items():
        if value is None:
            continue
        shape = tuple(value.shape)
        fits = len(shape) == len(wanted[name]) and all(
            want is None or want == got for want, got in zip(wanted[name], shape, strict=True)
        )
        if not fits:
            raise BrokenSample(
                sample.key, f"{shard} is damaged: {name} has the shape {list(shape)}, which its description does not."
            )
