# SPDX-License-Identifier: Apache-2.0
"""Cutting speech into utterances: lengths, order, transcripts; nothing is fetched here."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from talkingdit.media.files import SPEECH_RATE
from training.voices import LONGEST, SHORTEST, fetch_package, read_transcripts, sentences, split_long, trim
from training.voices import utterances as join


def prompt(name: str, seconds: float, text: str | None = "") -> tuple[str, str | None, np.ndarray]:
    return name, f"text of {name}" if text == "" else text, np.full(round(seconds * SPEECH_RATE), 0.1, np.float32)


def test_utterances_use_every_prompt_at_most_once_and_keep_their_length() -> None:
    rng = np.random.default_rng(0)
    prompts = [prompt(str(i), float(rng.uniform(0.3, 17.5))) for i in range(150)]
    made = list(join(prompts, "seed"))
    names = [name for used, _, _ in made for name in used]
    assert len(names) == len(set(names))
    assert sum(len(samples) for _, _, samples in made) > 0.9 * sum(len(p[2]) for p in prompts)
    for used, text, samples in made:
        assert SHORTEST <= len(samples) / SPEECH_RATE <= LONGEST
        assert text == " ".join(f"text of {name}" for name in used)
    assert [used for used, _, _ in made] == [used for used, _, _ in join(prompts, "seed")]


def test_an_utterance_with_an_unknown_part_has_no_transcript() -> None:
    made = list(join([prompt("a", 10), prompt("b", 8, None)], "seed"))
    assert [text for _, text, _ in made] == [None]


def test_long_recordings_are_cut_where_they_are_quiet() -> None:
    wave = np.full(30 * SPEECH_RATE, 0.1, np.float32)
    wave[14 * SPEECH_RATE : 15 * SPEECH_RATE] = 0.0
    pieces = split_long(wave)
    assert [round(len(piece) / SPEECH_RATE) for piece in pieces] == [14, 15]
    pause = np.zeros(SPEECH_RATE)
    assert len(trim(np.concatenate([pause, wave[:SPEECH_RATE], pause]))) < 1.2 * SPEECH_RATE


def test_transcripts_lose_remarks_and_comments(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/doc/core"
    folder.mkdir(parents=True)
    text = "\ufeff; a comment: no prompt\n\nhello: ...Hello  there (You greet.)\nbeep: [a tone]\n"
    (folder / "core-sounds-en.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert read_transcripts(tmp_path) == {"hello": "Hello there"}


def test_sentences_are_distinct_and_the_same_every_time() -> None:
    made = sentences(480)
    assert len(set(made)) == 480
    assert made == sentences(480)
    assert all(text[0].isupper() and text[-1] in ".?" for text in made)


def test_without_a_package_manager_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="needs apt-get and dpkg-deb"):
        fetch_package("flite", tmp_path)
