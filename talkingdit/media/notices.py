# SPDX-License-Identifier: Apache-2.0
"""What is worth knowing about a file that is read all the same, said once per process."""

from __future__ import annotations

import warnings

_told: set[str] = set()


class MediaWarning(UserWarning):
    """A file is damaged, or says of itself what is not so; what it holds is used."""


def tell(sentence: str, about: str | None = None) -> None:
    """Warn, once for every sentence, or for everything that is said about the same. `talkingdit` prints it as its own.

    Args:
        about: what the sentence is about, where it may be worded with other numbers another time.
    """
    known = sentence if about is None else about
    if known not in _told:
        _told.add(known)
        warnings.warn(sentence, MediaWarning, stacklevel=2)


def forget() -> None:
    """Say everything anew, for tests."""
    _told.clear()
