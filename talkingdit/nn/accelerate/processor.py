# SPDX-License-Identifier: Apache-2.0
"""What attention processors that stand in for those of diffusers have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class StandIn:
    """A processor in the place of another, whose settings are its own."""

    def __init__(self, original: Any):
        self.original = original

    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of [B, N, H, D] as the processor it stands for is set to do it -> [B, N, H * D]."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        parallel = {"parallel_config": self._parallel_config} if hasattr(self.original, "_parallel_config") else {}
        out = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=self._attention_backend, **parallel)
        return out.flatten(2, 3).to(q.dtype)
