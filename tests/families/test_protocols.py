# SPDX-License-Identifier: Apache-2.0
"""Every family gives what the package asks for, under the names and with the arguments that it asks with."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from talkingdit import families
from talkingdit.data.encoding import Clips
from talkingdit.families import family as parts
from talkingdit.families.training import Train
from talkingdit.nn.units import Units
from talkingdit.plan.cost import Cost

PARTS: dict[str, Any] = {
    "presets": parts.Presets,
    "options": parts.Options,
    "checkpoint": parts.Checkpoint,
    "load": parts.Load,
    "outline": parts.OutlinePart,
    "pipeline": parts.Pipeline,
    "units": Units,
    "cost": Cost,
    "clips": Clips,
    "train": Train,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", families.names())
def test_a_family_fulfils_its_protocols(name: str, part: str) -> None:
    given, protocol = families.get(name).part(part), PARTS[part]
    for member in protocol.__annotations__:
        assert hasattr(given, member), member
    for member, asked in inspect.getmembers(protocol, inspect.isfunction):
        if member.startswith("_"):
            continue
        wanted = list(inspect.signature(asked).parameters.values())[1:]
        offered = inspect.signature(getattr(given, member)).parameters
        names = list(offered)
        for place, argument in enumerate(wanted):
            if argument.kind is inspect.Parameter.VAR_KEYWORD:
                continue
            assert names[place] == argument.name, f"{member}: {argument.name}"
            if argument.default is not inspect.Parameter.empty:
                assert offered[argument.name].default is not inspect.Parameter.empty, f"{member}: {argument.name}"


def test_a_name_that_is_no_family_is_told() -> None:
    with pytest.raises(ValueError, match=r"family: expected one of puppet, wan_s2v, .*, got 'sora'"):
        families.get("sora")
