# SPDX-License-Identifier: Apache-2.0
"""The verb `talkingdit info`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from talkingdit.cli.flags import Group, read
from talkingdit.openmp import waiting


@dataclass(frozen=True)
class Flags:
    """It has none."""


def info(argv: Sequence[str]) -> None:
    """Carry out the verb.

    Raises:
        UsageError: there are flags.
        ImportError: the native module is missing or does not load.
    """
    read("talkingdit info", "What was built and what was found.", [Group(Flags)], argv).refuse_unknown()

    import talkingdit
    from talkingdit.nn import attention_backends, bfloat16
    from talkingdit.pipelines import aside

    found = {**talkingdit.build_info(), **aside.report(), "threads wait": waiting(), **bfloat16.report()}
    found |= attention_backends.report()
    width = max(len(name) for name in found)
    for name, value in found.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, list | tuple):
            value = ", ".join(str(item) for item in value)
        sys.stdout.write(f"{name.replace('_', ' '):<{width}}  {'none' if value in (None, '') else value}\n")
