# SPDX-License-Identifier: Apache-2.0
"""What the pages name must be there: files, modules, functions, commands, links."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from functools import cache

import pytest
from markdown_pages import ROOT, Page, read_page

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_WORDS = 1200  # of the README
FOLDERS = (
    "bench",
    "csrc",
    "cuda",
    "docs",
    "examples",
    "integrations",
    "talkingdit",
    "tests",
    "tools",
    "training",
    ".ci",
)
FILE = re.compile(r"\.(py|toml|json|jsonl)$")
SOURCE = re.compile(r"[\w.-]+\.(py|cu|cuh|cpp|h|sh|sbatch)")
ELSEWHERE = {"train_s2v.py"}  # of VideoX-Fun
OURS = r"(?:talkingdit|training|bench)"
# Rooms whose names the pages also use without "talkingdit." before them. `data.` is a section of training's files, too.
ROOMS = ("autoencoders", "checkpoints", "distributed", "encoders", "families", "media", "models", "nn", "ops")
ROOMS += ("pipelines", "puppets")


@pytest.fixture(scope="module", params=PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def page(request: pytest.FixtureRequest) -> Page:
    return read_page(request.param)


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS


def test_the_readme_gives_the_figures_that_were_measured() -> None:
    result = json.loads((ROOT / "bench" / "results" / "puppets.json").read_text())
    total, text = result["total"], " ".join((ROOT / "README.md").read_text().split())
    shuffled = abs(total["shuffled"])
    assert f"r = {total['r']:.3f} and slope {total['slope']:.2f}" in text
    assert f"against another voice r is {shuffled:.2f}" in text
    assert f"right in {100 * total['identity']:.1f} % of the frames" in text
    assert f"right in {100 * total['expression']:.1f} %" in text
    assert result["long"]["identity"] == 1.0
    assert f"over {len(result['rows'])} clips of 12 seconds" in text
    assert total["lags"] == [0]


def test_every_page_is_linked_from_the_index() -> None:
    index = read_page(ROOT / "docs" / "README.md")
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= {*index.links, "README.md"}


def test_links_lead_somewhere(page: Page) -> None:
    for link in page.links:
        file, _, anchor = link.partition("#")
        target = page.path.parent / file if file else page.path
        assert target.exists(), link
        if anchor:
            assert anchor in read_page(target).anchors, link


def test_files_are_there(page: Page) -> None:
    names = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")} | {p.name for p in ROOT.iterdir()}
    missing = []
    for word in words(page):
        path = word.split("::")[0].rstrip("/")
        pattern = re.sub(r"<\w+>|\.\.\.|\b[A-Z]+(?=/)", "*", path)
        if "/" in path and path.split("/")[0] in FOLDERS:
            missing += [word] if not any(ROOT.glob(pattern)) else []
        elif SOURCE.fullmatch(path) and path not in names | ELSEWHERE:
            missing.append(word)
    assert missing == []


def test_tests_that_are_named_are_there(page: Page) -> None:
    """A promise is worth what holds it."""
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", page.path.read_text()):
        found = [path for path in (ROOT / "tests").rglob(file.rpartition("/")[2]) if path.as_posix().endswith(file)]
        assert any(f"def {name}(" in path.read_text() for path in found), f"{file}::{name}"


def words(page: Page) -> Iterator[str]:
    """What may be a path: words of code spans and of command lines, without what a shell puts around them."""
    for text in [*page.spans, *page.blocks]:
        for word in re.split(r"[\s,;\"'`()=]+", text.split(" # ")[0]):
            yield word.strip(".:") if not word.startswith(".ci") else word


def test_modules_and_what_is_in_them_are_there(page: Page) -> None:
    named = re.compile(rf"(?<![\w./-]){OURS}(?:\.\w+)+(?![\w/]|\.\w)")
    short = re.compile(rf"(?:{'|'.join(ROOMS)})(?:\.\w+)+")
    names = {name for text in [*page.spans, *page.blocks] for name in named.findall(text) if not FILE.search(name)}
    names |= {f"talkingdit.{span}" for span in page.spans if short.fullmatch(span) and not FILE.search(span)}
    missing = sorted(name for name in names if not found(name))
    assert missing == []


def test_modules_of_the_changelog_have_moved_where_it_says() -> None:
    rows = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("| `")]
    moved = [name for row in rows for name in re.findall(r"`(talkingdit[\w.]*)`", row.split("|")[2])]
    assert moved
    assert [name for name in moved if not found(name)] == []


def test_imports_of_examples_work(page: Page) -> None:
    line = re.compile(rf"\s*from ({OURS}[\w.]*) import ([\w, ]+)")
    missing = []
    for module, names in (match.groups() for match in map(line.match, page.blocks) if match):
        missing += [f"{module}.{name}" for name in names.split(", ") if not found(f"{module}.{name.split()[0]}")]
    assert missing == []


def found(name: str) -> bool:
    """Is there a module, or something in a module, of this dotted name?"""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(thing, part):
                return part in getattr(thing, "__dataclass_fields__", {})
            thing = getattr(thing, part)
        return True
    return False


def test_programs_are_there(page: Page) -> None:
    programs = {name for text in [*page.spans, *page.blocks] for name in re.findall(rf"-m ({OURS}[\w.]*)", text)}
    missing = []
    for name in programs:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
        missing += [name] if spec is None else []
    assert missing == []


def test_verbs_of_the_command_are_there(page: Page) -> None:
    command = re.compile(r"(?:^|[\s/])talkingdit (?!import\b)([a-z][\w-]*)")
    verbs = {verb for text in [*page.spans, *page.blocks] for verb in command.findall(text.split(" # ")[0])}
    assert sorted(verbs - verbs_of_help()) == []


@cache
def verbs_of_help() -> set[str]:
    from talkingdit.cli.main import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main(["--help"])
    return set(re.findall(r"[a-z][\w-]*", text.getvalue()))


def test_targets_of_make_are_there(page: Page) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for text in [*page.spans, *page.blocks] for target in re.findall(r"^\s*make ([a-z]+)", text)}
    assert sorted(named - targets) == []
