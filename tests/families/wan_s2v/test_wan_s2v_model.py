# SPDX-License-Identifier: Apache-2.0
"""The Wan-S2V transformer against numbers of the official one, and against itself along every path."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from talkingdit.families.wan_s2v.conditions import WanInputs, sequence_layout
from talkingdit.families.wan_s2v.rope import layout_at
from talkingdit.models import WanS2VModel, preset

GOLDEN = Path(__file__).parents[2] / "golden" / "wan_s2v.safetensors"
CASES = ["clip0_drop", "clip1_motion"]
TOLERANCE = 1e-5


def relative(a, b):
    return ((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt()).item()


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        spec = json.loads(file.metadata()["spec"])
        tensors = {key.removeprefix("official/"): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config = spec["config"]
    for switch in ("enable_motioner", "enable_tsm"):
        assert config.pop(switch) is False
    spec["full_config"] = {k: v for k, v in spec["full_config"].items() if k not in ("enable_motioner", "enable_tsm")}
    return spec, tensors


@pytest.fixture(scope="module")
def official(golden):
    spec, tensors = golden
    model = WanS2VModel(**spec["config"])
    state = {k.removeprefix("state/"): v.float() for k, v in tensors.items() if k.startswith("state/")}
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def golden_inputs(tensors, case):
    found = {k.rsplit("/", 1)[1]: v.float() for k, v in tensors.items() if k.startswith(f"{case}/in/")}
    return dict(
        latents=found["x"],
        timestep=found["t"],
        text=found["context"],
        reference=found["ref_latents"],
        history=found["motion_latents"],
        pose=found["cond_states"],
        audio=found["audio_input"],
        drop_history=case == "clip0_drop",
    )


def tiny(**changes):
    """A model of every switch's usual value, small enough to run hundreds of times, with weights that do something."""
    torch.manual_seed(0)
    small = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=3, freq_dim=16, text_dim=12, text_len=6, audio_dim=8)
    small |= dict(audio_inject_layers=(0, 2), cond_dim=16, zip_frame_buckets=(1, 2, 4), motion_frames=(25, 7))
    model = WanS2VModel(**preset("puppet_tiny", **(small | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.2)
    return model


def inputs(batch=2, frames=3, height=12, width=8, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return dict(
        latents=draw(batch, 16, frames, height, width),
        timestep=torch.rand(batch, generator=generator) * 1000,
        text=draw(batch, 5, 12),
        reference=draw(batch, 16, 1, height, width),
        history=draw(batch, 16, 7, height, width),
        pose=draw(batch, 16, frames, height, width),
        audio=draw(batch, 2, 8, 4 * frames),
    )


def denoise(model, latents, timestep, context=None, **given):
    """The velocity of latents by a direct call, from inputs by their names."""
    return model(latents, timestep, WanInputs(**given), context=context)


def sample(arguments, index):
    """One sample of a batch, as a batch of one."""
    return {k: v[index : index + 1] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("case", CASES)
def test_output_equals_the_official_model(golden, official, case):
    out = denoise(official, **golden_inputs(golden[1], case))
    assert relative(out[0], golden[1][f"{case}/out/0"]) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_every_intermediate_equals_the_official_model(golden, official, case):
    spec, tensors = golden
    seen = {}
    handles = []

    def keep(name, module):
        handles.append(module.register_forward_hook(lambda _m, _i, output: seen.__setitem__(name, output.clone())))

    keep("text_tokens", official.text_embedding)
    keep("time_proj", official.time_projection)
    if case == "clip1_motion":
        keep("framepack_tok0", official.frame_packer)
    keep("block1", official.blocks[1])

    def keep_input(name, module):
        handles.append(
            module.register_forward_pre_hook(lambda _m, arguments: seen.__setitem__(name, arguments[0].clone()))
        )

    keep_input("tokens_in", official.blocks[0])
    keep_input("after_inject0", official.blocks[1])
    keep_input("after_inject2", official.head)
    arguments = golden_inputs(tensors, case)
    denoise(official, **arguments)
    for handle in handles:
        handle.remove()

    seen["time_proj"] = seen["time_proj"].flatten(0, 1)
    # The encoder itself, over the whole official sequence with its 73 repetitions in front.
    audio = arguments["audio"]
    pixels, latents = spec["cases"][f"official/{case}"]["mf"]
    whole = torch.cat([audio[..., :1].expand(-1, -1, -1, pixels), audio], dim=-1)
    seen["audio_tokens"], vectors = official.casual_audio_encoder(whole)
    seen["audio_global"] = vectors[:, :, None]
    for name, value in seen.items():
        want = tensors[f"{case}/mid/{name}"]
        if name == "after_inject2":  # the head gets the noisy tokens only
            want = want[:, : spec["cases"][f"official/{case}"]["noisy_tokens"]]
        assert value.shape == want.shape, name
        assert relative(value, want) < TOLERANCE, name
    short, short_vectors = official.casual_audio_encoder.clip_tokens(audio)
    assert relative(short, tensors[f"{case}/mid/audio_tokens"][:, latents:]) < TOLERANCE
    assert relative(short_vectors[:, :, None], tensors[f"{case}/mid/audio_global"][:, latents:]) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_rotations_equal_the_official_table(golden, official, case):
    arguments = golden_inputs(golden[1], case)
    del arguments["latents"], arguments["timestep"]
    layout = official.encode_conditions(WanInputs(**arguments)).layout
    want = torch.view_as_complex(golden[1][f"{case}/mid/rope"][0])
    assert (layout.rotations() - want).abs().max() < 1e-12


def test_names_and_shapes_are_those_of_the_14b_checkpoint(golden):
    spec, _ = golden
    with torch.device("meta"):
        model = WanS2VModel(**preset("wan_s2v_14b"))
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == spec["full_keys"]
    for name, value in spec["full_config"].items():
        assert model.config[name] == (tuple(value) if isinstance(value, list) else value), name


SWITCHES = [
    {},
    dict(enable_adain=False),
    dict(adain_mode="plain"),
    dict(framepack_drop_mode="drop"),
    dict(framepack_padding="none"),
    dict(framepack_padding="zero"),
    dict(enable_framepack=False),
    dict(zero_timestep=False),
    dict(cond_dim=0),
    dict(add_last_motion=False),
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "_".join(f"{k}={v}" for k, v in s.items()) or "default")
def test_batch_equals_its_samples_and_precomputed_conditions_equal_the_direct_call(switches):
    model = tiny(**switches).eval()
    arguments = inputs()
    if model.config.cond_dim == 0:
        del arguments["pose"]
    with torch.no_grad():
        whole = denoise(model, **arguments)
        for i in range(2):
            assert relative(denoise(model, **sample(arguments, i))[0], whole[i]) < TOLERANCE
        latents, timestep = arguments.pop("latents"), arguments.pop("timestep")
        conditions = model.encode_conditions(WanInputs(**arguments))
        assert relative(model(latents, timestep, conditions=conditions), whole) < TOLERANCE


@pytest.mark.parametrize("mode", ["padd", "drop"])
def test_add_last_motion_takes_the_newest_history_away(mode):
    model = tiny(framepack_drop_mode=mode).eval()
    arguments = inputs(batch=1)
    changed = dict(arguments, history=arguments["history"].clone())
    changed["history"][:, :, -1] += 1  # the newest frame: the first bucket
    with torch.no_grad():
        assert not torch.equal(denoise(model, **arguments), denoise(model, **changed))
        assert torch.equal(denoise(model, **arguments, add_last_motion=1), denoise(model, **changed, add_last_motion=1))
        changed["history"][:, :, -3:-1] += 1  # the second bucket
        assert not torch.equal(
            denoise(model, **arguments, add_last_motion=1), denoise(model, **changed, add_last_motion=1)
        )
        assert torch.equal(denoise(model, **arguments, add_last_motion=0), denoise(model, **changed, add_last_motion=0))


@pytest.mark.parametrize("framepack", [True, False])
@pytest.mark.parametrize("name", ["drop_history", "drop_reference"])
def test_dropping_per_sample_equals_dropping_alone(framepack, name):
    model = tiny(enable_framepack=framepack).eval()
    arguments = inputs(batch=3)
    gone = [True, False, True]
    with torch.no_grad():
        for choice in (gone, torch.tensor(gone)):
            mixed = denoise(model, **arguments, **{name: choice})
            for i, drop in enumerate(gone):
                assert relative(mixed[i], denoise(model, **sample(arguments, i), **{name: drop})[0]) < TOLERANCE
        everything = denoise(model, **arguments, **{name: torch.tensor([True] * 3)})
        assert relative(everything, denoise(model, **arguments, **{name: True})) < TOLERANCE
        removed = {k: v for k, v in arguments.items() if k != name.removeprefix("drop_")}
        assert relative(everything, denoise(model, **removed)) < TOLERANCE


def test_a_short_history_is_continued_by_zeros():
    model = tiny().eval()
    arguments = inputs()
    short = dict(arguments, history=arguments["history"][:, :, -3:])
    zeros = dict(arguments, history=torch.cat([torch.zeros(2, 16, 4, 12, 8), short["history"]], dim=2))
    with torch.no_grad():
        assert torch.equal(denoise(model, **short), denoise(model, **zeros))


def test_no_audio_is_silence_and_no_pose_is_a_pose_of_zeros():
    model = tiny().eval()
    arguments = inputs()
    silent = dict(arguments, audio=None, pose=None)
    zeros = dict(arguments, audio=torch.zeros(2, 2, 8, 12), pose=torch.zeros(2, 16, 3, 12, 8))
    with torch.no_grad():
        assert relative(denoise(model, **silent), denoise(model, **zeros)) < TOLERANCE


def test_audio_history_continues_a_longer_recording():
    model = tiny()
    features = torch.randn(1, 2, 8, 32)
    with torch.no_grad():
        whole, _ = model.casual_audio_encoder.clip_tokens(features)
        second, _ = model.casual_audio_encoder.clip_tokens(features[..., 16:], features[..., :16])
        cold, _ = model.casual_audio_encoder.clip_tokens(features[..., 16:])
    assert relative(second, whole[:, 4:]) < TOLERANCE
    assert relative(cold[:, 2:], whole[:, 6:]) < TOLERANCE  # a latent frame sees five features of the past
    assert relative(cold[:, 0], whole[:, 4]) > 1e-2


def test_a_latent_frame_hears_its_own_four_features_and_five_before():
    model = tiny()
    features = torch.randn(1, 2, 8, 32)
    with torch.no_grad():
        before, _ = model.casual_audio_encoder.clip_tokens(features)
        for i in (0, 11, 31):
            changed = features.clone()
            changed[..., i] += 1
            after, _ = model.casual_audio_encoder.clip_tokens(changed)
            heard = [f for f in range(8) if not torch.equal(after[0, f, :4], before[0, f, :4])]
            assert heard == [f for f in range(8) if 4 * f - 5 <= i <= 4 * f + 3 or (i == 0 and 4 * f < 5)]


def test_text_mask_hides_padding():
    model = tiny().eval()
    arguments = inputs()
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    changed = dict(arguments, text=arguments["text"].clone())
    changed["text"][:, 3:] += 1
    with torch.no_grad():
        assert (
            relative(denoise(model, **arguments, text_mask=mask), denoise(model, **changed, text_mask=mask)) < TOLERANCE
        )
        assert relative(denoise(model, **arguments), denoise(model, **changed)) > 1e-3
        assert (
            relative(
                denoise(model, **arguments), denoise(model, **arguments, text_mask=torch.ones(2, 5, dtype=torch.bool))
            )
            > 1e-4
        )


def test_one_timestep_per_frame_equals_one_per_sample_where_they_agree():
    model = tiny().eval()
    arguments = inputs()
    per_frame = dict(arguments, timestep=arguments["timestep"][:, None].expand(-1, 3))
    with torch.no_grad():
        assert relative(denoise(model, **per_frame), denoise(model, **arguments)) < TOLERANCE
        per_frame["timestep"] = per_frame["timestep"] * torch.tensor([0.0, 1.0, 1.0])
        assert relative(denoise(model, **per_frame), denoise(model, **arguments)) > 1e-3


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny()
    arguments = inputs()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        denoise(model, **arguments, drop_history=[True, False]).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("bf16", [False, True])
def test_every_parameter_learns_from_nothing_and_the_first_steps_lower_the_loss(bf16):
    torch.manual_seed(0)
    model = WanS2VModel(
        **preset("puppet_tiny", dim=64, ffn_dim=96, audio_dim=32, num_heads=2, num_layers=3, audio_inject_layers=(0, 2))
    )
    arguments = dict(inputs(height=12, width=12), text=torch.randn(2, 5, 64), audio=torch.randn(2, 2, 32, 12))
    del arguments["pose"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    target = arguments["latents"].roll(1, 0)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = (denoise(model, **arguments, drop_history=[True, False]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_bf16_weights_and_autocast_stay_near_float32(golden, official):
    arguments = golden_inputs(golden[1], "clip1_motion")
    exact = golden[1]["clip1_motion/out/0"]
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(denoise(official, **arguments)[0], exact) < 2e-2
    model = WanS2VModel.from_config(official.config)
    model.load_state_dict(official.state_dict())
    out = denoise(model.to(torch.bfloat16).eval(), **arguments)
    assert out.dtype == torch.float32
    assert relative(out[0], exact) < 2e-2


def test_save_and_load(tmp_path):
    model = tiny().eval()
    arguments = inputs()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = WanS2VModel.from_pretrained(tmp_path)
        assert torch.equal(denoise(again, **arguments), denoise(model, **arguments))
        half = WanS2VModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    assert half.time_embedding[0].weight.dtype == torch.float32


def test_a_new_zero_init_model_is_deaf_and_still(golden):
    spec, tensors = golden
    torch.manual_seed(0)
    model = WanS2VModel(**spec["config"]).eval()
    arguments = golden_inputs(tensors, "clip1_motion")
    with torch.no_grad():
        assert denoise(model, **arguments).abs().max() == 0
        torch.nn.init.normal_(model.head.head.weight, std=0.1)
        out = denoise(model, **arguments)
        assert out.abs().max() > 0
        assert torch.equal(out, denoise(model, **dict(arguments, audio=None, pose=None)))


def test_dtype_of_positions_and_padding_of_history():
    layout = sequence_layout((2, 6, 6), 32, 30, ((1, 2, 16), "padd", "replicate", 2))
    assert len(layout) == 2 * 36 + 36 + 36 + 9 + 4 * 4
    assert len(sequence_layout((2, 6, 6), 32, 30, ((1, 2, 16), "padd", "none", 2))) == 2 * 36 + 36 + 36 + 9 + 4
    assert [float(row[0]) for row in layout.segments[4].t] == [-19, -14, -9, -4]
    assert [float(row[0]) for row in layout.segments[4].h] == [0, 5]


@pytest.mark.parametrize("framepack", [True, False])
def test_samples_of_different_lengths_in_a_batch_equal_each_alone(framepack):
    model = tiny(enable_framepack=framepack).eval()
    arguments = inputs(batch=3)
    lengths, past = [3, 1, 2], [7, 2, 0]
    with torch.no_grad():
        mixed = denoise(
            model, **arguments, lengths=lengths, history_lengths=torch.tensor(past), drop_history=[False, False, True]
        )
        for i, (length, kept) in enumerate(zip(lengths, past, strict=True)):
            alone = sample(arguments, i)
            for name in ("latents", "pose"):
                alone[name] = alone[name][:, :, :length]
            alone["audio"] = alone["audio"][..., : 4 * length]
            alone["history"] = alone["history"][:, :, 7 - kept :]
            assert relative(denoise(model, **alone, drop_history=i == 2)[0], mixed[i, :, :length]) < TOLERANCE


def test_absorbed_audio_values_give_the_same_video():
    arguments = inputs()
    with torch.no_grad():
        plain = denoise(tiny().eval(), **arguments)
        model = tiny(audio_absorb="value").eval()
        assert relative(denoise(model, **arguments), plain) < TOLERANCE
        latents, timestep = arguments.pop("latents"), arguments.pop("timestep")
        conditions = model.encode_conditions(WanInputs(**arguments))
        # Heads x tokens rows of the model's width, rounded up to whole pieces of 16 bytes.
        assert conditions.audio_kv[0].v.shape == (2, 3, 16, 48)
        assert relative(model(latents, timestep, conditions=conditions), plain) < TOLERANCE


@pytest.fixture
def _no_kept_tables():
    """Tables of rotations are kept between calls; those made of fake tensors must not be."""
    layout_at.cache_clear()
    yield
    layout_at.cache_clear()


@pytest.mark.usefixtures("_no_kept_tables")
def test_a_forward_reads_no_tensor_on_the_host():
    """With fake tensors, which have no values, every `.item()` and every branch on a value raises."""
    arguments = inputs()
    arguments["drop_history"] = torch.tensor([True, False])
    arguments["lengths"] = torch.tensor([3, 2])
    arguments["text_mask"] = torch.ones(2, 5, dtype=torch.bool)
    latents, timestep = arguments.pop("latents"), arguments.pop("timestep")
    for changes in ({}, dict(enable_adain=False, enable_framepack=False), dict(audio_absorb="value")):
        model = tiny(**changes).eval()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            model.to_empty(device="cpu")
            fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            x, t = mode.from_tensor(latents), mode.from_tensor(timestep)
            assert model(x, t, WanInputs(**fake)).shape == latents.shape
            assert model(x, t, conditions=model.encode_conditions(WanInputs(**fake))).shape == latents.shape


def test_compiles_to_one_graph():
    model = tiny(num_layers=1, audio_inject_layers=(0,)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    arguments = inputs() | dict(drop_history=torch.tensor([True, False]))
    with torch.no_grad():
        want = denoise(model, **arguments)
        assert relative(denoise(compiled, **arguments), want) < TOLERANCE
        latents, timestep = arguments.pop("latents"), arguments.pop("timestep")
        conditions = model.encode_conditions(WanInputs(**arguments))
        assert relative(compiled(latents, timestep, conditions=conditions), want) < TOLERANCE


def test_blocks_compile_alone():
    """Regional compilation: one small graph for all blocks, which is what generation uses."""
    model = tiny().eval()
    arguments = inputs()
    with torch.no_grad():
        want = denoise(model, **arguments)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        assert relative(denoise(model, **arguments), want) < TOLERANCE
        assert counter.frame_count == 1


@pytest.mark.slow
def test_compiles_to_one_graph_for_any_size():
    model = tiny().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for arguments in (inputs(), inputs(frames=2, height=16), inputs() | dict(drop_history=True)):
            assert relative(denoise(compiled, **arguments), denoise(model, **arguments)) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(latents=torch.zeros(2, 15, 3, 12, 8)),
            r"latents must have shape \[B, 16, T, H, W\], got \[2, 15, 3, 12, 8\]",
        ),
        (dict(latents=torch.zeros(2, 16, 3, 13, 8)), "even height and width, got 13 x 8"),
        (dict(audio=torch.zeros(2, 2, 8, 13)), "4 features per latent frame, 12 for 3 frames, got 13"),
        (dict(audio=torch.zeros(2, 25, 8, 12)), r"audio must have shape \[2, 2, 8, 12\], got \[2, 25, 8, 12\]"),
        (dict(timestep=torch.zeros(3)), r"timestep must have shape \[B\] = \[2\] or \[B, T\] = \[2, 3\], got \[3\]"),
        (dict(text=torch.zeros(2, 7, 12)), "at most text_len = 6 tokens, got 7"),
        (dict(text=torch.zeros(2, 5, 13)), r"text must have shape \[B, L, 12\], got \[2, 5, 13\]"),
        (dict(text=None), "text must be given"),
        (dict(reference=torch.zeros(2, 16, 2, 12, 8)), r"reference must have shape \[2, 16, 1, 12, 8\]"),
        (dict(history=torch.zeros(2, 16, 7, 8, 8)), r"history must have shape \[2, 16, Th, 12, 8\]"),
        (dict(drop_history=[True]), r"drop_history must be a bool or one bool per sample \(2\)"),
        (dict(add_last_motion=3), "add_last_motion must be 0, 1 or 2, got 3"),
        (dict(lengths=[3]), r"lengths must have one number per sample \(2\), got \[1\]"),
        (dict(lengths=[3, 4]), r"lengths must be numbers of frames up to 3, got \[3, 4\]"),
        (dict(history_lengths=[8, 7]), "history_lengths must be numbers of frames up to 7"),
        (dict(text_mask=torch.ones(2, 6, dtype=torch.bool)), r"text_mask must have shape \[2, 5\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_name_the_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        denoise(tiny(), **(inputs() | changes))


def test_conditions_of_another_clip_are_refused():
    model = tiny().eval()
    arguments = inputs()
    latents, timestep = arguments.pop("latents"), arguments.pop("timestep")
    with torch.no_grad():
        conditions = model.encode_conditions(WanInputs(**arguments))
        with pytest.raises(
            ValueError, match=r"conditions were made for latents of .* \[2, 3, 12, 8\], got \[2, 2, 12, 8\]"
        ):
            model(latents[:, :, :2], timestep, conditions=conditions)
        with pytest.raises(ValueError, match="conditions must be WanConditions or WanInputs, got Tensor"):
            model(latents, timestep, arguments["text"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_heads=5), "dim must be a multiple of 4 and of num_heads"),
        (dict(audio_inject_layers=(2, 0)), "audio_inject_layers must be ascending block numbers below 3"),
        (dict(audio_inject_layers=(0, 3)), "audio_inject_layers must be ascending block numbers below 3"),
        (dict(zip_frame_buckets=(1, 2, 3)), "zip_frame_buckets must be three frame counts"),
        (dict(framepack_padding="wrap"), "framepack_padding must be"),
        (dict(framepack_drop_mode="pad"), "framepack_drop_mode must be"),
        (dict(motion_frames=(73, 18)), "motion_frames must be"),
        (dict(residual_dtype="float16"), "residual_dtype must be"),
        (dict(audio_absorb="full"), "audio_absorb must be 'none' or 'value'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_contradictory_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"name must be one of .*puppet_tiny, .*wan_s2v_14b, got 'wan'"):
        preset("wan")
