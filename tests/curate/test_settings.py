# SPDX-License-Identifier: Apache-2.0
"""The TOML file: what it may say, and one sentence for what it may not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from talkingdit.curate.anchors import Anchors
from talkingdit.curate.look import Look, Still
from talkingdit.curate.settings import LIMITS, CurateSettings, Limit, Watch, Write, read_settings
from talkingdit.curate.stages import STAGES, ClipFindings, Person, stage_of
from talkingdit.curate.versions import ANCHORS, versions_of
from talkingdit.errors import UserError


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "curate.toml"
    file.write_text(
        '[watch]\nfps = 12\nstages = ["picture"]\n[watch.models]\nlanguage = "whisper"\n'
        '[limits]\n"faces.share" = { at_least = 0.5 }\n"mine.figure" = { at_most = 2, required = true }\n'
        "[limits.speech]\nshare = { off = true }\n[write]\nwanted_languages = ['en']\n"
    )
    settings = read_settings(file)
    assert settings.watch == Watch(fps=12.0, stages=("picture",), models={"language": "whisper"})
    assert settings.limits == LIMITS | {
        "faces.share": Limit(at_least=0.5),
        "mine.figure": Limit(at_most=2, required=True),
        "speech.share": Limit(off=True),
    }
    assert settings.write.wanted_languages == ("en",)
    assert read_settings(None) == CurateSettings()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[watch]\nfps = 'many'", "watch.fps: expected float, got 'many'"),
        ("[watch]\nfps = nan", "watch.fps: expected float, got nan"),
        ("[watch]\nspeed = 1", "expected one of fps"),
        ("[limits]\n'faces.share' = { least = 1 }", "expected one of at_least"),
        ("[limits]\n'faces.share' = 3", "limits.faces.share: expected a table"),
        ("[decide]\n", "expected the tables watch, limits and write, got 'decide'"),
        ("[watch]\nfps = 0", "watch.fps: expected a number above 0, got 0.0"),
        ("[watch]\nsamples = 2", "watch.samples: expected 0 to 1, got 2.0"),
        ("[limits]\n'sync.lag' = { at_least = 2, at_most = 1 }", "expected at_least up to at_most, got at least 2 and"),
        ("[watch", "not TOML"),
        ("[watch]\nstages = 'picture'", "watch.stages: expected a list of texts"),
        ("[write]\nanchors = 1", "write.anchors: expected bool"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "curate.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"curate\.toml") as caught:
        read_settings(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a TOML file"):
        read_settings(tmp_path / "none.toml")


def test_limits_and_samples_are_no_reason_to_watch_anew() -> None:
    assert versions_of(Watch(samples=0.1), {}) == versions_of(Watch(), {})
    assert versions_of(Watch(fps=10), {}).base != versions_of(Watch(), {}).base


def test_the_margin_of_heads_is_that_of_the_settings() -> None:
    """Another one cuts anchors out anew, and nothing else."""
    boxes = np.array([[40, 40, 60, 60]], np.float32)
    found = ClipFindings(people=[Person(boxes, 1.0, boxes[:, 0], yaw=np.zeros(1, np.float32))])
    pictures = np.zeros((1, 100, 100, 3), np.uint8)
    still, silence = Still(0, pictures[0]), np.zeros(0, np.float32)
    look = Look(Path("a.mp4"), 0, 0, 0.0, 25.0, (100, 100), pictures=pictures, stills=[still], samples=silence)
    for margin, side in ((0.5, 60), (0.25, 40)):
        kind, _, picture = next(one for one in Anchors(Watch(), margin).find(look, found) if one[0] == "front")
        assert (kind, picture.shape[:2]) == ("front", (side, side))
    one, other = (versions_of(Watch(), {}, Write(head_margin=margin)) for margin in (0.5, 0.25))
    assert one.base == other.base
    assert {name for name in one.stages if one.stages[name] != other.stages[name]} == {ANCHORS}


def test_limits_keep_what_lies_within() -> None:
    assert Limit(at_least=1, at_most=2).keeps(1)
    assert Limit(at_least=1, at_most=2).keeps(2)
    assert not Limit(at_least=1).keeps(0.999)
    assert not Limit(at_most=2).keeps(2.001)
    assert Limit(at_least=1).keeps(None)
    assert not Limit(at_least=1, required=True).keeps(None)
    assert Limit(at_least=1, required=True, off=True).keeps(None)


def test_every_stage_of_the_list_is_there() -> None:
    for name in STAGES:
        assert hasattr(stage_of(name), "measure"), name
    with pytest.raises(UserError, match="expected a stage of"):
        stage_of("no_such_stage")
