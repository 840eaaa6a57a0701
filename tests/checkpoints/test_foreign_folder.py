# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder may come from anyone: names stay inside, numbers have bounds, what is wrong is one sentence."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoint import make_checkpoint

from talkingdit import families
from talkingdit.checkpoints.bounds import check_bounds
from talkingdit.checkpoints.weights import check_index, open_weights, read_bounded, read_json
from talkingdit.errors import UserError
from talkingdit.models import load_checkpoint

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def make_index(folder: Path, name: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors", "sub/../../secret.safetensors", "/etc/secret.safetensors", "..", "", ".",
        "secret.pth", "a\0.safetensors", "..\\secret.safetensors", 5, None, ["a.safetensors"], {"a": 1},
    ],
)  # fmt: skip
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, name: Any) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    folder = make_index(tmp_path / "model", name)
    for read in (open_weights, check_index):
        with pytest.raises(UserError, match=r"index.json: expected names of \*.safetensors files in this folder, got"):
            read(folder)


def test_links_and_folders_of_its_own_are_its_own(tmp_path: Path) -> None:
    """As download caches have them."""
    save_file({"a": torch.zeros(1)}, tmp_path / "blob")
    for name in ("model.safetensors", "part/model.safetensors"):
        folder = make_index(tmp_path / "model", name)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(tmp_path / "blob")
        check_index(folder)
        assert list(open_weights(folder).entries) == ["a"]


def test_a_count_of_shards_is_not_taken_at_its_word(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-99999999999.safetensors")
    with pytest.raises(UserError, match="counts 99999999999 files, more than any checkpoint has"):
        open_weights(tmp_path)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a": ' + "1" * 5000 + "}", "\xff", "{", "[1]", '"x"'])
def test_json_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config.json: (not a readable JSON file|must hold a JSON object)"):
        read_json(tmp_path / "config.json")


def test_a_file_of_settings_without_end_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 32)  # a hole, no room on the disk
    with pytest.raises(UserError, match="expected at most 64 MB, got 4096 MB"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_layers": 10**9}, "num_layers must be at most 1000, got 1000000000"),
        ({"a": {"num_hidden_layers": 1001}}, "a.num_hidden_layers must be at most 1000, got 1001"),
        ({"fps": 10**9}, "fps must be at most 240, got 1000000000"),
        ({"dim": 10**12}, "dim must be at most 16777216, got 1000000000000"),
        ({"dim": -(10**12)}, "dim must be at least -16777216, got -1000000000000"),
        ({"dim": 10**400}, "dim must be at most 16777216, got one of 401 digits"),
        ({"layers": [0] * 10_001}, "layers must have at most 10000 values, got 10001"),
        ({"dim_mult": [1, [10**9]]}, "dim_mult must be at most 16777216, got 1000000000"),
    ],
)
def test_no_setting_is_larger_than_that_of_any_model(tmp_path: Path, values: Any, said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=re.escape(f"config.json: {said}.")):
        read_bounded(tmp_path / "config.json")


def test_settings_of_released_models_are_within_bounds() -> None:
    check_bounds({"vocab_size": 256384, "num_layers": 40, "dim": 5120, "ffn_dim": 13824, "text_len": 512}, "")
    check_bounds({"fps": 16, "infer_frames": 80, "max_area": 1024 * 704, "eps": 1e-6, "x": None, "y": True}, "")


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("transformer/config.json", "num_layers", 10**9),
        ("vae/config.json", "base_dim", 10**9),
        ("text_encoder/config.json", "text_dim", 10**10),
        ("pipeline.json", "fps", 10**9),
        ("pipeline.json", "size", 10**6),
        ("pipeline.json", "clip_latents", 10**9),
    ],
)
def test_a_checkpoint_of_impossible_size_is_refused_at_once(tmp_path: Path, file: str, name: str, value: int) -> None:
    folder = make_checkpoint(tmp_path)
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | {name: value}))
    with pytest.raises(UserError, match=rf"{name} must be at most \d+, got {value}"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["transformer/config.json", "model_index.json", "weights.safetensors", "notes.txt"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_folder_in_which_something_never_ends_is_not_looked_into(
    make: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    """Every command asks families whose a folder is, and these read settings: a pipe made them wait for ever."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    make(tmp_path / name)
    with pytest.raises(UserError, match=r"expected a file, got a pipe or a device; remove it from the checkpoint\."):
        families.of_folder(tmp_path)


@pytest.mark.parametrize("what", ["large", "deep"])
def test_settings_beyond_measure_are_not_read_to_see_whose_a_folder_is(what: str, tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        if what == "large":
            file.truncate(5 << 30)
        else:
            file.write(b"[" * 200_000)
    with pytest.raises(UserError, match=r"config\.json: (expected at most 64 MB, got 5120|not a readable JSON)"):
        families.of_folder(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf", ".pth"])
def test_weights_that_never_end_are_not_opened(suffix: str, tmp_path: Path) -> None:
    for number, make in enumerate((os.mkfifo, lambda path: path.symlink_to("/dev/zero"))):
        make(tmp_path / f"{number}{suffix}")
        with pytest.raises(UserError, match="expected a file of weights, got a pipe or a device"):
            open_weights(tmp_path / f"{number}{suffix}")


def test_what_is_no_file_of_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "face.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"expected a file of weights \(\.safetensors, .*\), got one of another name"):
        open_weights(tmp_path / "face.png")
