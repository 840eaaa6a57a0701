# SPDX-License-Identifier: Apache-2.0
"""Audio cross attention with absorbed projections against attention written out per frame in float64."""

import peft
import pytest
import torch

from talkingdit.nn.audio_cross_attention import AudioCrossAttention, TokenSpan

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


def written_out(module, x, tokens, per_frame=S):
    """Frame by frame and head by head."""

    def normed(y, norm):
        return y if isinstance(norm, torch.nn.Identity) else y / (y.square().mean(-1, True) + 1e-6).sqrt() * norm.weight

    def linear(layer, y):
        return y @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    q, k = normed(linear(module.q, x), module.norm_q), normed(linear(module.k, tokens), module.norm_k)
    v = linear(module.v, tokens)
    size = q.shape[-1] // module.num_heads
    frames = []
    for f in range(tokens.shape[1]):
        rows = slice(f * per_frame, (f + 1) * per_frame)
        heads = []
        for h in range(module.num_heads):
            c = slice(h * size, (h + 1) * size)
            weights = (q[:, rows, c] @ k[:, f, :, c].transpose(1, 2) / size**0.5).softmax(-1)
            heads.append(weights @ v[:, f, :, c])
        frames.append(torch.cat(heads, -1))
    return linear(module.o, torch.cat(frames, 1))


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
    plain, kept = (B, F, A, HEADS, DIM // HEADS), -(-HEADS * A // 8) * 8
    assert memory.v.shape == (plain if absorb == "none" else (B, F, kept, DIM))
    assert memory.k.shape == ((B, F, DIM, kept) if absorb == "full" else plain)
    if absorb != "none":
        assert not memory.v[:, :, HEADS * A :].any()
    assert error(module(x, S, memory=memory), want) < 1e-13


def test_weights_of_heads_that_audio_attention_is_fast_for():
    """They come out of `ops.audio_attention`: values, gradients, shards that cut frames, and bfloat16."""
    torch.manual_seed(0)
    module = AudioCrossAttention(DIM, 3, head_dim=32).double()
    x, tokens = draw()
    x.requires_grad_()
    want = written_out(module, x, tokens)
    found = module(x, S, tokens, absorb="value")
    assert error(found, want) < 1e-13
    parameters = [x, *(p for name, p in module.named_parameters() if not name.startswith("k.bias"))]
    pairs = (torch.autograd.grad(value.sin().sum(), parameters) for value in (found, want))
    for ours, theirs in zip(*pairs, strict=True):
        assert error(ours, theirs) < 1e-11
    memory = module.memory(tokens, "value")
    shards = [module(x[:, a:b], S, memory=memory, token_offset=a) for a, b in ((0, 4), (4, 16), (16, 21))]
    torch.testing.assert_close(torch.cat(shards, 1), found)
    module.bfloat16()
    with torch.no_grad():
        assert error(module(x.bfloat16(), S, tokens.bfloat16(), absorb="value").double(), want) < 2e-2


@pytest.mark.parametrize("absorb", ["value", "full"])
def test_gradients_of_absorbed_projections_are_those_of_the_plain_ones(absorb):
    module = build(qk_norm=False)
    x, tokens = (t.requires_grad_() for t in draw())
    wanted = [x, tokens, *module.parameters()]
    plain = torch.autograd.grad(module(x, S, tokens).sin().sum(), wanted)
    ours = torch.autograd.grad(module(x, S, tokens, absorb=absorb).sin().sum(), wanted)
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).norm() < 1e-12 * (1 + b.norm())


@pytest.mark.parametrize("absorb", ["none", "value", "full"])
def test_result_is_gated_masked_and_added_in_place(absorb):
    module = build(qk_norm=False)
    x, tokens = draw()
    gate, mask, residual = torch.randn(DIM).double(), torch.rand(B, F * S).double(), torch.randn(x.shape).double()
    want = residual + mask[..., None] * gate * written_out(module, x, tokens)
    trained = module(x, S, tokens, absorb=absorb, gate=gate, mask=mask, residual=residual)
    assert trained.requires_grad
    assert error(trained, want) < 1e-13
    memory = module.memory(tokens, absorb)
    stream = torch.cat([residual, residual], dim=1)  # the noisy tokens are the first part of the residual stream
    noisy = stream[:, : F * S]
    with torch.no_grad():
        assert module(x, S, memory=memory, gate=gate, mask=mask, residual=noisy, out=noisy) is noisy
    assert error(stream[:, : F * S], want) < 1e-13
    assert torch.equal(stream[:, F * S :], residual)


@pytest.mark.parametrize("absorb", ["none", "value", "full"])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_residual_stream_keeps_its_dtype(absorb, stream):
    module = build(qk_norm=False).bfloat16()
    x, tokens = draw(torch.bfloat16)
    residual = torch.randn(x.shape).to(stream)
    with torch.no_grad():
        heard = module(x, S, tokens, absorb=absorb)
        out = module(x, S, tokens, absorb=absorb, residual=residual)
    assert out.dtype == stream
    assert error(out.double(), residual.double() + heard) < (1e-6 if stream == torch.float32 else 4e-3)


