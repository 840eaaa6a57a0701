# SPDX-License-Identifier: Apache-2.0
"""`generate --step-cache` and `calibrate`: fewer steps computed, and nearly the same video."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from talkingdit.cli.main import main
from talkingdit.families import get
from talkingdit.families.puppet.options import Options
from talkingdit.models import default_checkpoint
from talkingdit.pipelines.step_cache import BlockCache

MODEL = default_checkpoint()
ASSETS = MODEL.parent
STEPS = 8


@pytest.fixture(scope="module")
def pipeline():
    family = get("puppet")
    return family.pipeline.open_pipeline(family.checkpoint.load_checkpoint(MODEL, torch.float32, "cpu"))


def first_clip(pipeline, threshold: float, monkeypatch) -> tuple[torch.Tensor, int]:
    """Frames of a clip, and how often all blocks ran."""
    from talkingdit.families.puppet.outline import Sampling

    ran = 0
    keep = type(pipeline.checkpoint.transformer)._through_blocks

    def counted(self, *arguments):
        nonlocal ran
        ran += 1
        return keep(self, *arguments)

    monkeypatch.setattr(type(pipeline.checkpoint.transformer), "_through_blocks", counted)
    model, size = pipeline.checkpoint.transformer.config, pipeline.settings.size
    portrait = (torch.rand(size, size, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    features = torch.randn(
        model.audio_layers, model.audio_dim, pipeline.clip_frames, generator=torch.Generator().manual_seed(1)
    )
    sampling = Sampling.of(Options(steps=STEPS, step_cache=threshold), pipeline.settings)
    clip = pipeline.clip(pipeline.conditions(portrait, features, "", sampling), 0, None, last=True)
    return clip.frames, ran


def test_fewer_steps_and_nearly_the_same_video(pipeline, monkeypatch) -> None:
    whole, all_steps = first_clip(pipeline, 0.0, monkeypatch)
    cached, fewer = first_clip(pipeline, 0.5, monkeypatch)
    assert all_steps == STEPS
    assert 2 <= fewer < STEPS
    error = (cached - whole).square().mean().sqrt()
    assert 0 < error < 0.5 * whole.std()
    careful, more = first_clip(pipeline, 1e-6, monkeypatch)
    assert more == STEPS
    assert torch.allclose(careful, whole, atol=1e-5)


def test_what_was_kept_is_what_the_blocks_added(pipeline) -> None:
    """A step that is skipped gives exactly what the blocks gave, where the latents and the timestep are the same."""
    from talkingdit.families.wan_s2v.conditions import WanInputs

    model = pipeline.checkpoint.transformer
    draw = torch.Generator().manual_seed(2)
    latents = torch.randn(1, model.config.in_dim, 2, 8, 8, generator=draw)
    reference = torch.randn(1, model.config.in_dim, 1, 8, 8, generator=draw)
    inputs = WanInputs(torch.randn(1, 3, model.config.text_dim, generator=draw), reference=reference, size=(2, 8, 8))
    with torch.no_grad():
        conditions, cache = model.encode_conditions(inputs), BlockCache()
        plain = model(latents, torch.tensor([500.0]), conditions)
        computed = model(latents, torch.tensor([500.0]), conditions, cache=cache)
        cache.compute = False
        skipped = model(latents, torch.tensor([500.0]), conditions, cache=cache)
    assert torch.equal(plain, computed)
    torch.testing.assert_close(skipped, plain, rtol=1e-5, atol=1e-5)


def test_calibrate_writes_coefficients_that_generate_reads(tmp_path: Path, capsys) -> None:
    target = tmp_path / "step_cache.json"
    common = ["--image", str(ASSETS / "portrait.png"), "--audio", str(ASSETS / "voice.flac"), "--steps", "5"]
    assert main(["calibrate", *common, "--device", "toaster", "-o", str(target)]) == 2
    assert "calibrate: the device 'toaster' cannot be used" in capsys.readouterr().err
    assert main(["calibrate", *common, "--measured-clips", "1", "-o", str(target)]) == 0
    written = json.loads(target.read_text())
    assert len(written["coefficients"]) == 4  # of four changes
    assert written["pairs"] % 4 == 0
    assert "coefficients of" in capsys.readouterr().out

    from talkingdit.pipelines.step_cache import read_fitted

    found = read_fitted(tmp_path)
    assert found is not None
    assert list(found.coefficients) == written["coefficients"]
    target.write_text("{}")
    with pytest.raises(Exception, match="expected coefficients of a step cache"):
        read_fitted(tmp_path)


@pytest.mark.parametrize("value", ["-1", "nan"])
def test_a_threshold_that_is_none(value: str, tmp_path: Path, capsys) -> None:
    common = ["--image", str(ASSETS / "portrait.png"), "--audio", str(ASSETS / "voice.flac")]
    assert main(["generate", *common, "-o", str(tmp_path / "x.mp4"), f"--step-cache={value}"]) == 2
    assert "--step-cache must be a number of at least 0" in capsys.readouterr().err
