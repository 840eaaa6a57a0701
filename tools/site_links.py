# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: links of pages to files that are not on the site become the names of these files."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The text of a page as the site shows it."""
    return OUTSIDE.sub(r"`\1`", markdown)
