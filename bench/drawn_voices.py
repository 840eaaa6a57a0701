# SPDX-License-Identifier: Apache-2.0
"""Voices that drawn characters speak with in ablations: those of `training.voices`, of speakers to train on and others.

A folder of voices is fetched once; a quick run takes the recording that ships for both kinds of speakers.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.ablations import Budget
from talkingdit.atomic import write_whole
from talkingdit.families.puppet.drawn import Voice, read_voices
from talkingdit.families.puppet.evaluate import read_voices as read_held_out
from talkingdit.models import default_checkpoint
from talkingdit.puppets.world import FloatArray


def fetch(folder: Path, budget: Budget) -> Path:
    """The folder of voices within that of ablations."""
    voices = folder / "voices"
    if (voices / "index.jsonl").is_file():
        return voices
    if not budget.quick:
        subprocess.run([sys.executable, "-m", "training.voices", "--out", str(voices)], check=True)
        return voices
    voices.mkdir(parents=True, exist_ok=True)
    shutil.copy(default_checkpoint().parent / "voice.flac", voices)
    rows = [
        {"path": "voice.flac", "speaker": split, "language": "en", "split": split} for split in ("train", "held_out")
    ]
    write_whole(voices / "index.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return voices


def trained(folder: Path, budget: Budget, fps: int) -> Sequence[Voice]:
    """Speakers to train on."""
    return read_voices(fetch(folder, budget), "train", fps)


def held_out(folder: Path, budget: Budget, seconds: float, count: int, but: str = "") -> list[FloatArray]:
    """So many stretches of speech [n] at 16 kHz of speakers that no clip has, the speakers in turn.

    Args:
        but: a language that is left out, of the two of `training.voices`.
    """
    voices, rng = fetch(folder, budget), np.random.default_rng(budget.seed)
    found = read_held_out(voices, seconds, 2 * count if but else count, rng)
    return [voice.samples for voice in found if voice.language != but][:count]
