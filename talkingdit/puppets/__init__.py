# SPDX-License-Identifier: Apache-2.0
"""A drawn world with known truth: characters, their voices, and a probe that reads mouths back from frames.

A model of it ships with the package, and a portrait and a recording to try it with.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
MODEL, PORTRAIT, VOICE = ASSETS / "model", ASSETS / "portrait.png", ASSETS / "voice.flac"
