# SPDX-License-Identifier: Apache-2.0
"""A drawn world with known truth: characters, their voices, and a probe that reads mouths back from frames.

Two models of it ship with the package, of one character and of several people who each speak with a voice, and a
portrait and a recording to try them with.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
MODEL, PEOPLE, PORTRAIT, VOICE = ASSETS / "model", ASSETS / "people", ASSETS / "portrait.png", ASSETS / "voice.flac"
