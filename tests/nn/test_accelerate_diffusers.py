# SPDX-License-Identifier: Apache-2.0
"""accelerate() on the transformers of diffusers: the same model, before and after, in everything a user can see."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from tiny_diffusers import MODELS, inputs, make
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import talkingdit
from talkingdit.nn.accelerate.diffusers_wan import WanProcessor


class Ops(TorchDispatchMode):
    """Counts calls of this package's ops: a fused path that silently falls back would pass every comparison."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "talkingdit":
            self.calls[func.__name__.removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


def run(model: nn.Module, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**given)[0]


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def gradients(model: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    given = {**given, "hidden_states": given["hidden_states"].clone().requires_grad_()}
    out = model(**given)[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out.float() * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**grads, "hidden_states": given["hidden_states"].grad}


def check_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    # Some gradients are zero but for rounding (a bias of keys moves no softmax): they are held to the largest one.
    scale = max(float(g.norm()) for g in expected.values())
    for name, grad in expected.items():
        assert (actual[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7 * scale, name


@pytest.mark.parametrize("name", MODELS)
def test_same_output_and_restored_to_the_last_bit(name):
    model, given = make(name), inputs(name)
    expected, keys, state = run(model, given), list(model.state_dict()), attributes(model)
    blocks = len(model.blocks) + len(getattr(model, "vace_blocks", []))

    report = talkingdit.accelerate(model)
    assert sorted(report.replaced.values()) == [blocks, blocks]
    assert list(model.state_dict()) == keys
    with Ops() as ops:
        actual = run(model, given)
    assert ops.calls["qk_norm_rope3d"] == 2 * blocks
    assert ops.calls["gate_residual"] >= blocks
    assert difference(actual, expected) < 1e-5

    talkingdit.restore(model)
    talkingdit.restore(model)
    assert attributes(model) == state
    with Ops() as ops:
        assert torch.equal(run(model, given), expected)
    assert not ops.calls


@pytest.mark.parametrize("name", MODELS)
def test_same_gradients(name):
    model, given = make(name), inputs(name)
    expected = gradients(model, given)
    talkingdit.accelerate(model)
    check_gradients(gradients(model, given), expected)


@pytest.mark.parametrize("name", ["wan", "vace", "skyreels-df"])
def test_gradient_checkpointing(name):
    model, given = make(name), inputs(name)
    expected = gradients(model, given)
    talkingdit.accelerate(model)
    model.enable_gradient_checkpointing()
    model.train()
    check_gradients(gradients(model, given), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["wan", "wan-ti2v", "vace"])
def test_half_precision_is_no_further_from_float32(name, dtype):
    exact = run(make(name), inputs(name))
    model, given = make(name).to(dtype), inputs(name, dtype=dtype)
    before = run(model, given)
    talkingdit.accelerate(model)
    after = run(model, given)
    assert after.dtype == before.dtype
    assert difference(after, exact) < 1.2 * difference(before, exact)


def test_autocast():
    model, given = make("wan"), inputs("wan")
    with torch.autocast("cpu", torch.bfloat16):
        before = run(model, given)
        talkingdit.accelerate(model)
        assert difference(run(model, given), before) < 1e-2


@pytest.mark.parametrize("name", ["wan", "vace"])
def test_blocks_compile_without_graph_breaks(name):
    model, given = make(name, num_layers=1), inputs(name)
    expected = gradients(model, given)
    talkingdit.accelerate(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    check_gradients(gradients(model, given), expected)


def test_blocks_that_were_compiled_before_notice():
    model, given = make("wan"), inputs("wan")
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    expected = run(model, given)
    talkingdit.accelerate(model)
    accelerated = run(model, given)
    assert not torch.equal(accelerated, expected)
    assert difference(accelerated, expected) < 1e-5
    talkingdit.restore(model)
    assert torch.equal(run(model, given), expected)


def test_one_graph_serves_all_blocks_and_steps():
    model, given = make("wan"), inputs("wan")
    talkingdit.accelerate(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    run(model, given)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(model, {**given, "timestep": given["timestep"] / 2})


def test_lora_layers_go_on_working():
    from peft import LoraConfig

    model, given = make("wan"), inputs("wan")
    plain = run(model, given)
    talkingdit.accelerate(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    accelerated = run(model, given)
    grads = gradients(model, given)
    talkingdit.restore(model)
    assert difference(accelerated, run(model, given)) < 1e-5
    assert difference(accelerated, plain) > 1e-2
    check_gradients(grads, gradients(model, given))


def test_wrapped_by_peft():
    from peft import LoraConfig, get_peft_model

    given = inputs("wan")
    model = get_peft_model(make("wan"), LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    expected = run(model, given)
    assert sum(talkingdit.accelerate(model).replaced.values()) == 6
    assert difference(run(model, given), expected) < 1e-5


def test_fused_projections():
    model, given = make("wan"), inputs("wan")
    model.fuse_qkv_projections()
    expected = run(model, given)
    talkingdit.accelerate(model)
    with Ops() as ops:
        assert difference(run(model, given), expected) < 1e-5
    assert ops.calls["qk_norm_rope3d"] == 6
    model.unfuse_qkv_projections()
    assert difference(run(model, given), expected) < 1e-5


def test_attention_backend_is_the_one_the_model_is_set_to(monkeypatch):
    import diffusers.models.attention_dispatch as dispatch

    asked = []
    original = dispatch.dispatch_attention_fn

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        asked.append((kwargs["backend"], kwargs["parallel_config"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(dispatch, "dispatch_attention_fn", spy)
    model, given = make("wan"), inputs("wan")
    model.set_attention_backend("_native_math")
    talkingdit.accelerate(model)
    run(model, given)
    assert set(asked) == {("_native_math", None)}
    model.set_attention_backend("native")
    asked.clear()
    run(model, given)
    assert set(asked) == {("native", None)}
    talkingdit.restore(model)
    assert {p._attention_backend for p in model.attn_processors.values()} == {"native"}


def test_context_parallel_settings_reach_the_processor():
    model = make("wan")
    talkingdit.accelerate(model)
    settings = object()
    for processor in model.attn_processors.values():
        assert hasattr(processor, "_parallel_config")
        processor._parallel_config = settings
    talkingdit.restore(model)
    assert all(p._parallel_config is settings for p in model.attn_processors.values())


def test_rotary_tables_of_the_model_itself_are_used():
    """Extrapolation methods change the tables: an accelerated model must not go back to the plain ones."""
    model, given = make("wan"), inputs("wan")
    plain = run(model, given)
    with torch.no_grad():
        model.rope.freqs_cos.copy_(torch.cos(torch.acos(model.rope.freqs_cos) * 0.5))
    expected = run(model, given)
    assert difference(expected, plain) > 1e-3
    talkingdit.accelerate(model)
    assert difference(run(model, given), expected) < 1e-5


def test_weights_offloaded_leaf_by_leaf():
    """Such weights are on the meta device until their own module is called."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model, given = make("wan"), inputs("wan")
    expected = run(model, given)
    talkingdit.accelerate(model)
    cpu_offload(model, execution_device="cpu")
    assert model.blocks[0].norm2.weight.is_meta
    assert difference(run(model, given), expected) < 1e-5
    remove_hook_from_submodules(model)
    talkingdit.restore(model)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["accelerate", "shard"])
def test_fsdp(one_process, first):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, given = make("wan"), inputs("wan")
    expected = gradients(model, given)
    model.zero_grad()
    if first == "accelerate":
        talkingdit.accelerate(model)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    if first == "shard":
        talkingdit.accelerate(model)
    with Ops() as ops:
        actual = gradients(model, given)
    assert ops.calls["qk_norm_rope3d_backward"] == 6
    assert ops.calls["gate_residual_backward"] == 3
    check_gradients({k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in actual.items()}, expected)


def test_offloading_that_is_there_already():
    model, given = make("wan"), inputs("wan")
    expected = run(model, given)
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    report = talkingdit.accelerate(model)
    assert not report.replaced
    assert sum(report.left.values()) == 6
    assert torch.equal(run(model, given), expected)


def test_hooks_that_are_there_stay_and_the_report_says_so():
    from diffusers.hooks import HookRegistry, ModelHook

    class Doubling(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    model, given = make("wan"), inputs("wan")
    HookRegistry.check_if_exists_or_initialize(model.blocks[1]).register_hook(Doubling(), "doubling")
    expected = run(model, given)
    report = talkingdit.accelerate(model)
    assert "left alone: 1 x block: norm, modulation and gates: hooks or other code replace its forward" in str(report)
    assert difference(run(model, given), expected) < 1e-5


def test_hooks_laid_over_it_survive_restore():
    from diffusers.hooks import HookRegistry, ModelHook

    class Doubling(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    model, given = make("wan"), inputs("wan")
    plain = run(model, given)
    talkingdit.accelerate(model)
    registry = HookRegistry.check_if_exists_or_initialize(model.blocks[1])
    registry.register_hook(Doubling(), "doubling")
    doubled = run(model, given)
    talkingdit.restore(model)
    with Ops() as ops:
        assert difference(run(model, given), doubled) < 1e-5
    assert not ops.calls
    registry.remove_hook("doubling")
    assert torch.equal(run(model, given), plain)
    assert talkingdit.accelerate(model).replaced["block: norm, modulation and gates"] == 3
    with Ops() as ops:
        run(model, given)
    assert ops.calls["norm_modulate"] == 3


def test_custom_processors_and_subclasses_are_left_alone():
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock

    class Louder(WanAttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return 3 * super().__call__(*args, **kwargs)

    class Twice(WanTransformerBlock):
        def forward(self, *args: Any) -> Tensor:
            return 2 * super().forward(*args)

    model, given = make("wan"), inputs("wan")
    model.blocks[0].attn1.set_processor(Louder())
    model.blocks[1].__class__ = Twice
    expected = run(model, given)
    report = str(talkingdit.accelerate(model))
    assert "it has a processor of its own, Louder" in report
    assert "its forward is not the one that is known" in report
    assert difference(run(model, given), expected) < 1e-5


def test_calling_it_twice_changes_nothing():
    model = make("wan")
    talkingdit.accelerate(model)
    before = [block.forward for block in model.blocks]
    report = talkingdit.accelerate(model)
    assert [block.forward for block in model.blocks] == before
    assert str(report) == ("WanTransformer3DModel\n  already replaced by an earlier call: 6\n  nothing was changed")
    talkingdit.restore(model)
    assert not any(isinstance(p, WanProcessor) for p in model.attn_processors.values())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_models_of_their_own(how):
    model, given = make("wan"), inputs("wan")
    expected = run(model, given)
    talkingdit.accelerate(model)
    other = how(model)
    with torch.no_grad():
        model.blocks[0].scale_shift_table.zero_()
    with Ops() as ops:
        assert difference(run(other, given), expected) < 1e-5
    assert ops.calls["qk_norm_rope3d"] == 6
    talkingdit.restore(other)
    assert torch.equal(run(other, given), expected)


def test_saved_and_loaded_like_any_other(tmp_path):
    model, given = make("wan"), inputs("wan")
    expected = run(model, given)
    talkingdit.accelerate(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path), given), expected)


def test_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"accelerate: model must be one of WanTransformer3DModel.*got Linear"):
        talkingdit.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"accelerate: model must be a torch.nn.Module, got str"):
        talkingdit.accelerate("model")
    with pytest.raises(ValueError, match=r"restore: model must be a torch.nn.Module, got str"):
        talkingdit.restore("model")
    talkingdit.restore(nn.Linear(2, 2))
