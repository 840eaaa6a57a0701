# SPDX-License-Identifier: Apache-2.0
"""Audio cross attention with absorbed projections against attention written out per frame in float64."""

import peft
import pytest
import torch

from talkingdit.nn.audio_cross_attention import AudioCrossAttention

B, F, S, A, HEADS, DIM = 2, 3, 7, 5, 4, 32


def build(qk_norm):
    torch.manual_seed(0)
    module = AudioCrossAttention(DIM, HEADS, qk_norm=qk_norm).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return module


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in ((B, F * S, DIM), (B, F, A, DIM)))


def written_out(module, x, tokens):
    """Frame by frame and head by head."""

    def normed(y, norm):
        return y if isinstance(norm, torch.nn.Identity) else y / (y.square().mean(-1, True) + 1e-6).sqrt() * norm.weight

    q = normed(x @ module.q.weight.T + module.q.bias, module.norm_q)
    k = normed(tokens @ module.k.weight.T + module.k.bias, module.norm_k)
    v = tokens @ module.v.weight.T + module.v.bias
    out = torch.zeros_like(x)
    size = DIM // HEADS
    for f in range(F):
        rows = slice(f * S, (f + 1) * S)
        for h in range(HEADS):
            c = slice(h * size, (h + 1) * size)
            weights = (q[:, rows, c] @ k[:, f, :, c].transpose(1, 2) / size**0.5).softmax(-1)
            out[:, rows, c] = weights @ v[:, f, :, c]
    return out @ module.o.weight.T + module.o.bias


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("qk_norm", "absorb"), [(q, a) for q in (True, False) for a in ("none", "value")] + [(False, "full")]
)
def test_absorption_is_exact(qk_norm, absorb):
    module = build(qk_norm)
    x, tokens = draw()
    want = written_out(module, x, tokens)
    assert error(module(x, S, tokens, absorb=absorb), want) < 1e-13
    memory = module.memory(tokens, absorb)
    assert memory.v.shape[-1] == (DIM // HEADS if absorb == "none" else DIM)
    assert memory.k.shape[-1] == (DIM if absorb == "full" else DIM // HEADS)
    assert error(module(x, S, memory=memory), want) < 1e-13


@pytest.mark.parametrize("absorb", ["value", "full"])
def test_gradients_of_absorbed_projections_are_those_of_the_plain_ones(absorb):
    module = build(qk_norm=False)
    x, tokens = (t.requires_grad_() for t in draw())
    wanted = [x, tokens, *module.parameters()]
    plain = torch.autograd.grad(module(x, S, tokens).sin().sum(), wanted)
    ours = torch.autograd.grad(module(x, S, tokens, absorb=absorb).sin().sum(), wanted)
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).norm() < 1e-12 * (1 + b.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absorbed_rounding_is_no_worse_than_the_plain_modules(dtype):
    x, tokens = draw()
    module = build(qk_norm=False).to(dtype)
    inputs = (x.to(dtype), S, tokens.to(dtype))
    errors = {}
    for absorb in ("none", "value", "full"):
        with torch.no_grad():
            want = written_out(build(qk_norm=False).to(dtype).double(), inputs[0].double(), inputs[2].double())
            errors[absorb] = error(module(*inputs, absorb=absorb).double(), want)
    assert errors["value"] < 2 * errors["none"]
    assert errors["full"] < 3 * errors["none"]


@pytest.mark.parametrize("absorb", ["value", "full"])
def test_adapters_on_a_folded_projection_are_heard(absorb):
    """The weight of a layer with LoRA does not tell what it computes."""
    module = build(qk_norm=False)
    config = peft.LoraConfig(r=2, target_modules=["q", "o"], init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(config, module).double()
    x, tokens = draw()
    want = adapted(x, S, tokens)
    assert error(want, written_out(build(qk_norm=False), x, tokens)) > 1e-2
    assert error(adapted(x, S, tokens, absorb=absorb), want) < 1e-12


def test_errors_name_the_argument():
    x, tokens = draw()
    with pytest.raises(ValueError, match=r"absorb must be 'none' or 'value' in a module with q-norm, .*got 'full'"):
        build(qk_norm=True)(x, S, tokens, absorb="full")
    with pytest.raises(ValueError, match="absorb must be one of none, value, full, got 'values'"):
        build(qk_norm=True).memory(tokens, "values")
    with pytest.raises(ValueError, match="tokens or memory must be given"):
        build(qk_norm=True)(x, S)
