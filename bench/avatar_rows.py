# SPDX-License-Identifier: Apache-2.0
"""The injections of HunyuanVideo-Avatar (arXiv:2505.20156, figure 3 and table 3) on the drawn world: `bench.ablations`.

character injection  two held-out people who talk with held-out voices: how much the video moves, whether they stay who
                     they are, and how well mouths follow their voices, by the way in which the picture gets in

All rows begin from the drawn people that ship, without what these have learned to do with it: the new channels of (b)
begin at zero, the tokenizer of (c) as the video's, as in the paper, and its projection as new layers do, at random.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from bench import drawn_voices
from bench.ablations import Budget, Claim, Measured, Row, Study
from talkingdit.checkpoints.saving import save_model
from talkingdit.families.hunyuan_avatar.evaluate import motion_row, open_bench
from talkingdit.families.hunyuan_avatar.injection import copy_bias
from talkingdit.families.hunyuan_avatar.load import load
from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel
from talkingdit.models import PEOPLE_NAME, find_checkpoint
from training.config import Config

NAME = "hunyuan_avatar"
PATCHES, PROJECTION = "img_in.proj.weight", ("ref_in.", "before_proj.")
WAYS, SETTINGS = ("reference_tokens", "reference_channels", "reference_projection"), "model.settings."
SECONDS = 15.0  # of a video


def row(name: str, *, tokens: bool = False, channels: bool = False, projection: bool = False) -> Row:
    """A row with some of the ways."""
    ways = dict(zip(WAYS, (tokens, channels, projection), strict=True))
    settings = {SETTINGS + way: taken for way, taken in ways.items()}
    # The rate is low because the model is good already.
    return Row(name, {**settings, "optim.lr": 1e-3, "optim.muon_lr": 1e-3, "optim.warmup_steps": 50})


def prepare(folder: Path, budget: Budget) -> None:
    """Voices, and for every row the weights that it begins from."""
    drawn_voices.fetch(folder, budget)
    for each in STUDY.rows:
        start = start_of(folder, each)
        if not (start / "transformer" / "config.json").is_file():
            save_start(start, {way: each.config[SETTINGS + way] for way in WAYS})


def start_of(folder: Path, chosen: Row) -> Path:
    return folder / f"{NAME}_start_{chosen.name}"


@torch.no_grad()
def save_start(folder: Path, ways: dict[str, bool]) -> None:
    """The model that ships with ways in for the picture that are new."""
    shipped = find_checkpoint(PEOPLE_NAME)
    config = json.loads((shipped / "transformer" / "config.json").read_text())
    model = HunyuanAvatarModel(**{key: value for key, value in config.items() if key[0] != "_"} | ways)
    wanted = model.state_dict()
    kept = {name: value for name, value in load(shipped).state_dict().items() if not name.startswith(PROJECTION)}
    taken = kept[PATCHES]
    kept[PATCHES] = torch.zeros_like(wanted[PATCHES])
    kept[PATCHES][:, : taken.shape[1]] = taken
    model.load_state_dict(wanted | kept)
    if model.ref_in is not None:
        model.ref_in.proj.weight.copy_(taken)
        copy_bias(model.img_in.proj, model.ref_in.proj)
    save_model(model, folder / "transformer")
    shutil.copytree(shipped / "text_encoder", folder / "text_encoder", dirs_exist_ok=True)


def settle(config: Config, chosen: Row, folder: Path, budget: Budget) -> None:
    """Where a training finds its voices, scenes and first weights."""
    config.model.start = start_of(folder, chosen)
    config.data.voices, config.data.cache = folder / "voices", folder / f"{NAME}_scenes"
    config.data.short_videos = budget.clips


def injection(chosen: Row, model: Path, budget: Budget) -> Measured:
    """Motion, identity and sync of two who talk."""
    seconds = 1.0 if budget.quick else SECONDS
    bench = open_bench(
        model,
        argparse.Namespace(
            voices=model.parent.parent / "voices",
            seconds=seconds,
            scenes=budget.cases,
            steps=2 if budget.quick else None,
            seed=budget.seed,
            truth=False,
        ),
    )
    return motion_row(bench)


STUDY = Study(
    name=NAME,
    config="hunyuan_avatar_scenes.toml",
    rows=(
        row("projection", projection=True),
        row("tokens", tokens=True),
        row("channels_and_tokens", channels=True, tokens=True),
        row("projection_and_tokens", projection=True, tokens=True),
    ),
    claims=(
        Claim(
            "character_injection",
            "the picture added to the video tokens keeps people who they are, and they move",
            ("projection", "tokens", "channels_and_tokens", "projection_and_tokens"),
            injection,
            {"identity": True, "sync": True},
        ),
    ),
    prepare=prepare,
    settle=settle,
)
