# SPDX-License-Identifier: Apache-2.0
"""What is worth knowing about a file that is read all the same, said once per process."""

from __future__ import annotations

import warnings

_told: set[str] = set()


class MediaWarning(UserWarning):
    """A file is damaged, or says of itself what is not so; what it holds is used."""


def tell(sentence: str) -> None:
    """Warn, once for every sentence. `talkingdit` prints it as it prints its own."""
    if sentence not in _told:
        _told.add(sentence)
        warnings.warn(sentence, MediaWarning, stacklevel=2)


def forget() -> None:
    """Say everything anew, for tests."""
    _told.clear()
