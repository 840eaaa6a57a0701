# SPDX-License-Identifier: Apache-2.0
"""By what it is seen which figures of a folder still count, and what is to be measured anew.

Figures depend on how a video is watched and on what stages find for each other: `base`. A stage that finds nothing for
others stands alone: given other weights, or added later, it alone runs again, on what the others had found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from talkingdit.curate.settings import USUAL, Watch, Write
from talkingdit.curate.slots import SLOTS
from talkingdit.curate.stages import STAGES, is_alone, stage_of
from talkingdit.detect.given import GivenModel

ANCHORS = "anchors"  # they are found like a stage's figures


@dataclass(frozen=True)
class Versions:
    """Digests.

    Args:
        base: of all that every figure depends on; another one, and videos are watched anew.
        stages: of each stage that stands alone and has its weights, and of the anchors.
    """

    base: str
    stages: dict[str, str]


def versions_of(watch: Watch, given: Mapping[str, GivenModel], write: Write = USUAL) -> Versions:
    """The versions of settings with these weights."""
    own = {name: value for name, value in watch.models.items() if name not in SLOTS}

    def version(name: str) -> list[Any]:
        slot = getattr(stage_of(name), "slot", "")
        told = [name, given[slot].version if slot in given else "", {} if name in STAGES else own]
        changed = getattr(stage_of(name), "version", 1)
        return told if changed == 1 else [*told, changed]

    told = dataclasses.asdict(watch)
    for name in ("samples", "stages", "models"):
        del told[name]
    base = [told, *(version(name) for name in watch.stages if not is_alone(name))]
    stages = {name: _digest(version(name)) for name in watch.stages if is_alone(name) and not _is_empty(name, given)}
    if write.anchors:
        models = [given[slot].version for slot in ("expression", "verify") if slot in given]
        stages[ANCHORS] = _digest([*models, write.head_margin])
    return Versions(_digest(base), stages)


def _is_empty(name: str, given: Mapping[str, GivenModel]) -> bool:
    slot = getattr(stage_of(name), "slot", "")
    return bool(slot) and slot not in given


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
