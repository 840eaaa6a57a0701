# SPDX-License-Identifier: Apache-2.0
"""Several processes must make the video of one, whatever way they share the work, and stop together."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoint import make_checkpoint
from tiny_s2v import AUDIO_DIM, LAYERS, make_s2v
from torch import Tensor

from talkingdit import families
from talkingdit.distributed.layout import Layout, Parallel
from talkingdit.distributed.team import ALONE, OtherRankError, Team
from talkingdit.errors import UserError
from talkingdit.families.puppet.options import Options as PuppetOptions
from talkingdit.families.puppet.outline import Sampling as PuppetSampling
from talkingdit.families.puppet.pipeline import PuppetPipeline
from talkingdit.families.wan_s2v.checkpoint import WanS2VCheckpoint
from talkingdit.families.wan_s2v.options import Options
from talkingdit.families.wan_s2v.outline import Sampling
from talkingdit.families.wan_s2v.pipeline import WanS2VPipeline
from talkingdit.models import load_checkpoint
from talkingdit.pipelines.long_video import generate_clips
from talkingdit.pipelines.memory import Memory, fit
from talkingdit.pipelines.parallel import share_work

PATIENCE = 240.0  # seconds; the first job of a process imports everything
HEIGHT, WIDTH = 80, 32  # 10 latent rows: uneven strips for four processes
SETTINGS = {"motion_frames": 25}
SAMPLING: dict[str, Any] = {"clip_frames": 8, "seed": 3, "negative_prompt": "ugly hands", "match_colour": True}
IMAGE = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@functools.cache
def checkpoint() -> WanS2VCheckpoint:
    """With two heads, made once per process."""
    return make_s2v(settings=SETTINGS)


def voice(frames: int) -> Tensor:
    return torch.randn(LAYERS, AUDIO_DIM, frames, generator=torch.Generator().manual_seed(7))


def pose(index: int) -> Tensor:
    return torch.rand(1, 3, 8, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(8 + index)) * 2 - 1


@dataclass
class Made:
    """What one process made of two clips."""

    latents: list[Tensor]
    frames: list[Tensor]
    history: Tensor  # that the first clip hands on


def make_clips(words: str, more: dict[str, Any], memory: str = "", posed: bool = False) -> Made:
    team, model = Team.start(), checkpoint()
    if memory:
        model = make_s2v(settings=SETTINGS)
        fit(model.transformer, Memory.parse(memory), "cpu", families.get("wan_s2v").units)
    sampling = Sampling.of(Options(**SAMPLING | more), model.settings)
    parallel = share_work(team, Layout.parse(words), sampling.predictions, model)
    pipeline = WanS2VPipeline(model, parallel)
    denoise, latents = pipeline._denoise, []

    def recorded(*given: Any) -> Tensor:
        latents.append(denoise(*given))
        return latents[-1]

    pipeline._denoise = recorded  # type: ignore[method-assign]
    conditions = pipeline.conditions(
        IMAGE, "a face", sampling, voice(16), audio_frames=15, pose=pose if posed else None
    )
    clips = list(generate_clips(pipeline, conditions, conditions.clips))
    assert clips[0].carry is not None
    return Made(latents, [clip.frames for clip in clips], clips[0].carry["history"])


@functools.cache
def alone(guidance: float, posed: bool = False) -> Made:
    return make_clips("", {"guidance": guidance}, posed=posed)


def difference(x: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, in parts of that of what is wanted."""
    return float((x - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def check_same(results: list[Made], wanted: Made) -> None:
    """That every process made what one alone makes, and all the same to the last bit: they go on from it."""
    assert min(clip.std() for clip in wanted.frames) > 0.05
    for made in results:
        for latents, others, first in zip(made.latents, wanted.latents, results[0].latents, strict=True):
            torch.testing.assert_close(latents, others, rtol=1e-5, atol=1e-5)
            assert torch.equal(latents, first)
        for frames, others, first in zip(made.frames, wanted.frames, results[0].frames, strict=True):
            assert difference(frames, others) < 1e-5
            assert torch.equal(frames, first)
        torch.testing.assert_close(made.history, wanted.history, rtol=1e-5, atol=1e-5)


CASES = {
    "both predictions": (2, "guidance=2", 4.5),
    "ulysses": (2, "ulysses=2,vae=one", 4.5),
    "ring, no guidance": (2, "ring=2", 1.0),
    "ulysses and ring": (4, "ulysses=2,ring=2", 4.5),
    "guidance and ulysses": (4, "guidance=2,ulysses=2", 4.5),
    "ring of three": (3, "ring=3", 4.5),
}


@pytest.mark.parametrize("name", CASES)
def test_any_layout_makes_the_clips_of_one_process(processes: Any, name: str) -> None:
    size, words, guidance = CASES[name]
    check_same(processes(size, make_clips, words, {"guidance": guidance}, timeout=PATIENCE), alone(guidance))


def test_a_pose_video_is_read_once_and_split_like_the_rest(processes: Any) -> None:
    wanted = alone(4.5, posed=True)
    assert difference(wanted.latents[0], alone(4.5).latents[0]) > 1e-3
    check_same(processes(2, make_clips, "", {"guidance": 4.5}, "", True, timeout=PATIENCE), wanted)


@pytest.mark.parametrize(("size", "words"), [(2, "guidance=2"), (2, "ulysses=2")])
def test_weights_that_wait_on_the_host_come_to_every_process(processes: Any, size: int, words: str) -> None:
    check_same(processes(size, make_clips, words, {"guidance": 4.5}, "offload=block", timeout=PATIENCE), alone(4.5))


@pytest.fixture(scope="module")
def puppets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("puppets"))


def draw_puppet(folder: Path, words: str, strengths: tuple[float, float], batched: bool) -> list[np.ndarray]:
    model: Any = load_checkpoint(folder)
    portrait = np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    features = torch.randn(
        model.transformer.config.audio_layers, model.transformer.config.audio_dim, 14,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    text, audio = strengths
    options = PuppetOptions(text_guidance=text, audio_guidance=audio, seed=4, sequential=not batched)
    predictions = len(PuppetSampling.of(options, model.settings).branches)
    parallel = share_work(Team.start(), Layout.parse(words), predictions, model)
    return list(PuppetPipeline(model, parallel).generate(portrait, features, "a red fox", options))


@pytest.mark.parametrize(
    ("size", "words", "strengths", "batched"),
    [
        (3, "", (1.5, 2.0), True),  # three predictions, one each
        (2, "guidance=2", (1.5, 2.0), False),  # one and two
        (2, "ulysses=2,vae=one", (1.0, 1.0), True),
        (4, "guidance=2,ring=2", (1.0, 3.0), True),
    ],
)
def test_drawn_characters_too(
    processes: Any, puppets: Path, size: int, words: str, strengths: tuple[float, float], batched: bool
) -> None:
    wanted = np.concatenate(draw_puppet(puppets, "", strengths, batched)).astype(int)
    assert wanted.shape == (14, 32, 32, 3)
    assert wanted.std() > 10
    for made in processes(size, draw_puppet, puppets, words, strengths, batched, timeout=PATIENCE):
        assert np.abs(np.concatenate(made) - wanted).max() <= 1  # rounded to 8 bits
        assert (np.concatenate(made) != wanted).mean() < 1e-3


def test_the_layout_follows_the_number_of_processes() -> None:
    def chosen(world: int, branches: int, heads: int = 40, words: str = "") -> str:
        return str(Layout.parse(words).resolved(world, branches, heads))

    assert chosen(1, 2) == "guidance=1,ulysses=1,ring=1,vae=split"
    assert chosen(2, 2) == "guidance=2,ulysses=1,ring=1,vae=split"
    assert chosen(8, 2) == "guidance=2,ulysses=4,ring=1,vae=split"
    assert chosen(16, 2) == "guidance=2,ulysses=8,ring=1,vae=split"
    assert chosen(8, 1) == "guidance=1,ulysses=8,ring=1,vae=split"
    assert chosen(8, 2, heads=12) == "guidance=2,ulysses=4,ring=1,vae=split"
    assert chosen(8, 1, heads=12) == "guidance=1,ulysses=4,ring=2,vae=split"
    assert chosen(7, 2) == "guidance=1,ulysses=1,ring=7,vae=split"
    assert chosen(6, 3, heads=2) == "guidance=3,ulysses=2,ring=1,vae=split"
    assert chosen(4, 2, words="vae=one") == "guidance=2,ulysses=2,ring=1,vae=one"
    assert chosen(4, 2, words="ring=2, ulysses=2") == "guidance=1,ulysses=2,ring=2,vae=split"


@pytest.mark.parametrize(
    ("words", "world", "sentence"),
    [
        ("ulysses=4", 8, "guidance=1, ulysses=4 and ring=1 are for 4 processes, got 8."),
        ("ulysses=4", 1, "for 4 processes, got 1; start with `torchrun --nproc-per-node 4 -m talkingdit generate ...`"),
        ("ulysses=3", 3, "ulysses must divide the 40 heads of this model, got 3"),
        ("guidance=4", 4, "guidance must be at most the number of predictions per step, 2, got 4"),
        ("ring=two", 2, "ring must be an integer of at least 1, got 'two'"),
        ("vae=half", 2, "vae must be one of split, one, got 'half'"),
        ("tensor=2", 2, "the words are guidance, ulysses, ring and vae, got 'tensor'"),
    ],
)
def test_impossible_layouts(words: str, world: int, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        Layout.parse(words).resolved(world, 2, 40)
    assert sentence in str(error.value)


def refused_layout() -> tuple[str, int]:
    team, model, warnings = Team.start(), make_s2v(), []
    model.vae.decoder.norm_out = torch.nn.GroupNorm(1, 4)
    chosen = share_work(team, Layout(), 2, model, warnings.append).layout
    assert (len(warnings) == 1) == (team.rank == 0)
    assert not warnings or "norm_out of type GroupNorm; the first process decodes for all." in warnings[0]
    with pytest.raises(UserError if team.rank == 0 else OtherRankError, match=r"use vae=one|another process"):
        share_work(team, Layout.parse("guidance=2,vae=split"), 2, model, warnings.append)
    return chosen.vae or "", len(warnings)


def test_an_autoencoder_that_cannot_be_split_is_decoded_by_one(processes: Any) -> None:
    assert processes(2, refused_layout, timeout=PATIENCE) == [("one", 1), ("one", 0)]


def caught(work: Callable[[], Any]) -> str:
    try:
        return repr(work())
    except OtherRankError as error:
        return f"elsewhere {error.status}"
    except BaseException as error:
        return f"{type(error).__name__} {error}"


def stop_together() -> list[str]:
    team = Team.start()

    def fail(error: BaseException, *ranks: int) -> int:
        if team.rank in ranks:
            raise error
        return team.rank

    said = [
        caught(lambda: team.on_rank_0(lambda: 7)),
        caught(lambda: team.on_rank_0(lambda: fail(UserError("no such file"), 0))),
        caught(lambda: team.on_all_ranks(lambda: fail(UserError("nothing"), -1))),
        caught(lambda: team.on_all_ranks(lambda: fail(OSError("broken"), 1, 2))),
        caught(lambda: team.broadcast(lambda: torch.arange(3), "cpu").tolist()),
        caught(lambda: team.broadcast(lambda: torch.arange(fail(UserError("none"), 0)), "cpu")),
        caught(team.raise_if_interrupted),
    ]
    if team.rank == 2:
        signal.signal(signal.SIGINT, team._interrupt)
        signal.raise_signal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    said.append(caught(team.raise_if_interrupted))
    team.end()
    return said


def test_all_processes_stop_for_what_happens_in_one(processes: Any) -> None:
    for rank, said in enumerate(processes(3, stop_together, timeout=PATIENCE)):
        assert said == [
            "7",
            "elsewhere 2" if rank else "UserError no such file",
            str(rank),
            "OSError broken" if rank == 1 else "elsewhere 1",  # one tells
            "[0, 1, 2]",
            "elsewhere 2" if rank else "UserError none",
            "None",
            "elsewhere 130" if rank else "KeyboardInterrupt ",
        ]


def test_one_process_needs_no_group() -> None:
    assert Team.start() is ALONE
    assert not torch.distributed.is_initialized()
    with pytest.raises(UserError, match="alone"):
        ALONE.on_rank_0(lambda: (_ for _ in ()).throw(UserError("alone")))
    assert Parallel().own([1, 2]) == [1, 2]
    ALONE.raise_if_interrupted()
    ALONE.end()
