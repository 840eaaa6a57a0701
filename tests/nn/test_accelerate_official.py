# SPDX-License-Identifier: Apache-2.0
"""accelerate() on classes with the attributes and signatures of the official WanModel and WanModel_S2V."""

from __future__ import annotations

import copy
import json
import pickle
import types
from pathlib import Path

import official_standin
import pytest
import torch
from official_standin import WanModel, WanModel_S2V
from safetensors import safe_open
from test_accelerate_diffusers import Ops, attributes, check_gradients, difference
from tiny_diffusers import inputs, make, randomise

import talkingdit

GOLDEN = Path(__file__).parent.parent / "golden" / "wan_s2v.safetensors"
BLOCK = "block: norm, modulation and gates"
ATTENTION = "self-attention: norm and rotation of q and k"
TIME = "time embedding: once for all tokens where they have one timestep"
AUDIO = "audio injection: norm, attention to the audio of each frame"


def wan_inputs(batch=2, per_token=False):
    """Clips of different sizes, padded to one length."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 3, 6, 8), (4, 2, 8, 6)][:batch]
    seq_len = 40
    return dict(
        x=[torch.randn(shape, generator=generator) for shape in shapes],
        t=torch.linspace(0, 1000, batch * seq_len).view(batch, seq_len)
        if per_token
        else torch.tensor([900.0, 30.0])[:batch],
        context=[torch.randn(length, 16, generator=generator) for length in (7, 4)[:batch]],
        seq_len=seq_len,
    )


def run(model, given):
    with torch.no_grad():
        out = model(**given)
    return torch.cat([u.flatten() for u in out]) if isinstance(out, list) else out


def gradients(model, given):
    model.zero_grad()
    out = model(**given)
    out = torch.cat([u.flatten() for u in out]) if isinstance(out, list) else out
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


NAMES = {
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "attn1.to_": "self_attn.",
    "attn2.to_": "cross_attn.",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "norm2.": "norm3.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
    "scale_shift_table": "modulation",
}


def official_name(name):
    if name == "scale_shift_table":
        return "head.modulation"
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def test_the_stand_in_computes_what_diffusers_computes():
    theirs, given = make("wan", num_layers=2), inputs("wan")
    standin = WanModel(dim=24, ffn_dim=32)
    standin.load_state_dict({official_name(name): value for name, value in theirs.state_dict().items()}, strict=True)
    with torch.no_grad():
        expected = theirs(**given)[0]
        latents = given["hidden_states"]
        ours = standin(
            list(latents), given["timestep"], list(given["encoder_hidden_states"]), latents[0, 0].numel() // 4
        )
    assert difference(torch.stack(ours), expected) < 1e-5


@pytest.mark.parametrize(
    ("switches", "per_token"),
    [({}, False), ({}, True), ({"qk_norm": False}, False), ({"cross_attn_norm": False}, True)],
)
def test_wan_model(switches, per_token):
    model, given = randomise(WanModel(**switches)), wan_inputs(per_token=per_token)
    expected, grads, state = run(model, given), gradients(model, given), attributes(model)
    report = talkingdit.accelerate(model)
    assert report.replaced == {BLOCK: 2, ATTENTION: 2, TIME: 1}
    assert not report.left
    with Ops() as ops:
        assert difference(run(model, given), expected) < 1e-5
    assert ops.calls["qk_norm_rope3d" if switches.get("qk_norm", True) else "rope3d"] == 4
    assert ops.calls["gate_residual"] >= 2
    check_gradients(gradients(model, given), grads)
    assert talkingdit.accelerate(model).already == 5
    talkingdit.restore(model)
    model.zero_grad()
    assert attributes(model) == state
    assert torch.equal(run(model, given), expected)


@pytest.mark.parametrize("per_token", [False, True])
def test_time_is_embedded_once_where_there_is_one_timestep(per_token):
    model, given = randomise(WanModel()), wan_inputs(per_token=per_token)
    rows = []
    model.time_projection[1].register_forward_hook(lambda _m, _i, out: rows.append(out.shape[1]))
    run(model, given)
    talkingdit.accelerate(model)
    run(model, given)
    assert rows == [40, 40 if per_token else 1]


def test_a_replaced_forward_of_the_model_stays():
    """Sequence parallelism of the official program; it repeats the timestep for every token and cuts the tokens."""
    model, given = randomise(WanModel()), wan_inputs()
    model.forward = types.MethodType(lambda self, **kwargs: WanModel.forward(self, **kwargs), model)
    expected = run(model, given)
    report = talkingdit.accelerate(model)
    assert report.left == {(TIME, "hooks or other code replace a forward"): 1}
    assert difference(run(model, given), expected) < 1e-5


def test_one_time_vector_for_all_tokens():
    """The form of e in Wan 2.1: [B, 6, dim]."""
    block = randomise(official_standin.WanAttentionBlock(24, 32, 2, True, True, 1e-6))
    generator = torch.Generator().manual_seed(1)
    x, e, text = (torch.randn(shape, generator=generator) for shape in ((2, 12, 24), (2, 6, 24), (2, 5, 24)))
    grid, freqs = torch.tensor([[2, 2, 3]] * 2), official_standin.rope_table(12)
    given = dict(
        x=x, e=e, seq_lens=torch.tensor([12, 12]), grid_sizes=grid, freqs=freqs, context=text, context_lens=None
    )
    expected = run(block, given)
    talkingdit.accelerate(block)
    assert difference(run(block, given), expected) < 1e-5


def test_the_rotations_of_the_model_itself_are_used():
    model, given = randomise(WanModel()), wan_inputs()
    plain = run(model, given)
    model.freqs = model.freqs**0.5
    expected = run(model, given)
    assert difference(expected, plain) > 1e-3
    talkingdit.accelerate(model)
    assert difference(run(model, given), expected) < 1e-5


def test_attention_function_is_the_one_that_stands_in_the_module_now(monkeypatch):
    model, given = randomise(WanModel()), wan_inputs()
    talkingdit.accelerate(model)
    asked = []

    def other(q, k, v, k_lens=None, window_size=None):
        asked.append(window_size)
        return torch.zeros_like(q)

    monkeypatch.setattr(official_standin, "flash_attention", other)
    run(model, given)
    assert asked == [(-1, -1), None] * 2


def test_replaced_attention_stays():
    """Sequence parallelism of the official program puts another forward on self_attn."""
    model, given = randomise(WanModel()), wan_inputs()

    def parallel(self, x, seq_lens, grid_sizes, freqs):
        return 2 * type(self).forward(self, x, seq_lens, grid_sizes, freqs)

    for block in model.blocks:
        block.self_attn.forward = types.MethodType(parallel, block.self_attn)
    expected = run(model, given)
    report = talkingdit.accelerate(model)
    assert report.replaced == {BLOCK: 2, TIME: 1}
    assert report.left == {(ATTENTION, "hooks or other code replace its forward"): 2}
    assert difference(run(model, given), expected) < 1e-5


def test_blocks_of_another_signature_are_left_alone():
    class Other(official_standin.WanAttentionBlock):
        def forward(self, x, hints, **kwargs):
            return super().forward(x, **kwargs)

    model = WanModel()
    model.blocks[1].__class__ = Other
    report = talkingdit.accelerate(model)
    assert report.left == {(BLOCK, "its forward is not the one that is known"): 1}
    assert report.replaced == {BLOCK: 1, ATTENTION: 2, TIME: 1}


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        spec = json.loads(file.metadata()["spec"])
        tensors = {key.removeprefix("official/"): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return spec, tensors


def s2v(golden, case):
    """The stand-in with official weights, and official intermediates to begin from."""
    spec, tensors = golden
    config = spec["config"]
    model = WanModel_S2V(
        config["dim"], config["ffn_dim"], config["num_heads"], config["num_layers"], config["audio_inject_layers"]
    )
    state = {k.removeprefix("state/"): v.float() for k, v in tensors.items() if k.startswith("state/")}
    assert not model.load_state_dict(state, strict=False).missing_keys
    found = {k.rsplit("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{case}/mid/")}
    past = spec["cases"][f"official/{case}"]["mf"][1]
    rope = torch.view_as_complex(found["rope"])[:, :, None].expand(-1, -1, config["num_heads"], -1)
    given = dict(
        tokens=found["tokens_in"],
        e0=found["time_proj"].unflatten(1, (6, -1)).transpose(0, 1)[None],
        noisy=spec["cases"][f"official/{case}"]["noisy_tokens"],
        freqs=rope,
        text=found["text_tokens"],
        audio=found["audio_tokens"][:, past:],
        audio_global=found["audio_global"][:, past:],
    )
    return model, given, found["after_inject2"]


def twice(given):
    """A batch of two different samples with rotations of their own."""
    return {
        name: torch.cat([value, value.conj() if name == "freqs" else value.flip(1)]) if name != "noisy" else value
        for name, value in given.items()
    }


@pytest.mark.parametrize("case", ["clip0_drop", "clip1_motion"])
def test_s2v_equals_the_official_numbers(golden, case):
    model, given, expected = s2v(golden, case)
    before, state = run(model, given), attributes(model)
    assert difference(before, expected) < 1e-5
    report = talkingdit.accelerate(model)
    assert report.replaced[BLOCK] == report.replaced[ATTENTION] == 3
    assert report.replaced[AUDIO] == 1
    assert not report.left
    with Ops() as ops:
        assert difference(run(model, given), expected) < 1e-5
    assert ops.calls["qk_norm_rope3d"] == 6
    assert ops.calls["audio_attention"] == 2
    talkingdit.restore(model)
    assert torch.equal(run(model, given), before)
    assert attributes(model).keys() == state.keys()
    assert all("forward" not in vars(module) for module in model.modules())


def test_s2v_gradients_and_batches(golden):
    model, given, _ = s2v(golden, "clip1_motion")
    given = twice(given)
    expected, grads = run(model, given), gradients(model, given)
    talkingdit.accelerate(model)
    assert difference(run(model, given), expected) < 1e-5
    check_gradients(gradients(model, given), grads)


@pytest.mark.parametrize("noisy", [0, 144])
def test_s2v_shard_on_one_side_of_the_split(golden, noisy):
    """Under sequence parallelism all tokens of a rank may be noisy, or none."""
    model, given, _ = s2v(golden, "clip1_motion")
    block, x = model.blocks[0], given["tokens"]
    arguments = dict(
        x=x,
        e=[given["e0"], torch.tensor(noisy + (7 if noisy else -7))],
        seq_lens=torch.tensor([144]),
        grid_sizes=[],
        freqs=given["freqs"],
        context=given["text"],
        context_lens=None,
    )
    expected, grads = run(block, arguments), gradients(block, arguments)
    talkingdit.accelerate(model)
    assert difference(run(block, arguments), expected) < 1e-5
    check_gradients(gradients(block, arguments), grads)


def test_s2v_without_adaptive_norm():
    model = randomise(WanModel_S2V(48, 64, 2, 2, [1], adain=False))
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    angles = torch.polar(torch.ones(1, 30, 1, 12, dtype=torch.float64), randn(1, 30, 1, 12).double())
    given = dict(
        tokens=randn(1, 30, 48),
        e0=randn(1, 6, 2, 48),
        noisy=24,
        freqs=angles.expand(-1, -1, 2, -1),
        text=randn(1, 5, 48),
        audio=randn(1, 3, 5, 48),
        audio_global=randn(1, 3, 1, 48),
    )
    expected = run(model, given)
    talkingdit.accelerate(model)
    assert difference(run(model, given), expected) < 1e-5


def test_s2v_under_autocast(golden):
    model, given, expected = s2v(golden, "clip1_motion")
    with torch.autocast("cpu", torch.bfloat16):
        before = run(model, given)
        talkingdit.accelerate(model)
        after = run(model, given)
    assert after.dtype == before.dtype == torch.float32
    assert difference(after, expected) < 1.2 * difference(before, expected)


def test_s2v_leaves_gathering_injection_to_the_official_program(golden):
    model, given, _ = s2v(golden, "clip1_motion")
    talkingdit.accelerate(model)
    model.use_context_parallel = True
    with Ops() as ops:
        run(model, given)
    assert ops.calls["audio_attention"] == 0


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_models_of_their_own(golden, how):
    model, given, expected = s2v(golden, "clip1_motion")
    talkingdit.accelerate(model)
    other = how(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert difference(run(other, given), expected) < 1e-5


def test_compiles_with_graph_breaks_where_the_official_code_reads_sizes():
    model, given = randomise(WanModel(num_layers=1)), wan_inputs(batch=1)
    expected = run(model, given)
    talkingdit.accelerate(model)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    assert difference(run(model, given), expected) < 1e-5
