# SPDX-License-Identifier: Apache-2.0
"""Stages: what trains, what begins at zero, where a run is after a resume, and adapters."""

from pathlib import Path

import pytest
import torch
from official import random_transformer
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from talkingdit.checkpoints.lora import Loras
from talkingdit.families import preset
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.model import WanS2VModel
from training.config import Config, read_toml
from training.lora import adapter_state_names, adapter_tensors, add_adapters
from training.sections import LoraConfig
from training.stages import Progress, check_stages, matches, select_parameters, zero_parameters

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
SIZE = {
    **{"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 24, "text_len": 10},
    **{"audio_dim": 8, "audio_layers": 5, "audio_inject_layers": (0, 1)},
}
AUDIO = ["casual_audio_encoder.*", "audio_injector.*"]


class Pair(nn.Module):
    """What training holds: a transformer and another network."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer, self.text_encoder = transformer, nn.Linear(2, 2)


def stages(*tables):
    return Config(stage_tables=list(tables)).stages


@pytest.fixture(scope="module")
def large():
    with torch.device("meta"):
        return Pair(WanS2VModel(**preset("wan_s2v_14b")))


@pytest.mark.parametrize("name", ["wan_s2v", "wan_s2v_audio_only"])
def test_patterns_of_the_wan_configurations_fit_the_released_model(large, name):
    config = read_toml(CONFIGS / f"{name}.toml")
    first, *others = check_stages(config, large)
    heard = sum(p.numel() for n, p in large.named_parameters() if ".casual_audio_encoder." in n or ".audio_inj" in n)
    assert first.weights == heard
    assert 1.9e9 < first.weights < 2.1e9
    assert all(trained.weights == trained.of == sum(p.numel() for p in large.parameters()) for trained in others)


def test_adapters_of_the_wan_configuration_fit_the_released_model():
    config = read_toml(CONFIGS / "wan_s2v_lora.toml")
    with torch.device("meta"):
        model = WanS2VModel(**preset("wan_s2v_14b", num_layers=3, audio_inject_layers=(0, 2)))
        layers = add_adapters(model, config.lora)
    assert len(layers) == 3 * (4 + 4 + 2) + 2 * 4
    (trained,) = check_stages(config, Pair(model))
    assert len(trained.train) == 2 * len(layers)


def test_stages_choose_by_pattern_with_and_without_the_networks_name():
    networks = Pair(random_transformer(**SIZE))
    (stage,) = stages({"train": ["transformer.blocks.[01].*", "head.*", "text_encoder.*"], "freeze": ["*.norm3.*"]})
    trained = select_parameters(networks, stage)
    chosen = {name for name, p in networks.named_parameters() if p.requires_grad}
    assert set(trained.train) == chosen
    assert {name.split(".")[1] for name in chosen} == {"blocks", "head", "weight", "bias"}
    assert not any(".norm3." in name for name in chosen)
    assert str(trained).startswith("trains 0.0 of 0.")
    select_parameters(networks, stages({})[0])
    assert all(p.requires_grad for p in networks.parameters())


def test_names_of_wrapped_layers_are_those_of_the_checkpoint():
    networks = Pair(nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2))))
    assert "transformer.0._checkpoint_wrapped_module.weight" in dict(networks.named_parameters())
    assert select_parameters(networks, stages({"train": ["transformer.0.weight"]})[0]).train == (
        "transformer.0.weight",
    )
    assert matches("transformer.blocks.3.ffn.0.weight", ["blocks.*.ffn.?.weight"])


def test_a_pattern_that_fits_nothing_lists_names_like_it():
    networks = Pair(random_transformer(**SIZE))
    message = (
        r"stages\.a\.train: 'causal_audio_encoder\.\*' matches no parameter; names like it: .*casual_audio_encoder\."
    )
    with pytest.raises(ValueError, match=message):
        select_parameters(networks, stages({"name": "a", "train": ["causal_audio_encoder.*"]})[0])
    (stage,) = stages({"name": "a", "zero": ["audio_injector.injectors.*.o.weight"]})
    with pytest.raises(ValueError, match=r"stages\.a\.zero: .*like it: audio_injector\.injector\.0\.o\."):
        zero_parameters(networks, stage)
    with pytest.raises(ValueError, match=r"'zzz' matches no parameter; names like it: none"):
        select_parameters(networks, stages({"train": ["*"], "freeze": ["zzz"]})[0])
    config = Config(stage_tables=[{"name": "a", "optim": {"lr_scale": {"heads.*": 2.0}}}])
    with pytest.raises(
        ValueError, match=r"stages\.a\.optim\.lr_scale: 'heads\.\*' matches no parameter; .*like it: head\."
    ):
        check_stages(config, networks)
    config = Config(stage_tables=[{}, {"name": "b", "conditions": {"tasks": {"edit": 1}}}])
    with pytest.raises(
        ValueError, match=r"stages\.b\.conditions\.tasks: models of drawn characters do not have the task 'edit'"
    ):
        check_stages(config, networks)
    with pytest.raises(ValueError, match="nothing would train"):
        select_parameters(networks, stages({"train": ["head.*"], "freeze": ["head.*"]})[0])


def test_zeros_are_set_and_must_be_trainable():
    networks = Pair(random_transformer(**SIZE))
    (stage,) = stages({"train": AUDIO, "zero": ["audio_injector.injector.*.o.*"]})
    before = {name: p.clone() for name, p in networks.named_parameters()}
    select_parameters(networks, stage)
    zeroed = zero_parameters(networks, stage)
    assert len(zeroed) == 4
    for name, parameter in networks.named_parameters():
        assert (parameter.abs().max() == 0) if name in zeroed else torch.equal(parameter, before[name])
    (stage,) = stages({"name": "a", "train": ["head.*"], "zero": ["audio_injector.injector.0.o.bias"]})
    select_parameters(networks, stage)
    with pytest.raises(ValueError, match=r"stages\.a\.zero: .*0\.o\.bias would stay zero"):
        zero_parameters(networks, stage)


def test_zeroed_audio_outputs_leave_the_video_as_without_audio():
    networks = Pair(random_transformer(**SIZE))
    (stage,) = stages({"train": AUDIO, "zero": ["audio_injector.injector.*.o.*"]})
    select_parameters(networks, stage)
    zero_parameters(networks, stage)
    latents, text, audio = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 3, 24), torch.randn(1, 5, 8, 8)
    with torch.no_grad():
        silent = networks.transformer(latents, torch.tensor([500.0]), WanInputs(text))
        voiced = networks.transformer(latents, torch.tensor([500.0]), WanInputs(text, audio=audio))
        torch.testing.assert_close(voiced, silent)


def test_a_run_goes_through_its_stages_and_ends():
    progress = Progress(stages({"name": "a", "steps": 2}, {"name": "b", "minutes": 1.0}))
    seen = []
    while not progress.done:
        seen.append((progress.stage.name, progress.step, progress.fraction, progress.enter()))
        progress.advance(seconds=30.0)
    assert seen == [("a", 0, 0.0, True), ("a", 1, 0.5, False), ("b", 0, 0.0, True), ("b", 1, 0.5, False)]
    assert (progress.total, progress.overall) == (4, 1.0)
    steps = Progress(stages({"name": "a", "steps": 3}, {"name": "b", "steps": 1}))
    steps.advance(steps=3)
    assert steps.overall == 0.75


def test_a_resume_goes_on_in_the_same_stage_and_begins_none_twice():
    tables = {"name": "a", "steps": 2}, {"name": "b", "steps": 5}
    progress = Progress(stages(*tables))
    progress.enter()
    progress.advance(steps=2)
    between = progress.state_dict()  # saved after the last step of a: b has not begun
    progress.enter()
    progress.advance(seconds=3.0)

    resumed = Progress(stages(*tables))
    resumed.load_state_dict(progress.state_dict())
    assert (resumed.stage.name, resumed.step, resumed.total, resumed.elapsed) == ("b", 1, 3, 3.0)
    assert not resumed.enter()
    resumed.load_state_dict(between)
    assert (resumed.stage.name, resumed.step) == ("b", 0)
    assert resumed.enter()


def test_stages_may_be_added_or_made_shorter_between_runs_but_not_taken_away():
    progress = Progress(stages({"name": "a", "steps": 4}))
    progress.enter()
    progress.advance(steps=3)
    state = progress.state_dict()
    shorter = Progress(stages({"name": "zero", "steps": 1}, {"name": "a", "steps": 2}, {"name": "b", "steps": 9}))
    shorter.load_state_dict(state)
    assert (shorter.stage.name, shorter.step, shorter.total) == ("b", 0, 3)
    progress.advance()
    assert progress.done
    longer = Progress(stages({"name": "a", "steps": 4}, {"name": "b", "steps": 9}))
    longer.load_state_dict(progress.state_dict())
    assert (longer.stage.name, longer.step, longer.total) == ("b", 0, 4)
    ended = Progress(stages({"name": "a", "steps": 4}))
    ended.load_state_dict(progress.state_dict())
    assert (ended.done, ended.total, ended.overall) == (True, 4, 1.0)
    more = Progress(stages({"name": "a", "steps": 6}))
    more.load_state_dict(ended.state_dict())
    assert (more.stage.name, more.step, more.total, more.enter()) == ("a", 4, 4, False)
    assert [more.advance(), more.advance()] == [False, True]
    with pytest.raises(ValueError, match="the checkpoint is in stage 'a', which the configuration does not have"):
        Progress(stages({"name": "b", "steps": 9})).load_state_dict(state)


def test_adapters_train_alone_and_their_file_gives_the_same_model(tmp_path):
    config = LoraConfig(rank=2, alpha=3.0, targets=["q", "ffn.0", "o"])
    model = random_transformer(**SIZE)
    fresh = random_transformer(**SIZE)
    fresh.load_state_dict(model.state_dict())
    latents, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 3, 24)

    def answer(m):
        with torch.no_grad():
            return m(latents, torch.tensor([500.0]), WanInputs(text))

    plain = answer(model)
    layers = add_adapters(model, config, seed=4)
    assert len(layers) == 2 * 5 + 2 * 2
    torch.testing.assert_close(answer(model), plain)  # without effect at first
    assert {".lora_" in n for n, p in model.named_parameters() if p.requires_grad} == {True}
    (stage,) = Config(lora=config, stage_tables=[{}]).stages
    assert len(select_parameters(Pair(model), stage).train) == 2 * len(layers)

    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trained = answer(model)
    assert (trained - plain).abs().max() > 1e-3
    assert set(adapter_state_names(model)) == {n for n in model.state_dict() if "lora" in n}
    save_file(adapter_tensors(model, config), tmp_path / "adapter.safetensors")
    report = Loras(fresh).load(tmp_path / "adapter.safetensors")
    assert report.adapted == len(layers)
    torch.testing.assert_close(answer(fresh), trained, rtol=1e-4, atol=1e-5)


def test_every_process_begins_with_the_same_adapters():
    first, second = random_transformer(**SIZE), random_transformer(**SIZE)
    for seed, model in enumerate((first, second)):
        torch.manual_seed(seed)
        add_adapters(model, LoraConfig(rank=2), seed=7)
    for name, value in first.state_dict().items():
        if "lora" in name:
            assert torch.equal(value, second.state_dict()[name])


def test_adapters_for_layers_that_are_not_there_are_refused():
    model = random_transformer(**SIZE)
    with pytest.raises(ValueError, match=r"lora\.targets: 'to_q' is the end of no linear layer's name; layers: .*ffn"):
        add_adapters(model, LoraConfig(rank=2, targets=["to_q"]))
    with pytest.raises(ValueError, match=r"lora\.rank must be over 0, got 0"):
        add_adapters(model, LoraConfig())
