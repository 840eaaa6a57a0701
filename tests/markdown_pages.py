# SPDX-License-Identifier: Apache-2.0
"""Reading the pages of the project: prose, code spans, code blocks, links, tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Page:
    """A markdown file.

    Args:
        path: of the file.
        prose: the text without code blocks.
        blocks: lines of fenced and indented code.
    """

    path: Path
    prose: str
    blocks: tuple[str, ...]

    @property
    def spans(self) -> list[str]:
        """What stands between backticks in the prose."""
        return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.prose)]

    @property
    def links(self) -> list[str]:
        """Targets of links and images that lead to this project."""
        return [link for link in re.findall(r"\]\(([^)\s]+)\)", self.prose) if "://" not in link]

    @property
    def anchors(self) -> set[str]:
        """Where links to headings of this page may lead."""
        headings = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def section(self, heading: str) -> str:
        """The prose below a heading, to the next one of its level or above."""
        level = re.escape(heading).replace(r"\ ", " ")
        found = re.search(rf"^(#+) {level}$\n(.*?)(?=^#{{1,6}} |\Z)", self.prose, re.MULTILINE | re.DOTALL)
        assert found is not None, f"{self.path.name} has no heading {heading!r}"
        return found.group(2)


def read_page(path: Path) -> Page:
    """A page, its code set apart from its prose."""
    prose, blocks, fenced, indented = [], [], False, False
    before = ""
    for line in path.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
            prose.append("")
            continue
        indented = line.startswith("    ") and (indented or not before.strip())
        (blocks if fenced or indented else prose).append(line)
        before = line
    return Page(path, "\n".join(prose), tuple(blocks))


def first_cells(section: str) -> list[str]:
    """The first column of the tables of a section, without the heads."""
    rows = [line.strip().strip("|").split("|")[0].strip() for line in section.splitlines() if line.startswith("|")]
    rule = next((number for number, cell in enumerate(rows) if set(cell) <= set("-: ") and cell), -1)
    return rows[rule + 1 :]