@pytest.mark.parametrize("absorb", ["none", "value", "full"])
@pytest.mark.parametrize("inside", [(0, 21), (3, 18), (7, 14), (9, 11), (6, 21), (10, 10)], ids=str)
def test_a_shard_of_the_tokens_gets_its_part_and_its_gradients(absorb, inside):
    module = build(absorb != "full")
    x, tokens = draw()
    begin, end = inside
    wanted = [*module.parameters(), tokens.requires_grad_()]
    want = module(x, S, tokens)[:, begin:end]
    part = module(x[:, begin:end], S, tokens, absorb=absorb, token_offset=begin)
    assert part.shape == want.shape
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)).double()
    gradients = [torch.autograd.grad((y * grad).sum(), wanted) for y in (part, want)]
    torch.testing.assert_close(part, want, rtol=1e-11, atol=1e-11)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        memory = module.memory(tokens, absorb)
        stream = x[:, begin:end].clone()
        module(stream, S, memory=memory, residual=stream, out=stream, token_offset=begin)
        torch.testing.assert_close(stream, x[:, begin:end] + want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("absorb", ["none", "value", "full"])
@pytest.mark.parametrize("stream", [torch.float64, torch.float32])
def test_clips_with_frames_of_several_sizes_in_one_call(absorb, stream):
    """The last 5 tokens of a frame of 7, a whole one, then two frames of 3 and a token of a third."""
    module = build(absorb != "full").to(stream)
    x, tokens = (t.to(stream)[:1] for t in draw())
    tokens = torch.cat([tokens, tokens.flip(1)], dim=1)[:, :5]
    x = x[:, :19]
    spans = (TokenSpan(12, 2, 7, 2), TokenSpan(7, 3, 3))
    mask = torch.rand(1, 19, generator=torch.Generator().manual_seed(3)).to(stream)
    want = torch.cat(
        [
            module(x[:, :12], 7, tokens[:, :2], absorb=absorb, token_offset=2),
            module(x[:, 12:], 3, tokens[:, 2:], absorb=absorb),
        ],
        dim=1,
    )
    torch.testing.assert_close(module(x, spans, tokens, absorb=absorb), want)
    residual = x.to(torch.float64 if stream == torch.float64 else torch.bfloat16)
    with torch.no_grad():
        out = residual.clone()
        got = module(x, spans, tokens, absorb=absorb, mask=mask, residual=out, out=out)
        assert got is out
        torch.testing.assert_close(out, (residual + mask[..., None] * want).to(residual.dtype))
        again = module(x, spans, tokens, absorb=absorb, mask=mask, residual=residual)
        torch.testing.assert_close(again, out)


def single_wide_head(tokens, batch=2, frames=3, per_frame=5, dim=24):
    """The audio adapter of HunyuanVideo-Avatar, but for its width: one head of 1024 channels, no norms, no biases."""
    torch.manual_seed(3)
    module = AudioCrossAttention(dim, 1, qk_norm=False, head_dim=1024, bias=False).double()
    x = torch.randn(batch, frames * per_frame, dim, dtype=torch.float64, requires_grad=True)
    audio = torch.randn(batch, frames, tokens, dim, dtype=torch.float64, requires_grad=True)
    face = (torch.rand(batch, frames * per_frame) < 0.5).double()
    residual = torch.randn(x.shape, dtype=torch.float64)
    return module, x, audio, face, residual


@pytest.mark.parametrize("tokens", [16, 40])
def test_a_single_head_of_1024_channels_is_absorbed(tokens):
    module, x, audio, face, residual = single_wide_head(tokens)
    assert module.q.weight.shape == (1024, 24)
    want = residual + face[..., None] * written_out(module, x, audio, 5)
    with torch.no_grad():
        memory = module.memory(audio, "full")
        assert memory.k.shape == (2, 3, 24, tokens)
        out = module(x, 5, memory=memory, mask=face, residual=residual)
        assert error(out, want) < 1e-13
        assert torch.equal(out[face == 0], residual[face == 0])
        stream = residual.clone()
        assert torch.equal(module(x, 5, memory=memory, mask=face, residual=stream, out=stream), out)
    trained = module(x, 5, audio, absorb="full", mask=face, residual=residual)
    assert error(trained, want) < 1e-13
    wanted = [x, audio, *module.parameters()]
    expected = torch.autograd.grad(want.sin().sum(), wanted)
    for ours, truth in zip(torch.autograd.grad(trained.sin().sum(), wanted), expected, strict=True):
        assert (ours - truth).norm() < 1e-12 * (1 + truth.norm())


@pytest.mark.parametrize("absorb", ["none", "value", "full"])
def test_compiles_to_one_graph_that_adds_to_the_stream(absorb):
    module = build(qk_norm=False)
    x, tokens = draw()
    residual = torch.randn(B, 2 * F * S, DIM).double()

    def step(residual, memory):
        stream = residual.clone()
        noisy = stream[:, : F * S]
        heard = module(x, S, memory=memory, residual=noisy, out=noisy)
        return stream + (heard is noisy)

    with torch.no_grad():
        memory = module.memory(tokens, absorb)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert error(compiled(residual, memory), step(residual, memory)) < 1e-13
        assert (
            error(step(residual, memory)[:, : F * S], residual[:, : F * S] + 1 + written_out(module, x, tokens)) < 1e-13
        )


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
