# SPDX-License-Identifier: Apache-2.0
"""Several recordings as one file: their sum, as long as the longest, never clipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from talkingdit.errors import UserError
from talkingdit.media import mixing
from talkingdit.media.mixing import RATE, mix_voices


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


def test_a_mixture_is_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of any size, the rest of the longer one alone."""
    monkeypatch.setattr(mixing, "BLOCK", 1000)
    rng = np.random.default_rng(0)
    one, other = (rng.uniform(-0.4, 0.4, count).astype(np.float32) for count in (7321, 12_045))
    target = mix_voices([write(tmp_path / "a.wav", one), write(tmp_path / "b.wav", other)], tmp_path / "mix.flac")
    found, rate = soundfile.read(target, dtype="float32")
    expected = other.copy()
    expected[: len(one)] += one
    assert rate == RATE
    assert len(found) == len(other)
    assert np.abs(found - expected).max() < 2**-22


def test_what_would_clip_is_made_quieter_as_a_whole(tmp_path: Path) -> None:
    wave = 0.9 * np.sin(np.arange(4800) * 0.05).astype(np.float32)
    target = mix_voices([write(tmp_path / "a.wav", wave), write(tmp_path / "b.wav", wave)], tmp_path / "mix.flac")
    found, _ = soundfile.read(target, dtype="float32")
    assert np.abs(found).max() == pytest.approx(0.99, abs=1e-3)
    assert np.corrcoef(found, wave)[0, 1] > 0.99999


def test_what_is_no_recording_is_told(tmp_path: Path) -> None:
    voice = write(tmp_path / "a.wav", np.full(4800, 0.1, np.float32))
    with pytest.raises(UserError, match=r"nowhere\.wav"):
        mix_voices([voice, tmp_path / "nowhere.wav"], tmp_path / "mix.flac")
