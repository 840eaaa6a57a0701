# SPDX-License-Identifier: Apache-2.0
"""accelerate() on HunyuanVideo: diffusers' transformers, and the audio adapters of the released avatar model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_accelerate_diffusers import Ops, attributes, check_gradients, difference, gradients, run
from tiny_diffusers import randomise
from torch import Tensor, nn

import talkingdit
from talkingdit.nn.accelerate import diffusers_hunyuan
from talkingdit.nn.accelerate.diffusers_hunyuan import HunyuanVideoProcessor


def make(kind: str | None = None) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return randomise(
        HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, mlp_ratio=2.0, patch_size=2, patch_size_t=1, text_embed_dim=12,
            pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), guidance_embeds=False, image_condition_type=kind,
        )
    )  # fmt: skip


def inputs(batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    mask = torch.arange(6)[None] < torch.tensor([4, 6])[:batch, None]
    return {
        "hidden_states": draw(4, 3, 6, 8),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": draw(6, 12),
        "encoder_attention_mask": mask,
        "pooled_projections": draw(8),
        "return_dict": False,
    }


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers_hunyuan, "SMALL", 0)


@pytest.mark.usefixtures("nothing_is_small")
@pytest.mark.parametrize("kind", [None, "token_replace"])
def test_same_output_and_gradients_and_restored_to_the_last_bit(kind: str | None) -> None:
    model, given = make(kind), inputs()
    expected, keys, state = run(model, given), list(model.state_dict()), attributes(model)
    want = gradients(model, given)
    report = talkingdit.accelerate(model)
    assert sorted(report.replaced.values()) == [2, 2, 4, 4]
    assert not report.left
    assert list(model.state_dict()) == keys
    with Ops() as ops:
        actual = run(model, given)
    assert ops.calls["qk_norm_rope3d"] == 2 * 4
    assert ops.calls["gate_residual"] == 2 * 2 + 2
    assert difference(actual, expected) < 1e-5
    check_gradients(gradients(model, given), want)
    assert talkingdit.accelerate(model).already == 8

    talkingdit.restore(model)
    assert torch.equal(run(model, given), expected)
    assert attributes(model).keys() == state.keys()
    assert not any(isinstance(getattr(m, "processor", None), HunyuanVideoProcessor) for m in model.modules())


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(("lengths", "masked"), [((6,), 0), ((4,), 0), ((4, 4), 0), ((4, 6), 4), ((6, 6), 0)])
def test_padding_of_the_text_is_left_out_where_all_samples_have_as_much(
    lengths: tuple[int, ...], masked: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers_hunyuan, "SMALL", 1 << 16 if small else 0)
    model, given = make(), inputs(len(lengths))
    given["encoder_attention_mask"] = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    expected = run(model, given)
    talkingdit.accelerate(model)
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention

    def count(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs.get("attn_mask") is not None)
        return attention(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
        assert difference(run(model, given), expected) < 1e-5
    if not small:
        assert sum(calls) == masked + 1  # one more of the text's own refiner


@pytest.mark.usefixtures("nothing_is_small")
def test_in_inference_mode_and_with_a_mask_that_changes() -> None:
    model, given = make(), inputs(1)
    want = {}
    for length in (4, 6):
        given["encoder_attention_mask"] = torch.arange(6)[None] < length
        want[length] = run(model, given)
    talkingdit.accelerate(model)
    mask = torch.arange(6)[None] < 4
    given["encoder_attention_mask"] = mask
    assert difference(run(model, given), want[4]) < 1e-5
    mask.fill_(True)
    assert difference(run(model, given), want[6]) < 1e-5
    with torch.inference_mode():
        given["encoder_attention_mask"] = torch.arange(6)[None] < 4
        assert difference(model(**given)[0].clone(), want[4]) < 1e-5
    seen = torch.arange(10).view(1, 1, 1, 10) < 7
    assert diffusers_hunyuan._keys_of(seen) == 7
    seen[..., 7:] = True
    assert diffusers_hunyuan._keys_of(seen) == 10
    seen[..., 0] = False
    assert diffusers_hunyuan._keys_of(seen) is None


def test_blocks_of_very_small_streams_run_as_they_are() -> None:
    model, given = make(), inputs()
    expected = run(model, given)
    talkingdit.accelerate(model)
    with Ops() as ops:
        assert difference(run(model, given), expected) < 1e-5
    assert not ops.calls


@pytest.mark.usefixtures("nothing_is_small")
def test_what_is_another_is_left_alone_and_told() -> None:
    model, given = make(), inputs()

    class Own:
        def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
            return plain(attn, *args, **kwargs)

    block: Any = model.transformer_blocks[0]
    plain = block.attn.processor
    block.attn.set_processor(Own())
    hook = model.transformer_blocks[1].norm2.register_forward_hook(lambda *_: None)
    expected = run(model, given)
    report = talkingdit.accelerate(model)
    assert "it has a processor of its own, Own" in str(report)
    assert "its norms are of another kind or have hooks" in str(report)
    assert difference(run(model, given), expected) < 1e-5
    hook.remove()


class Adapter(nn.Module):
    """Written from the description of the released adapter: one head of all channels, softmax over a frame's tokens."""

    def __init__(self, dim: int, dim_head: int, inner: int):
        super().__init__()
        self.dim_head = dim_head
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        k, v = self.to_kv(self.norm1(x)).chunk(2, dim=-1)
        q = self.to_q(self.norm2(latents))
        scale = self.dim_head**-0.25
        weight = ((q * scale) @ (k * scale).transpose(-2, -1)).softmax(-1)
        return self.to_out(weight @ v)


def test_the_released_audio_adapter() -> None:
    model = nn.ModuleDict({"a": Adapter(24, 16, 16), "b": Adapter(24, 8, 16)})
    audio, video = torch.randn(2, 3, 16, 24), torch.randn(2, 3, 10, 24)
    want = [adapter(audio, video) for adapter in model.values()]
    report = talkingdit.accelerate(model)
    assert report.replaced["audio adapter: attention to the voice of each frame"] == 1
    assert report.left["audio adapter: attention to the voice of each frame", "it has several heads"] == 1
    with Ops() as ops:
        got = [adapter(audio, video) for adapter in model.values()]
    assert ops.calls["audio_attention"] == 1
    for a, b in zip(got, want, strict=True):
        assert difference(a, b) < 1e-5
    talkingdit.restore(model)
    assert torch.equal(model["a"](audio, video), want[0])
