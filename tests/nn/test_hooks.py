# SPDX-License-Identifier: Apache-2.0
"""Methods that hooks reach as they reach the forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from talkingdit.nn.hooks import like_forward


class Scaled(nn.Module):
    """A weight of its own beside a layer, as models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((2,), 3.0))
        self.layers = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x) * self.scale

    @like_forward
    def twice(self, x: Tensor, *, add: float = 0.0) -> Tensor:
        """2 x scale + add"""
        return 2 * x * self.scale + add


def test_without_hooks_it_is_the_method() -> None:
    module = Scaled()
    assert module.twice(torch.ones(2), add=1).tolist() == [7, 7]
    assert (Scaled.twice.__name__, Scaled.twice.__doc__) == ("twice", "2 x scale + add")


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_weights_of_the_module_itself_are_brought_for_both(level: str, tmp_path: Any) -> None:
    module = Scaled()
    apply_group_offloading(
        module,
        torch.device("cpu"),
        offload_type=level,
        num_blocks_per_group=1 if level == "block_level" else None,
        offload_to_disk_path=str(tmp_path),
    )
    for _ in range(2):
        module.scale.data.fill_(torch.nan)
        assert module.twice(torch.ones(2), add=1).tolist() == [7, 7]
        module.scale.data.fill_(torch.nan)
        assert module(torch.ones(1, 2)).isfinite().all()


class Recorder(ModelHook):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.seen.append("before")
        return (args[0] + 1, *args[1:]), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.seen.append("behind")
        return output * 10


def test_hooks_of_accelerate_lie_around_it() -> None:
    module, hook = Scaled(), Recorder()
    add_hook_to_module(module, hook)
    assert module.twice(torch.ones(2)).tolist() == [120, 120]
    assert hook.seen == ["before", "behind"]
    remove_hook_from_module(module)
    assert module.twice(torch.ones(2)).tolist() == [6, 6]
