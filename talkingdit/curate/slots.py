# SPDX-License-Identifier: Apache-2.0
"""Places for models that no package carries: what to give, and which weights they then are.

[watch.models]
syncnet = "weights/syncnet_v2.model"

An empty slot measures nothing, and nothing stands in for it under its name. A filled one signs its figures with the
name of the weights, which holds the beginning of their digest where it is no standard one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from talkingdit.atomic import write_whole
from talkingdit.curate.settings import Watch
from talkingdit.detect.given import GivenModel, identify
from talkingdit.errors import UserError

MODELS = "models.json"  # in the folder of the results


@dataclass(frozen=True)
class CurateSlot:
    """A place for a model.

    Attributes:
        name: in `[watch.models]`.
        give: what a user may give.
        function: it is a "module:name" and no file.
    """

    name: str
    give: str
    function: bool = False


SLOTS = {
    slot.name: slot
    for slot in (
        CurateSlot("syncnet", "the file syncnet_v2.model of SyncNet's authors"),
        CurateSlot("light_asd", "the file finetuning_TalkSet.model or pretrain_AVA_CVPR.model of Light-ASD's authors"),
        CurateSlot("language", "a folder of Whisper (transformers) that knows many languages"),
        CurateSlot("caption", "a folder of a vision-language model (transformers)"),
        CurateSlot("expression", "an ONNX file of eight classes as EmotiEffLib has them"),
        CurateSlot("verify", "'module:name' of a function (picture, expression) -> expression or None", function=True),
    )
}


def missing_line(slot: CurateSlot) -> str:
    """The one line that says what to give where a slot is empty."""
    return f"not available; give: watch.models.{slot.name}, {slot.give}"


def empty_slots(watch: Watch, anchors: bool = True) -> dict[str, str]:
    """What settings ask for and lack weights for, by slot, with the line that says what to give."""
    wanted = [name for name in watch.stages if name in SLOTS]
    if anchors and "people" in watch.stages:
        wanted.append("expression")
    if anchors and watch.models.get("expression"):
        wanted.append("verify")
    return {name: missing_line(SLOTS[name]) + "." for name in wanted if not watch.models.get(name)}


def path_of(watch: Watch, slot: str) -> Path:
    """The file or folder that is given for a slot which is not empty."""
    return Path(watch.models[slot]).expanduser()


def check_models(watch: Watch) -> None:
    """Raises UserError where a file or folder that is given for a slot is not there."""
    for slot in SLOTS.values():
        if watch.models.get(slot.name) and not slot.function and not path_of(watch, slot.name).exists():
            raise UserError(f"{_where(watch, slot)}: there is no such file or folder; give {slot.give}.")


def identify_models(watch: Watch, cache: Path | None = None) -> dict[str, GivenModel]:
    """Which weights are given, by slot.

    Args:
        watch: settings.
        cache: the file of `note_models`, so that large files are read once and not by every command.

    Raises:
        UserError: as `identify`, or a function that is not there.
    """
    known = _read(cache)
    found: dict[str, GivenModel] = {}
    for name, slot in SLOTS.items():
        value = watch.models.get(name)
        if not value:
            continue
        if slot.function:
            found[name] = _function(watch, slot)
            continue
        path, before = path_of(watch, name), known.get(name, {})
        if before.get("path") == value and before.get("stamp") == _stamp(path):
            found[name] = GivenModel(before["name"], before["version"])
        else:
            found[name] = identify(path, _where(watch, slot), f"give {slot.give}")
    return found


def note_models(watch: Watch, given: Mapping[str, GivenModel], cache: Path) -> None:
    """Write down which weights are given, where that is news."""
    notes = {
        name: {
            "path": watch.models[name],
            "stamp": None if SLOTS[name].function else _stamp(path_of(watch, name)),
            **asdict(weights),
        }
        for name, weights in given.items()
    }
    if notes != _read(cache):
        write_whole(cache, (json.dumps(notes, indent=1) + "\n").encode())


def _where(watch: Watch, slot: CurateSlot) -> str:
    return f"curate: watch.models.{slot.name} = {watch.models[slot.name]!r}"


def _read(cache: Path | None) -> Mapping[str, Any]:
    if cache is None or not cache.is_file():
        return {}
    try:
        found = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    good = isinstance(found, dict) and all(
        isinstance(one, dict) and {"name", "version"} <= set(one) for one in found.values()
    )
    return found if good else {}


def _stamp(path: Path) -> list[list[Any]]:
    """Sizes and times of the files, by which it is seen that they are still the same."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _function(watch: Watch, slot: CurateSlot) -> GivenModel:
    """A function is known by its module's text."""
    value = watch.models[slot.name]
    module = value.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UserError(f"{_where(watch, slot)}: there is no such module; give {slot.give}.")
    text = Path(spec.origin).read_bytes() if spec.origin and Path(spec.origin).is_file() else value.encode()
    digest = hashlib.sha256(text).hexdigest()
    return GivenModel(f"{value}-{digest[:8]}", digest[:16])
