# SPDX-License-Identifier: Apache-2.0
"""One word for one thing, and some things written once: found in the source, nothing is imported."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from markdown_pages import ROOT

FOLDERS = ("talkingdit", "training", "bench", "integrations")

# Public classes of the same name in several modules, which stand for the same thing in each, and why that is so.
COUNTERPARTS = {
    "Options": "what a family lets one say about a video; families/family.py says what a file options.py is",
    "Sampling": "a family's options with the checkpoint's values where they say nothing",
    "Details": "what a family's outline hands to its pipeline",
    "VideoConditions": "what all clips of a family's video have in common",
    "CheckpointPaths": "where the parts of a family's checkpoint lie",
    "InitReport": "what a family took from a video model",
    "ValidationCase": "one of the videos by which a family's training is judged",
    "BlockInputs": "what all blocks of a family's transformer are given",
    "PackedClip": "a sample of a packed sequence, with a family's conditions",
    "ClipSpan": "where a clip is in a family's sequence",
    "SequenceShard": "a rank's part of a family's sequence",
    "Flags": "the command line of a verb",
}


@functools.cache
def trees() -> tuple[tuple[Path, ast.Module], ...]:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return tuple((path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))) for path in files)


def homonyms(modules: Iterable[tuple[Path, ast.Module]]) -> dict[str, list[str]]:
    """Public classes that several modules define at their top, with the modules."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for path, tree in modules:
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path))
    return {name: found for name, found in places.items() if len(found) > 1}


def test_a_class_name_stands_for_one_thing() -> None:
    found = homonyms(trees())
    assert {name: places for name, places in found.items() if name not in COUNTERPARTS} == {}
    assert set(COUNTERPARTS) <= set(found), "a counterpart that is none any more leaves the table"


def test_counterparts_are_in_families_or_verbs() -> None:
    rooms = ("talkingdit/families/", "talkingdit/cli/")
    for name, places in homonyms(trees()).items():
        assert sum(all(place.startswith(room) for place in places) for room in rooms) == 1, (name, places)


def test_homonyms_are_found() -> None:
    tree = ast.parse("class Job:\n    class Inner: ...\nclass _Job: ...")
    assert homonyms([(Path("a.py"), tree), (Path("b.py"), tree)]) == {"Job": ["a.py", "b.py"]}


def callers(wanted: set[str], modules: Iterable[tuple[Path, ast.Module]]) -> set[str]:
    """Modules that call a method or function of an object by one of these names."""
    return {
        str(path)
        for path, tree in modules
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in wanted
    }


def test_what_is_written_once_is_called_from_one_place() -> None:
    modules = trees()
    assert callers({"rename", "renames"}, modules) == {"talkingdit/atomic.py"}
    collectives = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}
    assert callers(collectives, modules) == {"talkingdit/distributed/team.py"}
    replacing = {str(path) for path, tree in modules if any(map(_replaces_a_file, ast.walk(tree)))}
    assert replacing == {"talkingdit/atomic.py"}


def _replaces_a_file(node: ast.AST) -> bool:
    """`os.replace(...)` or `shutil.move(...)`; `replace` alone is one of texts or dataclasses as a rule."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.replace", "os.rename", "shutil.move")
