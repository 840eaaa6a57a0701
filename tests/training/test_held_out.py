# SPDX-License-Identifier: Apache-2.0
"""The held-out loss: on clips that are never drawn, the same numbers on every layout and in every run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import make_world, read_log, train

from talkingdit.data.sample import BrokenSample, ClipRequest, Sample, Shape, group_of
from talkingdit.errors import UserError
from training.config import Config, read_toml
from training.held_out import HeldOut, held_items
from training.loader import Loader
from training.sections import BatchConfig, HeldOutConfig, StageConfig


class Videos:
    """Four clips of every video; latents tell the clip."""

    def __init__(self, name: str, videos: int, broken: tuple[int, ...] = ()) -> None:
        self.name, self.videos, self.broken = name, videos, broken

    def __len__(self) -> int:
        return 4 * self.videos

    def group(self, index: int) -> str:
        return f"video-{index // 4}"

    def shape(self, index: int) -> Shape:
        return Shape(8, 4, 6)

    def sample(self, index: int, rng: np.random.Generator, clip: ClipRequest) -> Sample:
        if index in self.broken:
            raise BrokenSample(f"{index}", "damaged.")
        return Sample(f"{index}", self.name, torch.full((2, clip.frames or 8, 4, 6), float(index)))


def test_whole_videos_are_held_out_by_their_names_and_stay_so() -> None:
    source = Videos("a", 50)
    held = held_items({"a": source}, HeldOutConfig(share=0.2))["a"]
    videos = {group_of(source, i) for i in held}
    assert 0 < len(videos) < 25
    assert held == {i for i in range(200) if group_of(source, i) in videos}
    more = held_items({"b": Videos("b", 80)}, HeldOutConfig(share=0.2))["b"]
    assert held == {i for i in more if i < 200}  # under another name, and with other videos behind it
    smaller = held_items({"a": source}, HeldOutConfig(share=0.05))["a"]
    assert smaller < held


def test_one_video_at_least_is_held_out_and_one_is_left() -> None:
    assert len(held_items({"a": Videos("a", 2)}, HeldOutConfig(share=1e-9))["a"]) == 4
    with pytest.raises(UserError, match=r"held_out.share: 0.5 of the 1 videos of source 'a' leaves none to train on"):
        held_items({"a": Videos("a", 1)}, HeldOutConfig(share=0.5))
    assert held_items({"a": Videos("a", 1)}, HeldOutConfig(sources=["a"]))["a"] == {0, 1, 2, 3}
    assert held_items({"a": Videos("a", 1)}, HeldOutConfig()) == {}


def test_what_is_held_out_is_never_drawn() -> None:
    sources = {"a": Videos("a", 12)}
    held = held_items(sources, HeldOutConfig(share=0.3))
    batch = BatchConfig(count=3, size=2, frames=[8])
    loader = Loader(sources, StageConfig(steps=9, mix={"a": 1.0}, batch=batch), 0, held=held)
    drawn = {int(s.latents[0, 0, 0, 0]) for _ in range(20) for b in next(loader) for s in b.samples}
    assert drawn == set(range(48)) - held["a"]
    # A state from before something was held out has such samples waiting; they are not drawn either.
    before = Loader(sources, StageConfig(steps=9, mix={"a": 1.0}, batch=batch), 0)
    next(before)
    loader.load_state_dict(before.state_dict())
    drawn = {int(s.latents[0, 0, 0, 0]) for _ in range(20) for b in next(loader) for s in b.samples}
    assert not drawn & held["a"]


def test_sources_take_turns_among_the_clips_that_are_measured() -> None:
    sources = {"a": Videos("a", 3), "b": Videos("b", 1)}
    config = HeldOutConfig(sources=["a", "b"], clips=7)
    chosen = HeldOut(sources, held_items(sources, config), config, 8).chosen()
    assert [name for name, _ in chosen] == ["a", "b"] * 3 + ["a"]
    assert len(set(chosen)) == 7
    fewer = HeldOut(sources, held_items(sources, config), replace(config, clips=3), 8).chosen()
    assert fewer == chosen[:3]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("every = 10", "held_out.every needs held_out.share or held_out.sources, got neither"),
        ("share = 1.0", "held_out.share must be at least 0 and less than 1, got 1"),
        ('sources = ["film"]', r"held_out.sources: 'film' is no source; \[data.sources\] has: puppets"),
        ("levels = []", "held_out.levels must name one level of noise or more, got none"),
        ("levels = [0.5, 1.5]", "held_out.levels.1 must be 0 to 1, got 1.5"),
        (
            'sources = ["puppets"]\n[data.mix]\npuppets = 1',
            "mix.puppets: this source is held out, see held_out.sources",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, keys: str, said: str) -> None:
    (tmp_path / "run.toml").write_text(f"[held_out]\n{keys}\n")
    with pytest.raises(ValueError, match=said):
        read_toml(tmp_path / "run.toml")


def test_a_held_out_source_is_in_no_mixture_that_is_not_said(tmp_path: Path) -> None:
    text = '[data.sources.a]\nkind = "precomputed"\n[data.sources.b]\nkind = "precomputed"\n'
    (tmp_path / "run.toml").write_text(text + '[held_out]\nsources = ["b"]\n')
    assert read_toml(tmp_path / "run.toml").stages[0].mix == {"a": 1.0}


# ---- In a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make_world(tmp_path_factory.mktemp("world"))
    config.held_out = HeldOutConfig(every=2, share=0.4, clips=3, levels=[0.2, 0.8])
    config.stage_tables = [{"name": "speak", "steps": 3}]
    return config


def measured(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in log if "held_out/loss" in line]


@pytest.mark.slow
def test_the_held_out_loss_is_the_same_on_every_layout_and_seed(world: Config, processes: Any, tmp_path: Path) -> None:
    processes(1, train, copy.deepcopy(world), tmp_path / "one")
    one = measured(read_log(tmp_path / "one"))
    assert [line["step"] for line in one] == [0, 2, 3]
    assert all(line["held_out/loss"] == pytest.approx((line["held_out/noise_0.2"] + line["held_out/noise_0.8"]) / 2)
               for line in one)  # fmt: skip
    assert one[0]["held_out/loss"] != one[2]["held_out/loss"]
    for size, layout in ((2, {}), (2, {"ulysses": 2})):
        out = tmp_path / f"{size}{layout}"
        processes(size, train, copy.deepcopy(world), out, layout, timeout=240)
        other = measured(read_log(out))
        assert [line["step"] for line in other] == [0, 2, 3]
        for mine, yours in zip(other, one, strict=True):
            for name in ("held_out/loss", "held_out/noise_0.2", "held_out/noise_0.8"):
                assert mine[name] == pytest.approx(yours[name], rel=1e-5)
    # Measuring takes no random number from training: its losses are those of a run without.
    plain = copy.deepcopy(world)
    plain.held_out = replace(plain.held_out, every=0)
    processes(1, train, plain, tmp_path / "plain")
    losses = [line["loss"] for line in read_log(tmp_path / "one") if "loss" in line]
    assert [line["loss"] for line in read_log(tmp_path / "plain")] == losses


def test_clips_that_cannot_be_read_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    from types import SimpleNamespace

    from training import parallel
    from training.sections import ParallelConfig

    mesh = parallel.start(ParallelConfig(precision="fp32"), "cpu")
    try:
        config = HeldOutConfig(sources=["a"], clips=8)
        whole = {"a": Videos("a", 2)}
        order = HeldOut(whole, held_items(whole, config), config, 8).chosen()
        sources = {"a": Videos("a", 2, broken=(order[0][1], order[3][1]))}
        found = HeldOut(sources, held_items(sources, config), config, 8)
        assert found._open(mesh) == [pair for i, pair in enumerate(order) if i not in (0, 3)]
        assert caplog.text.count("held_out: broken sample left out") == 2
        sources = {"a": Videos("a", 2, broken=tuple(range(8)))}
        with pytest.raises(UserError, match=r"held_out: expected clips that can be read, got none; first: .*damaged"):
            HeldOut(sources, held_items(sources, config), config, 8).measure(SimpleNamespace(), StageConfig(), mesh)  # type: ignore[arg-type]
    finally:
        parallel.stop()
