# SPDX-License-Identifier: Apache-2.0
"""One transformer in every kind of file: the same weights come out, and what does not fit is said."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from official import STEM, official_config, random_transformer, write_transformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from talkingdit.checkpoints.names import to_diffusers, to_native
from talkingdit.checkpoints.weights import TensorEntry, Weights
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.config import ARGUMENTS, complete
from talkingdit.families.wan_s2v.load import read_config
from talkingdit.families.wan_s2v.save import save_official
from talkingdit.models import WanS2VModel, load, preset

GOLDEN = Path(__file__).parents[2] / "golden" / "wan_s2v.safetensors"
SIZE: dict[str, Any] = {
    **{"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 3, "freq_dim": 16},
    **{"text_dim": 24, "text_len": 10, "audio_dim": 8, "audio_layers": 25, "audio_inject_layers": (0, 2)},
}
UNTOLD = {"num_heads": 2, "audio_inject_layers": [0, 2], "text_len": 10}  # what shapes do not tell
INDEX = f"{STEM}.safetensors.index.json"


@pytest.fixture(scope="module")
def model() -> WanS2VModel:
    torch.manual_seed(0)
    return random_transformer(**SIZE)


@pytest.fixture(scope="module")
def state(model: WanS2VModel) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def released(model: WanS2VModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    write_transformer(folder, model, torch.bfloat16, shards=3)
    return folder


@pytest.fixture
def folder(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(found: WanS2VModel, state: dict[str, Tensor], exact: bool = False) -> None:
    """Are these the weights, after bfloat16 unless exact?"""
    names = found.state_dict()
    assert set(names) == set(state)
    for name, value in state.items():
        wanted = value if exact else value.bfloat16().float()
        torch.testing.assert_close(names[name].float(), wanted.float(), rtol=0, atol=0, msg=name)


def refuse(source: Path, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)


def test_every_argument_of_the_model_may_be_said_by_a_configuration() -> None:
    assert set(inspect.signature(WanS2VModel.__init__).parameters) - {"self"} == ARGUMENTS


def test_the_released_layout(released: Path, model: WanS2VModel, state: dict[str, Tensor]) -> None:
    found = load(released)
    same(found, state)
    wanted = {k: v for k, v in model.config.items() if k[0] != "_"}
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in found.config.items() if k[0] != "_"} == wanted
    assert {k: v for k, v in read_config(released).items() if k in SIZE} == SIZE
    assert not found.training
    assert all(p.requires_grad for p in found.parameters())


def test_half_precision_keeps_time_and_modulation_in_float32(released: Path, state: dict[str, Tensor]) -> None:
    found = load(released, torch.bfloat16)
    same(found, state)
    for name, value in found.named_parameters():
        exact = any(part in name.split(".") for part in ("time_embedding", "time_projection", "modulation"))
        assert value.dtype == (torch.float32 if exact else torch.bfloat16), name


def test_weights_do_not_change_with_the_file(folder: Path, state: dict[str, Tensor]) -> None:
    found = load(folder, torch.bfloat16)
    for file in folder.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1000:] = bytes(1000)
        with file.open("r+b") as opened:
            opened.write(data)
    same(found, state)


def test_files_of_diffusers_with_native_names_lie_in_a_folder(released: Path, state: Any, tmp_path: Path) -> None:
    shutil.copytree(released, tmp_path / "transformer")
    same(load(tmp_path), state)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_single_file(state: dict[str, Tensor], tmp_path: Path, prefix: str) -> None:
    file = tmp_path / "s2v.safetensors"
    save_file({prefix + name: value for name, value in state.items()}, file)
    same(load(file, config=UNTOLD), state, exact=True)
    same(load(tmp_path, config=UNTOLD), state, exact=True)
    refuse(file, "num_heads must be said for a model 32 wide")
    refuse(file, "audio_inject_layers must be said for 2 of 3 blocks", config={"num_heads": 2})
    save_file({prefix + name: value for name, value in state.items()}, file, metadata={"config": json.dumps(UNTOLD)})
    assert load(file).config.text_len == 10


def test_shapes_alone_tell_the_released_configuration() -> None:
    with safe_open(GOLDEN, "pt") as file:
        names = json.loads(file.metadata()["spec"])["full_keys"]
    assert len(names) == 1260
    path = Path("wan2.2_s2v_14B_bf16.safetensors")
    weights = Weights(
        path, {name: TensorEntry(path, name, tuple(shape), torch.bfloat16) for name, shape in names.items()}
    )
    assert complete({}, weights, path) == preset("wan_s2v_14b")


def test_a_configuration_is_read_without_weights() -> None:
    assert read_config("puppet_tiny", {"num_layers": 7}) == preset("puppet_tiny", num_layers=7)
    with pytest.raises(UserError, match="nothing: neither a folder nor a preset"):
        read_config("nothing")


def test_every_name_goes_to_diffusers_and_back() -> None:
    with safe_open(GOLDEN, "pt") as file:
        names = list(json.loads(file.metadata()["spec"])["full_keys"])
    renamed = [to_diffusers(name) for name in names]
    assert len(set(renamed)) == 1260
    assert [to_native(name) for name in renamed] == names
    for native, other in {
        "blocks.7.self_attn.o.bias": "blocks.7.attn1.to_out.0.bias",
        "blocks.39.cross_attn.norm_k.weight": "blocks.39.attn2.norm_k.weight",
        "blocks.0.norm3.weight": "blocks.0.norm2.weight",
        "blocks.0.ffn.0.weight": "blocks.0.ffn.net.0.proj.weight",
        "blocks.0.modulation": "blocks.0.scale_shift_table",
        "head.modulation": "scale_shift_table",
        "head.head.bias": "proj_out.bias",
        "time_projection.1.bias": "condition_embedder.time_proj.bias",
        "text_embedding.2.weight": "condition_embedder.text_embedder.linear_2.weight",
        "cond_encoder.weight": "condition_embedder.pose_embedder.weight",
        "trainable_cond_mask.weight": "trainable_condition_mask.weight",
        "casual_audio_encoder.weights": "condition_embedder.causal_audio_encoder.weighted_avg.weights",
        "casual_audio_encoder.encoder.conv1_local.conv.weight": (
            "condition_embedder.causal_audio_encoder.encoder.conv1_local.conv.weight"
        ),
        "casual_audio_encoder.encoder.conv3.conv.weight": (
            "condition_embedder.causal_audio_encoder.encoder.conv3.conv.conv.weight"
        ),
        "audio_injector.injector.11.o.weight": "audio_injector.injector.11.to_out.0.weight",
        "audio_injector.injector_adain_layers.0.linear.bias": "audio_injector.injector_adain_layers.0.linear.bias",
        "patch_embedding.weight": "patch_embedding.weight",
        "frame_packer.proj_4x.weight": "frame_packer.proj_4x.weight",
    }.items():
        assert to_diffusers(native) == other
    assert to_native("motion_in.patch_embedding.bias") == "patch_embedding.bias"


def test_the_renamed_weights_of_diffusers(state: dict[str, Tensor], tmp_path: Path) -> None:
    config = {
        **{"_class_name": "WanS2VTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 16},
        **{"in_channels": 16, "out_channels": 16, "pose_dim": 16, "num_weighted_avg_layers": 25, "ffn_dim": 48},
        **{"patch_size": [1, 2, 2], "num_layers": 3, "text_dim": 24, "freq_dim": 16, "audio_dim": 8, "eps": 1e-6},
        **{"audio_inject_layers": [0, 2], "qk_norm": "rms_norm_across_heads", "cross_attn_norm": True},
        **{"rope_max_seq_len": 1024, "added_kv_proj_dim": None, "enable_adain": True, "zero_timestep": True},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({to_diffusers(name): value for name, value in state.items()}, tmp_path / f"{STEM}.safetensors")
    same(load(tmp_path), state, exact=True)


@pytest.mark.parametrize("newer", [False, True])
def test_scaled_float8_weights_read_as_what_they_stand_for(
    state: dict[str, Tensor], tmp_path: Path, newer: bool
) -> None:
    stored: dict[str, Tensor] = {} if newer else {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    wanted = {}
    for name, value in state.items():
        wanted[name] = value
        stored[name] = value
        if name.startswith("blocks.") and name.endswith(("q.weight", "ffn.0.weight")):
            scale = value.abs().max() / 448
            stored[name] = (value / scale).to(torch.float8_e4m3fn)
            wanted[name] = stored[name].float() * scale
            module = name.removesuffix(".weight")
            stored[f"{module}.{'weight_scale' if newer else 'scale_weight'}"] = scale.reshape(() if newer else 1)
            stored[f"{module}.{'input_scale' if newer else 'scale_input'}"] = torch.ones(())
            if newer:
                note = json.dumps({"format": "float8_e4m3fn"}).encode()
                stored[f"{module}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    file = tmp_path / "s2v_fp8_scaled.safetensors"
    save_file({"model.diffusion_model." + name: value for name, value in stored.items()}, file)
    same(load(file, config=UNTOLD), wanted, exact=True)


def test_other_quantisations_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "s2v.safetensors"
    save_file(state | {"blocks.0.ffn.0.weight_scale_2": torch.ones(())}, file)
    refuse(file, r"4-bit weights \(blocks\.0\.ffn\.0\.weight_scale_2\) are not supported")
    note = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
    save_file(state | {"blocks.0.ffn.0.comfy_quant": note}, file)
    refuse(file, r"comfy_quant says 'mxfp8', only scaled float8 is supported")
    save_file(state | {"blocks.9.ffn.0.scale_weight": torch.ones(())}, file)
    refuse(file, r"has blocks\.9\.ffn\.0\.scale_weight but no blocks\.9\.ffn\.0\.weight")
    save_file(state | {"blocks.0.ffn.0.scale_weight": torch.ones(5)}, file)
    refuse(file, r"scale_weight must be one number or one per row of blocks\.0\.ffn\.0\.weight, got \[5\]")


def test_a_shard_that_is_missing_or_cut_off_is_named(folder: Path) -> None:
    shard = folder / f"{STEM}-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    refuse(folder, rf"{shard.name}: damaged or cut off .*; copy or download this file again")
    shard.unlink()
    refuse(folder, rf"model: {shard.name} is missing of the 3 files that {INDEX} lists")
    (folder / INDEX).unlink()
    refuse(folder, rf"model: {shard.name} is missing")
    shard.write_bytes(whole)
    load(folder)


def test_an_index_that_does_not_fit_its_shards(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map=index | {"blocks.5.norm3.bias": f"{STEM}-00001-of-00003.safetensors"})
    refuse(folder, rf"00001-of-00003\.safetensors: lacks blocks\.5\.norm3\.bias, which {INDEX} places there")
    edit(folder / INDEX, weight_map={})
    refuse(folder, f"{INDEX}: must have a weight_map")


def test_all_that_is_wrong_with_weights_is_one_sentence(folder: Path) -> None:
    (folder / INDEX).unlink()
    shard = folder / f"{STEM}-00003-of-00003.safetensors"
    weights = load_file(shard)
    for name in ("head.head.bias", "patch_embedding.bias", "time_projection.1.bias", "text_embedding.0.bias"):
        del weights[name]
    weights["head.head.weight"] = torch.zeros(64, 16)
    save_file(weights | {"motioner.a": torch.zeros(1), "motioner.b": torch.zeros(1)}, shard)
    refuse(
        folder,
        r"model: does not fit WanS2VModel; it lacks 4 of \d+ weights: .*, .*, .* and 1 more; it has 2 that are not "
        r"part of it: motioner\.a, motioner\.b; it has 1 of another shape: "
        r"head\.head\.weight \[64, 16\] instead of \[64, 32\]\.$",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_motioner", True),
        ("model_type", "t2v"),
        ("window_size", [16, 16]),
        ("qk_norm", False),
        ("cross_attn_norm", False),
    ],
)
def test_variants_that_would_change_the_result_are_refused(folder: Path, name: str, value: Any) -> None:
    edit(folder / "config.json", **{name: value})
    refuse(folder, rf"model: {name} .* is a variant of Wan-S2V that is not supported")


def test_settings_without_effect_are_accepted_and_strange_ones_said(folder: Path) -> None:
    edit(
        folder / "config.json",
        **{"trainable_token": False, "motion_token_num": 256, "patch_size": [1, 2, 2], "window_size": [-1, -1]},
        **{"qk_norm": True, "cross_attn_norm": True, "text_dim": 24, "motion_frames": 73, "enable_tsm": True},
    )
    assert tuple(load(folder).config.motion_frames) == (73, 19)
    edit(folder / "config.json", telepathy=True)
    with pytest.warns(UserWarning, match="settings without a meaning here: telepathy"):
        load(folder)
    values = json.loads((folder / "config.json").read_text())
    del values["telepathy"]
    (folder / "config.json").write_text(json.dumps(values | {"num_heads": 3}))
    refuse(folder, r"model: its configuration does not make a model \(WanS2VModel: dim must be a multiple")


def test_a_video_model_is_not_taken_for_one(state: dict[str, Tensor], tmp_path: Path) -> None:
    video = {k: v for k, v in state.items() if k.startswith(("blocks.", "head.", "patch_", "time_", "text_"))}
    save_file(video, tmp_path / "t2v.safetensors")
    refuse(tmp_path / "t2v.safetensors", r"the weights of a Wan video model without audio; .* \(init_from\)")
    save_file({"a": torch.zeros(1)}, tmp_path / "t2v.safetensors")
    refuse(tmp_path / "t2v.safetensors", "no patch_embedding.weight in it; not the weights of a Wan transformer")


@pytest.mark.parametrize("size", ["20KB", "10GB"])
def test_what_is_saved_in_the_official_layout_comes_back(
    model: WanS2VModel, state: dict[str, Tensor], tmp_path: Path, size: str
) -> None:
    (tmp_path / "Wan2.1_VAE.pth").write_text("stays")
    (tmp_path / f"{STEM}-00001-of-00099.safetensors").write_text("of an earlier save")
    save_official(tmp_path, model, max_shard_size=size)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert ("Wan2.1_VAE.pth" in files, f"{STEM}-00001-of-00099.safetensors" in files) == (True, False)
    assert (INDEX in files) == (size == "20KB")
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["_class_name"] == "WanModel_S2V"
    # Nothing in it that the official class would not take.
    assert set(values) <= set(official_config(model)) | {"_class_name", "_diffusers_version"}
    found = load(tmp_path)
    same(found, state, exact=True)
    assert {k: tuple(v) if isinstance(v := found.config[k], list) else v for k in SIZE} == SIZE


def test_what_the_official_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    other = WanS2VModel(**preset("wan_s2v_14b", **SIZE, framepack_padding="replicate"))
    with pytest.raises(UserError, match="no place for framepack_padding 'replicate', only for 'none'"):
        save_official(tmp_path, other)
    assert not any(tmp_path.iterdir())


PEAK = """
import resource, sys
import torch
from talkingdit.models import load
from talkingdit.families.wan_s2v.model import WanS2VModel
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load(sys.argv[1], torch.bfloat16)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024, size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_loading_takes_little_more_host_memory_than_the_model(tmp_path: Path) -> None:
    with torch.device("meta"):
        big = WanS2VModel(**preset("wan_s2v_14b", **SIZE | {"dim": 1024, "ffn_dim": 4096, "text_dim": 1024}))
    big = big.to_empty(device="cpu").to(torch.bfloat16)
    write_transformer(tmp_path, big, torch.bfloat16, shards=8)
    largest = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    del big
    run = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, size = (int(word) for word in run.stdout.split())
    assert size > 0.95 * total > 120e6
    assert peak < size + largest + 40e6, (peak, size, largest)
